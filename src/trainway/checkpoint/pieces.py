"""Named tensors in safetensors files: whole, or in pieces of which each rank writes its own."""

from __future__ import annotations

import json
import math
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
    """Neighbouring elements of a flattened tensor of `shape`, those from `start` on; a whole tensor is a piece, too.

    `tensor` holds them flat, or as rows [n, *shape[1:]] when they are whole rows: so they are stored, too.
    """

    tensor: torch.Tensor
    shape: tuple[int, ...]
    start: int = 0

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> Piece:
        return cls(tensor, tuple(tensor.shape))

    @classmethod
    def rows(cls, tensor: torch.Tensor, shape: tuple[int, ...], first: int) -> Piece:
        """The rows of `tensor`, which stand at row `first` of a tensor of `shape`."""
        return cls(tensor, shape, first * math.prod(shape[1:]))

    @property
    def is_whole(self) -> bool:
        return tuple(self.tensor.shape) == self.shape

    def like(self, tensor: torch.Tensor) -> Piece:
        """The piece that stands in the same place and holds `tensor`."""
        return Piece(tensor, self.shape, self.start)

    def copy_from(self, whole: torch.Tensor) -> None:
        """Fill the piece with its elements of a whole tensor, converted to its type."""
        if self.is_whole:
            self.tensor.copy_(whole)
        else:
            elements = whole.reshape(-1)[self.start : self.start + self.tensor.numel()]
            self.tensor.copy_(elements.view(self.tensor.shape))


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
    places = {name: _place(piece) for name, piece in pieces.items() if not piece.is_whole}
    # one entry: safetensors writes several in an order that changes from run to run
    metadata = {METADATA: json.dumps({**(facts or {}), "pieces": places})}
    write_tensors(path, {name: piece.tensor for name, piece in pieces.items()}, metadata)


def _place(piece: Piece) -> dict[str, Any]:
    # rows are counted in rows: such files are what they were before there were other pieces
    width = math.prod(piece.shape[1:])
    if piece.tensor.shape[1:] == piece.shape[1:] and width:
        assert piece.start % width == 0, f"the rows begin at element {piece.start}, rows are {width} wide"
        return {"shape": list(piece.shape), "start": piece.start // width}
    return {"shape": list(piece.shape), "element": piece.start}


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
            tensor = tensor.to("cpu", copy=True)  # where it is to be written from: a GPU has no room to spare
        seen.add(storage)
        result[name] = tensor
    return result


# ---- reading


class _Tile(NamedTuple):
    start: int
    """First element within the whole, flattened tensor."""
    length: int
    width: int
    """Elements in one row of the tensor as it is stored."""
    file: Any  # an opened safetensors file


class StoredTensors:
    """The tensors of opened files, read by name and place: what is not asked for is not read."""

    def __init__(self, opened: Sequence[tuple[Path, Any]]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.files: dict[str, list[Path]] = {}
        self.facts: list[dict[str, Any]] = []
        """What `write_pieces` was told, by file; empty for a file that others have written."""
        self._tiles: dict[str, list[_Tile]] = {}
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
                tile = _Tile(start, math.prod(found), math.prod(found[1:]), file)
                self._tiles.setdefault(name, []).append(tile)
        for name, tiles in self._tiles.items():
            tiles.sort(key=lambda tile: (tile.start, tile.length))
            _check_tiles(name, self.shapes[name], tiles, self.files[name])

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor, read without its values."""
        shape = self.shapes[name]
        return self.elements(name, 0, 0).dtype if shape else self.read(name).dtype

    def read(self, name: str, start: int = 0, rows: int | None = None) -> torch.Tensor:
        """The rows [start, start + rows) of a tensor, all of it without `rows`, on the CPU."""
        tiles, shape = self._tiles[name], self.shapes[name]
        if rows is None and len(tiles) == 1 and tiles[0].length == math.prod(shape):
            return tiles[0].file.get_tensor(name).view(shape)
        if rows is None:
            return self.elements(name, 0, math.prod(shape)).view(shape)
        width = math.prod(shape[1:])
        return self.elements(name, start * width, rows * width).view(rows, *shape[1:])

    def elements(self, name: str, start: int, count: int) -> torch.Tensor:
        """The elements [start, start + count) of a tensor flattened, [count] on the CPU."""
        tiles = self._tiles[name]
        stop = start + count
        found = [
            _read_tile(tile, name, max(start - tile.start, 0), min(stop - tile.start, tile.length))
            for tile in tiles
            if tile.start < stop and start < tile.start + tile.length
        ]
        if not found:  # a rank that holds nothing of it
            return _read_tile(tiles[0], name, 0, 0)
        return found[0] if len(found) == 1 else torch.cat(found)

    def read_piece(self, name: str, piece: Piece) -> torch.Tensor:
        """The elements that belong into a piece, in the piece's own shape, on the CPU."""
        if piece.is_whole:
            return self.read(name)
        return self.elements(name, piece.start, piece.tensor.numel()).view(piece.tensor.shape)


def _read_tile(tile: _Tile, name: str, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of a stored tensor, flat; whole rows are read, as few as hold them."""
    stored = tile.file.get_slice(name)
    if not stored.get_shape():
        return tile.file.get_tensor(name).view(1)[start:stop]
    width = max(tile.width, 1)
    first, last = start // width, -(-stop // width)
    return stored[first:last].reshape(-1)[start - first * width : stop - first * width]


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
        return facts, {name: _element(place) for name, place in places.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is malformed", "it does not say where its pieces belong", _CURE) from error


def _element(place: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    shape = tuple(map(int, place["shape"]))
    if "element" in place:
        return shape, int(place["element"])
    return shape, int(place["start"]) * math.prod(shape[1:])


def _check_tiles(name: str, shape: tuple[int, ...], tiles: list[_Tile], files: list[Path]) -> None:
    end = 0
    for tile in tiles:
        if tile.start != end and tile.length:
            break
        end += tile.length
    else:
        if end == math.prod(shape):
            return
    where = ", ".join(path.name for path in files[:4])
    raise DataError(
        f"{files[0].parent}: {name} is incomplete", f"its pieces in {where} do not tile it", _CURE
    )
