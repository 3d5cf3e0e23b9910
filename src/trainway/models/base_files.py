"""The files of a model directory in Hugging Face's format: which there must be, and what their headers say."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from trainway.checkpoint.weights import INDEX_FILE, is_in_pieces
from trainway.errors import ConfigError, DataError
from trainway.files import read_json

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model.safetensors"
MAX_HEADER_BYTES = 100 << 20
"""safetensors' own limit."""

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "tekken.json", "vocab.txt")
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
         "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
         "I64": 64, "U64": 64, "F64": 64, "C64": 64}  # fmt: skip


class Stored(NamedTuple):
    """What a header says about a tensor: its type in safetensors' words, its shape, the file that holds it."""

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.dtype] // 8


@dataclass(frozen=True)
class ModelFiles:
    """A model directory whose files are all there."""

    directory: Path
    weights: tuple[Path, ...]
    tensors: Mapping[str, Stored]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def read_directory(directory: Path, source: str, *, needs_tokenizer: bool) -> ModelFiles:
    """The files of a model directory, whose headers are read and compared with their sizes.

    Raises:
        DataError: files are missing (each one is named), damaged, or disagree with the index.
        ConfigError: it holds an adapter, a GGUF file, a pickle or the pieces of a checkpoint instead of a model.
    """
    _refuse_other_kinds(directory, source)
    names, lacking = weight_names(directory)
    wanted = [CONFIG, *([TOKENIZER] if needs_tokenizer else ()), *names]
    missing = [_described(directory, name) for name in wanted if not (directory / name).is_file()]
    missing += lacking
    if missing:
        raise missing_files(source, directory, missing)
    weights = tuple(directory / name for name in names)
    tensors: dict[str, Stored] = {}
    damaged = []
    for file in weights:
        try:
            tensors |= read_header(file)
        except DataError as error:
            damaged.append(f"{file.name}: {error.why}")
    if damaged:
        raise DataError(
            f"{source}: {'a weight file is' if len(damaged) == 1 else 'weight files are'} damaged",
            "; ".join(damaged),
            f"remove {'it' if len(damaged) == 1 else 'them'} from {directory}, and copy or download anew",
        )
    _check_places(directory, source, tensors)
    return ModelFiles(directory, weights, tensors)


def missing_files(source: str, directory: Path, missing: Sequence[str]) -> DataError:
    """The error for a directory that lacks files, naming all of them."""
    count = "a file is" if len(missing) == 1 else f"{len(missing)} files are"
    return DataError(
        f"{source}: {count} missing",
        f"{directory} lacks {', '.join(missing)}",
        "copy the whole directory, or run `hf download OWNER/NAME --local-dir DIRECTORY` where there is a network",
    )


def weight_names(directory: Path) -> tuple[list[str], list[str]]:
    """(names of the weight files that there must be, what is missing besides): from the index, where there is one."""
    places = index_places(directory / INDEX_FILE) if (directory / INDEX_FILE).exists() else None
    if places is not None:
        return sorted(set(places.values())), []
    if (directory / WEIGHTS).exists():
        return [WEIGHTS], []
    # shards without their index: it says which tensors there should be
    shards = sorted(path.name for path in directory.glob("model-*-of-*.safetensors"))
    return shards, [INDEX_FILE if shards else f"{WEIGHTS}, or {INDEX_FILE} and the files that it names"]


