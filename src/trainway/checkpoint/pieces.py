"""Named tensors in safetensors files: whole, or in pieces of rows of which each rank writes its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trainway.errors import DataError

METADATA = "trainway"
"""Entry of a file's metadata that holds what we say about its tensors, as JSON."""

_CURE = "use another checkpoint"
_PART_NAME = re.compile(r".+\.part-([0-9]{5})-of-([0-9]{5})\.safetensors")


@dataclass(frozen=True)
class Piece:
    """The rows of `tensor`, which stand at `start` in a tensor of `shape`. A whole tensor is a piece, too."""

    tensor: torch.Tensor
    shape: tuple[int, ...]
    start: int = 0

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> Piece:
        return cls(tensor, tuple(tensor.shape))

    @property
    def is_whole(self) -> bool:
        return tuple(self.tensor.shape) == self.shape


@dataclass(frozen=True)
class Part:
    """Which of `count` files that make up one set of tensors a rank writes."""

    index: int = 0
    count: int = 1

    def file_name(self, stem: str) -> str:
        if self.count == 1:
            return f"{stem}.safetensors"
        return f"{stem}.part-{self.index:05d}-of-{self.count:05d}.safetensors"


WHOLE = Part()
"""One rank writes all of it."""


def part_files(directory: Path, stem: str) -> list[Path]:
    """The file or files named by `Part.file_name(stem)`. Raises DataError when there is none, or a part is missing."""
    whole = directory / WHOLE.file_name(stem)
    parts = sorted(directory.glob(f"{stem}.part-*-of-*.safetensors"))
    if not parts:
        return [whole]  # opening it says that it is missing
    found = [_PART_NAME.fullmatch(path.name) for path in parts]
    counts = {int(match[2]) for match in found if match}
    indices = [int(match[1]) for match in found if match]
    if len(counts) != 1 or indices != list(range(*counts)) or whole.exists():
        names = ", ".join(path.name for path in parts[:4])
        raise DataError(f"{directory} holds no complete set of parts of {stem}", f"found {names}", _CURE)
    return parts


# ---- writing


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors from any device. Raises OSError of the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors():
        save_file(_unshared(tensors), str(path), metadata=dict(metadata) if metadata else None)


def write_pieces(path: Path, pieces: Mapping[str, Piece], facts: Mapping[str, Any] | None = None) -> None:
    """Write pieces, where each one belongs, and `facts` that JSON can hold. Raises OSError of the disk."""
    places = {
        name: {"shape": list(piece.shape), "start": piece.start}
        for name, piece in pieces.items()
        if not piece.is_whole
    }
    # one entry: safetensors writes several in an order that changes from run to run
    metadata = {METADATA: json.dumps({**(facts or {}), "pieces": places})}
    write_tensors(path, {name: piece.tensor for name, piece in pieces.items()}, metadata)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Give safetensors' own error of a full or failing disk the type that every other writer raises."""
    try:
        yield
    except SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), str(error)) from error
        raise


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    seen: set[tuple[str, int]] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = (str(tensor.device), tensor.untyped_storage().data_ptr())
        # safetensors refuses two tensors that share memory, and one that has more memory than it shows
        if storage in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(storage)
        result[name] = tensor
    return result


# ---- reading


class _Place(NamedTuple):
    start: int
    rows: int
    file: Any  # an opened safetensors file


class StoredTensors:
    """The tensors of opened files, read by name and rows: what is not asked for is not read."""

    def __init__(self, opened: Sequence[tuple[Path, Any]]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.files: dict[str, list[Path]] = {}
        self.facts: list[dict[str, Any]] = []
        """What `write_pieces` was told, by file; empty for a file that others have written."""
        self._places: dict[str, list[_Place]] = {}
        for path, file in opened:
            facts, places = _read_facts(file.metadata() or {}, path)
            self.facts.append(facts)
            for name in sorted(file.keys()):
                found = tuple(file.get_slice(name).get_shape())
                shape, start = places.get(name, (found, 0))
                if self.shapes.setdefault(name, shape) != shape:
                    raise DataError(
                        f"{path}: {name} has shape {list(shape)}, another file says {list(self.shapes[name])}",
                        fix=_CURE,
                    )
                self.files.setdefault(name, []).append(path)
                rows = found[0] if found else 1
                self._places.setdefault(name, []).append(_Place(start, rows, file))
        for name, tiles in self._places.items():
            tiles.sort(key=lambda place: (place.start, place.rows))
            _check_tiles(name, self.shapes[name], tiles, self.files[name])

    def read(self, name: str, start: int = 0, rows: int | None = None) -> torch.Tensor:
        """The rows [start, start + rows) of a tensor, all of it without `rows`, on the CPU."""
        places = self._places[name]
        if rows is None and len(places) == 1:
            return places[0].file.get_tensor(name)
        stop = self.shapes[name][0] if rows is None else start + rows
        found = [
            place.file.get_slice(name)[max(start - place.start, 0) : min(stop - place.start, place.rows)]
            for place in places
            if place.start < stop and start < place.start + place.rows
        ]
        if not found:  # a rank that holds no row of it
            return places[0].file.get_slice(name)[0:0]
        return found[0] if len(found) == 1 else torch.cat(found)


@contextmanager
def open_tensors(paths: Sequence[Path]) -> Iterator[StoredTensors]:
    """Open files that make up one set of tensors. Raises DataError if one is missing, damaged or does not fit."""
    with ExitStack() as stack:
        yield StoredTensors([(path, stack.enter_context(_opened(path))) for path in paths])


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors that `write_tensors` wrote, on the CPU. Raises DataError if the file is missing or damaged."""
    with open_tensors([path]) as stored:
        return {name: stored.read(name) for name in stored.shapes}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing", fix=_CURE) from error
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read", f"{error}", _CURE) from error


_Places = dict[str, tuple[tuple[int, ...], int]]


def _read_facts(metadata: dict[str, str], path: Path) -> tuple[dict[str, Any], _Places]:
    try:
        facts = json.loads(metadata.get(METADATA, "{}"))
        places = facts.pop("pieces", {})
        found = {name: (tuple(map(int, p["shape"])), int(p["start"])) for name, p in places.items()}
        return facts, found
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is malformed", "it does not say where its pieces belong", _CURE) from error


def _check_tiles(name: str, shape: tuple[int, ...], tiles: list[_Place], files: list[Path]) -> None:
    end = 0
    for place in tiles:
        if place.start != end and place.rows:
            break
        end += place.rows
    else:
        if end == (shape[0] if shape else 1):
            return
    where = ", ".join(path.name for path in files[:4])
    raise DataError(
        f"{files[0].parent}: {name} is incomplete", f"its pieces in {where} do not tile it", _CURE
    )
