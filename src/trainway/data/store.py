"""The token store: the tokens of each split on disk, written once, hashed, verified, then memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import numpy as np
import xxhash

from trainway.data.token_split import Part, TokenSplit
from trainway.errors import DataError
from trainway.files import atomic_write, hash_file, is_sealed, read_json_text, sealed_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKEN_BYTES = "token_bytes.bin"
TOKENIZER_DIR = "tokenizer"
QUARANTINE = "quarantine.jsonl"
LEFT_OUT = "left-out.jsonl"
PART_BYTES = 4 << 30

SplitName = Literal["train", "val"]


@dataclass(frozen=True)
class StoreManifest:
    """What a store holds and what it was made from."""

    format: int
    dtype: str  # of the tokens, as numpy spells it
    vocab_size: int
    tokenizer_hash: str
    bos_id: int | None
    eos_id: int
    pad_id: int | None
    sources: dict[str, list[dict[str, Any]]]  # per setting: path, size, hash
    quarantined: int  # malformed records that were set aside
    splits: dict[str, dict[str, Any]]  # per split: tokens, documents, text_bytes, parts
    files: dict[str, dict[str, Any]]  # every file of the store: bytes, xxh3_128 hash
    # per source of a mix, in the order of the train split's parts: name, tokens, documents, text_bytes, number of parts
    streams: list[dict[str, Any]] = field(default_factory=list)
    duplicates: int = 0  # training documents that were left out because their text was there before
    conversations: dict[str, int] | None = (
        None  # of a store with masks: longest row, rows left out and shortened
    )


class TokenStore:
    """An opened store: its manifest, its splits, and the bytes that each token stands for."""

    def __init__(self, path: Path, manifest: StoreManifest) -> None:
        self.path = path
        self.manifest = manifest
        self.token_bytes = np.fromfile(path / TOKEN_BYTES, dtype="<i4")
        """[vocab_size] int32: UTF-8 bytes of each token, 0 for special ones."""

    @property
    def tokenizer_dir(self) -> Path:
        return self.path / TOKENIZER_DIR

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> TokenStore:
        """Memory-map the store in the directory `path`.

        Sizes are always checked; `verify` also hashes every file. Raises DataError naming the file that is
        missing, empty, truncated, altered or does not belong there.
        """
        path = Path(path)
        if not path.is_dir():
            raise DataError(f"{path}: no such token store", fix="prepare the data: trainway prepare CONFIG")
        text, content = read_json_text(path / MANIFEST)
        if not isinstance(content, dict) or content.get("format") != FORMAT_VERSION:
            why = f"this version reads format {FORMAT_VERSION}"
            raise DataError(f"{path / MANIFEST}: altered, or of another version", why, _cure(path))
        if "checksum" in content and not is_sealed(text, content):
            raise DataError(f"{path / MANIFEST}: altered", "its checksum does not match", _cure(path))
        content.pop("checksum", None)  # stores of the first versions have none
        try:
            manifest = StoreManifest(**content)
            _check_files(path, manifest.files, verify)
            return cls(path, manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path / MANIFEST}: altered", str(error), _cure(path)) from error

    def split(self, name: SplitName) -> TokenSplit:
        """The split's stream of tokens, memory-mapped; of a mix, its sources' streams end to end."""
        return self._stream(self.manifest.splits[name]["parts"], name)

    def streams(self) -> tuple[TokenSplit, ...]:
        """The streams that training rows come from: one for each source of a mix, else the training split."""
        if not self.manifest.streams:
            return (self.split("train"),)
        entries = iter(self.manifest.splits["train"]["parts"])
        return tuple(
            self._stream(list(islice(entries, stream["parts"])), stream["name"])
            for stream in self.manifest.streams
        )

    def _stream(self, entries: Sequence[dict[str, Any]], name: str) -> TokenSplit:
        parts: list[Part] = []
        first = 0
        for entry in entries:
            tokens = _map(self.path / entry["bin"], self.manifest.dtype)
            # Stored as uint64 and read as int64: a search with int64 keys then converts nothing.
            mask = _map(self.path / entry["mask"], "u1") if "mask" in entry else None
            parts.append(Part(tokens, _map(self.path / entry["idx"], "<i8"), first, mask))
            first += len(tokens)
        return TokenSplit(parts, self.manifest.eos_id, name, self.manifest.pad_id)


class StoreWriter:
    """Writes a store's files; a document that would take a part past `part_bytes` begins a new one.

    streams: names of the sources of a mix; each is written as a split of its own, called stream_key(its number).
    masked: beside its tokens each part has a file that says which of them are targets.
    """

    def __init__(
        self,
        path: Path,
        vocab_size: int,
        part_bytes: int = PART_BYTES,
        streams: Sequence[str] = (),
        *,
        masked: bool = False,
    ) -> None:
        self.path = path
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._part_tokens = max(1, part_bytes // self.dtype.itemsize)
        self._files: dict[str, dict[str, Any]] = {}
        self._streams = tuple(streams)
        train = [stream_key(number) for number in range(len(streams))] or ["train"]
        self._splits = {name: _SplitWriter(name, masked) for name in (*train, "val")}
        self.vocab_size = vocab_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for split in self._splits.values():
            split.close()

    def append(
        self,
        name: str,
        tokens: np.ndarray,
        lengths: np.ndarray,
        text_bytes: int,
        mask: np.ndarray | None = None,
    ) -> None:
        """Append documents to the split `name`: tokens end to end, tokens of each, their bytes of text.

        mask: [tokens] bool, which of them are targets; given when the store has masks, and only then.
        """
        split = self._splits[name]
        assert (mask is not None) == split.masked
        split.text_bytes += text_bytes
        ends = np.cumsum(lengths, dtype=np.int64)
        done = 0
        while done < len(lengths):
            base = int(ends[done - 1]) if done else 0
            room = self._part_tokens - split.tokens
            # A document never spans two parts; a part takes at least one.
            stop = max(int(np.searchsorted(ends, base + room, "right")), done + (split.tokens == 0))
            if stop > done:
                own = slice(base, int(ends[stop - 1]))
                part_mask = None if mask is None else mask[own].astype(np.uint8)
                self._write(split, tokens[own], lengths[done:stop], part_mask)
            if stop < len(lengths):
                self._finish_part(split)
            done = stop

    def finish(self, token_bytes: np.ndarray, **facts: Any) -> StoreManifest:
        """Close the parts and write the manifest, which lists every file in the directory.

        facts: the fields of StoreManifest that the writer does not know itself.
        """
        for split in self._splits.values():
            self._finish_part(split)
        self._whole_file(TOKEN_BYTES, token_bytes.astype("<i4").tobytes())
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and name not in self._files:
                self._files[name] = {"bytes": path.stat().st_size, "hash": hash_file(path)}
        streams = [split.summary() for name, split in self._splits.items() if name != "val"]
        manifest = StoreManifest(
            format=FORMAT_VERSION,
            dtype=self.dtype.str,
            vocab_size=self.vocab_size,
            splits={"train": _joined(streams), "val": self._splits["val"].summary()},
            files=dict(sorted(self._files.items())),
            streams=[
                {"name": name, **stream, "parts": len(stream["parts"])}
                for name, stream in zip(
                    self._streams, streams, strict=False
                )  # without a mix there are no names
            ],
            **facts,
        )
        content = asdict(manifest)
        if manifest.conversations is None:
            del content["conversations"]
        atomic_write(self.path / MANIFEST, sealed_json(content))
        return manifest

    def splits(self) -> list[str]:
        """What may be appended to: "val" and "train", or the streams of a mix."""
        return list(self._splits)

    def documents(self, name: str) -> int:
        """Documents of the split so far."""
        split = self._splits[name]
        finished: int = sum(part["documents"] for part in split.parts)
        return finished + sum(map(len, split.lengths))

    def _write(
        self, split: _SplitWriter, tokens: np.ndarray, lengths: np.ndarray, mask: np.ndarray | None
    ) -> None:
        if not split.files:
            split.open(self.path)
        payload = np.ascontiguousarray(tokens, dtype=self.dtype).data.cast("B")
        split.files["bin"].write(payload)
        if mask is not None:
            split.files["mask"].write(mask.data.cast("B"))
            split.trained += int(np.count_nonzero(mask))
        split.tokens += len(tokens)
        split.lengths.append(lengths.astype(np.int64))

    def _finish_part(self, split: _SplitWriter) -> None:
        if not split.files:
            return
        split.close()
        entry = {suffix: split.part_name(suffix) for suffix in split.files}
        for suffix, file in split.files.items():
            self._files[entry[suffix]] = {"bytes": file.size, "hash": file.digest.hexdigest()}
        lengths = np.concatenate(split.lengths)
        starts = np.zeros(len(lengths) + 1, dtype="<u8")
        np.cumsum(lengths, out=starts[1:], dtype="<u8")
        self._whole_file(split.part_name("idx"), starts.tobytes())
        facts = {"idx": split.part_name("idx"), "tokens": split.tokens, "documents": len(lengths)}
        split.parts.append({**entry, **facts})
        split.files, split.tokens, split.lengths = {}, 0, []

    def _whole_file(self, name: str, data: bytes) -> None:
        (self.path / name).write_bytes(data)
        self._files[name] = {"bytes": len(data), "hash": xxhash.xxh3_128_hexdigest(data)}


class _PartFile:
    """A file of the open part, hashed as it is written: what should be on the disk, not what a failing disk made of it."""

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed with the part
        self.digest = xxhash.xxh3_128()
        self.size = 0

    def write(self, payload: memoryview) -> None:
        self.file.write(payload)
        self.digest.update(payload)
        self.size += len(payload)


class _SplitWriter:
    """One split while it is written: the open part and the finished ones."""

    def __init__(self, name: str, masked: bool) -> None:
        self.name = name
        self.masked = masked
        self.files: dict[str, _PartFile] = {}  # of the open part, by suffix
        self.tokens = 0  # of the open part
        self.lengths: list[np.ndarray] = []  # of the open part's documents
        self.parts: list[dict[str, Any]] = []
        self.text_bytes = 0
        self.trained = 0  # tokens that are targets

    def open(self, folder: Path) -> None:
        for suffix in ("bin", "mask") if self.masked else ("bin",):
            self.files[suffix] = _PartFile(folder / self.part_name(suffix))

    def close(self) -> None:
        for file in self.files.values():
            file.file.close()

    def part_name(self, suffix: str) -> str:
        return f"{self.name}-{len(self.parts):05d}.{suffix}"

    def summary(self) -> dict[str, Any]:
        return {
            "tokens": sum(part["tokens"] for part in self.parts),
            "documents": sum(part["documents"] for part in self.parts),
            "text_bytes": self.text_bytes,
            **({"trained": self.trained} if self.masked else {}),
            "parts": self.parts,
        }


def stream_key(number: int) -> str:
    """What a StoreWriter calls the training split of source `number` of a mix."""
    return f"train.{number}"


def stream_number(key: str) -> int | None:
    """The number of the source whose stream_key this is; None for "train" and "val"."""
    _, dot, number = key.partition(".")
    return int(number) if dot else None


def _joined(streams: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The summary of the training split that the streams are, end to end."""
    if len(streams) == 1:
        return streams[0]
    counted = {key: sum(stream[key] for stream in streams) for key in streams[0] if key != "parts"}
    return {**counted, "parts": [part for stream in streams for part in stream["parts"]]}


def _check_files(path: Path, files: dict[str, dict[str, Any]], verify: bool) -> None:
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    extra = sorted(name for name in found - set(files) - {MANIFEST} if not Path(name).name.startswith("."))
    if extra:
        why = f"{path / MANIFEST} does not list it"
        raise DataError(f"{path / extra[0]}: does not belong to the token store", why, "remove the file")
    for name, entry in files.items():
        file = path / name
        if name not in found:
            raise DataError(f"{file}: missing from the token store", fix=_cure(path))
        size = file.stat().st_size
        if size != entry["bytes"]:
            why = "it is empty" if size == 0 else f"{size} bytes; the manifest says {entry['bytes']}"
            raise DataError(f"{file}: altered since the token store was written", why, _cure(path))
        if verify and hash_file(file) != entry["hash"]:
            why = f"its content does not have the hash {entry['hash']} of the manifest"
            raise DataError(f"{file}: altered since the token store was written", why, _cure(path))


def _map(path: Path, dtype: str) -> np.ndarray:
    # A plain view of the map: slicing np.memmap itself costs microseconds each time.
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def _cure(path: Path) -> str:
    return f"delete the directory {path}: preparing the data makes it again"