def index_places(index: Path) -> dict[str, str]:
    """{tensor: file} of an index. Raises DataError when it is malformed, or names a file elsewhere."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise DataError(f"{index} is malformed", "it holds no weight_map", "copy or download it anew")
    for file in set(places.values()):
        if PurePosixPath(file).name != file or not file.endswith(".safetensors"):
            raise DataError(
                f"{index} is malformed", f"unsafe file name {file!r:.80}", "copy or download it anew"
            )
    return places


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name, without reading them.

    Raises DataError when the header is malformed or does not fit the size of the file.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise _damaged(file, f"its {size:,} bytes are not those of a safetensors file")
        text = opened.read(length)
    try:
        content: dict[str, Any] = json.loads(text)
        content.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in content.values()), default=0)
        found = {
            name: Stored(str(entry["dtype"]), tuple(map(int, entry["shape"])), file)
            for name, entry in content.items()
        }
        unknown = {tensor.dtype for tensor in found.values()} - _BITS.keys()
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        raise _damaged(file, "its header cannot be read") from None
    if unknown:
        raise _damaged(file, f"its header names unknown types: {', '.join(sorted(unknown))}")
    if 8 + length + end != size:
        raise _damaged(file, f"it has {size:,} bytes, and its header says {8 + length + end:,}")
    return found


def find_local(path: str) -> Path | None:
    """The directory that `path` names, or None for what can only be an id of the Hub.

    Raises ConfigError, with names that are near, for what looks like a path and does not exist, or is a file.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return place
    if place.is_file():
        if place.suffix == ".gguf":
            raise _gguf(path)
        raise ConfigError(
            f"{path} is a file",
            "a model is a directory with config.json, tokenizer.json and weights",
            "name its directory",
        )
    if not _HUB_ID.fullmatch(path):
        raise ConfigError(
            f"the model {path} was not found",
            f"there is no directory {place.absolute()}",
            near_names(place) or "correct model.path",
        )
    return None


def near_names(place: Path) -> str:
    """A question that names the directories which look like `place`; empty when none does."""
    parent = place.absolute().parent
    if not parent.is_dir():
        return f"there is no {parent} either"
    names = [entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    near = difflib.get_close_matches(place.name, names, n=3, cutoff=0.5)
    return f"did you mean {', '.join(str(Path(place).parent / name) for name in near)}?" if near else ""


def _refuse_other_kinds(directory: Path, source: str) -> None:
    adapter = directory / "adapter_config.json"
    if adapter.exists() and not (directory / CONFIG).exists():
        content = read_json(adapter)
        base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
        raise ConfigError(
            f"{source} is an adapter, not a model",
            f"it belongs to the base model {base or '(it names none)'}",
            f"set model.path to {'that' if base else 'its base'}, or merge the two first",
        )
    if is_in_pieces(directory):
        raise ConfigError(
            f"{source} is in pieces",
            "several ranks wrote it",
            "`trainway export` makes a plain model directory of its run",
        )
    if any(directory.glob("*.safetensors")) or (directory / INDEX_FILE).exists():
        return
    if any(directory.glob("*.gguf")):
        raise _gguf(source)
    pickles = _existing(directory, _PICKLES)
    if pickles:
        raise ConfigError(
            f"{source} holds its weights in {pickles[0]} alone",
            "reading a pickle can run code of its author, so Trainway reads safetensors only",
            'use a version with .safetensors files; or, if you trust the author: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{source}').save_pretrained('DIRECTORY')\"",
        )


def _gguf(source: str) -> ConfigError:
    return ConfigError(
        f"{source} is a GGUF file",
        "its weights are quantised for inference",
        "use the model that it was made from; docs/models.md shows how a GGUF becomes a directory",
    )


def _described(directory: Path, name: str) -> str:
    if name != TOKENIZER:
        return name
    others = _existing(directory, _OTHER_TOKENIZERS)
    return f"{name} ({others[0]} alone is not enough)" if others else name


def _existing(directory: Path, patterns: Iterable[str]) -> list[str]:
    return sorted(path.name for pattern in patterns for path in directory.glob(pattern))


def _check_places(directory: Path, source: str, tensors: Mapping[str, Stored]) -> None:
    if not (directory / INDEX_FILE).exists():
        return
    places = index_places(directory / INDEX_FILE)
    wrong = sorted(
        name for name, file in places.items() if name not in tensors or tensors[name].file.name != file
    )
    if wrong:
        rest = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise DataError(
            f"{source} does not match its index",
            f"{', '.join(wrong[:4])}{rest}: not in the file that {INDEX_FILE} names",
            "copy or download the whole directory anew",
        )


def _damaged(file: Path, why: str) -> DataError:
    return DataError(f"{file} is damaged", why, "copy or download it anew")
