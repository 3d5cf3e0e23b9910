"""Intervals of flattened tensors: any way of cutting is read back in any other, and only what is asked for is read."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from trainway.checkpoint import pieces as pieces_module
from trainway.checkpoint.pieces import Part, Piece, open_tensors, part_files, write_pieces
from trainway.checkpoint.weights import assemble, read_model_state
from trainway.errors import DataError

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


def numbered(shape: Sequence[int]) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).view(*shape)


def interval(whole: torch.Tensor, start: int, stop: int) -> Piece:
    """Elements [start, stop) as an engine holds them: as rows where they are rows, else flat."""
    shape, width = tuple(whole.shape), math.prod(whole.shape[1:])
    elements = whole.reshape(-1)[start:stop].clone()
    rows = start % width == 0 and stop % width == 0
    return Piece(elements.view(-1, *shape[1:]) if rows and stop > start else elements, shape, start)


@st.composite
def tilings(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=4)))
    return list(zip([0, *cuts], [*cuts, size], strict=True))


@settings(deadline=None, max_examples=60)
@given(data=st.data(), shape=SHAPES)
def test_any_tiling_is_read_in_any_other(data: st.DataObject, shape: tuple[int, ...]) -> None:
    whole = numbered(shape)
    stored_as, wanted = data.draw(tilings(whole.numel())), data.draw(tilings(whole.numel()))
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        for index, (start, stop) in enumerate(stored_as):
            part = Part(index, len(stored_as))
            write_pieces(directory / part.file_name("model"), {"w": interval(whole, start, stop)})
        with open_tensors(part_files(directory, "model")) as stored:
            assert stored.shapes == {"w": shape} and stored.dtype("w") == torch.float32
            assert torch.equal(stored.read("w"), whole)
            for start, stop in wanted:
                assert torch.equal(stored.elements("w", start, stop - start), whole.reshape(-1)[start:stop])
                piece = interval(torch.zeros(shape), start, stop)
                assert torch.equal(stored.read_piece("w", piece), interval(whole, start, stop).tensor)
            for first in range(shape[0]):
                assert torch.equal(stored.read("w", first, 1), whole[first : first + 1])


@settings(deadline=None, max_examples=60)
@given(data=st.data(), shape=SHAPES)
def test_a_piece_takes_its_elements_of_a_whole_tensor(data: st.DataObject, shape: tuple[int, ...]) -> None:
    whole = numbered(shape)
    for start, stop in data.draw(tilings(whole.numel())):
        piece = interval(torch.full(shape, -1.0), start, stop)
        piece.copy_from(whole)
        assert torch.equal(piece.tensor, interval(whole, start, stop).tensor)


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = numbered((100, 8))
    for index, (start, stop) in enumerate([(0, 160), (160, 411), (411, 800)]):
        write_pieces(tmp_path / Part(index, 3).file_name("model"), {"w": interval(whole, start, stop)})
    read = []

    class Counting:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            assert name != "get_tensor", "a whole tensor was read"
            return getattr(self._file, name)

        def get_slice(self, name: str) -> Any:
            found = self._file.get_slice(name)

            class Slice:
                get_shape = staticmethod(found.get_shape)

                def __getitem__(self, rows: slice) -> torch.Tensor:
                    read.append(found[rows].numel())
                    return found[rows]

            return Slice()

    opened = pieces_module.safe_open

    class Opened:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._file = opened(*arguments, **options)

        def __enter__(self) -> Counting:
            return Counting(self._file.__enter__())

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

    monkeypatch.setattr(pieces_module, "safe_open", Opened)
    with open_tensors(part_files(tmp_path, "model")) as stored:
        assert stored.elements("w", 157, 6).tolist() == [157, 158, 159, 160, 161, 162]
        assert read == [8, 3]  # one row of the first file, which holds rows, and 3 elements of the second


def test_rows_are_stored_as_they_were_before_intervals_were(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    rows = {
        "w": Piece.rows(numbered((4, 3))[1:3].clone(), (4, 3), 1),
        "v": Piece.rows(torch.ones(2), (6,), 4),
    }
    write_pieces(path, rows)
    with safe_open(str(path), "pt") as file:
        places = '{"pieces": {"w": {"shape": [4, 3], "start": 1}, "v": {"shape": [6], "start": 4}}}'
        assert file.metadata() == {"trainway": places}
        assert file.get_slice("w").get_shape() == [2, 3]


def test_intervals_that_leave_a_gap_or_overlap_are_named(tmp_path: Path) -> None:
    whole = numbered((5, 3))
    for stop, start in ((7, 8), (8, 7), (7, 7)):
        for index, (first, last) in enumerate([(0, stop), (start, 14 if stop == start else 15)]):
            write_pieces(tmp_path / Part(index, 2).file_name("model"), {"w": interval(whole, first, last)})
        with (
            pytest.raises(DataError, match="w is incomplete"),
            open_tensors(part_files(tmp_path, "model")),
        ):
            pass


def test_intervals_are_assembled_to_one_model(tmp_path: Path) -> None:
    whole = {"a": numbered((7, 3)), "b": numbered((4,))}
    for index, (cut_a, cut_b) in enumerate([((0, 8), (0, 4)), ((8, 21), (4, 4))]):
        held = {"a": interval(whole["a"], *cut_a), "b": interval(whole["b"], *cut_b)}
        write_pieces(tmp_path / "parts" / Part(index, 2).file_name("model"), held)
    (tmp_path / "out").mkdir()
    assemble(tmp_path / "parts", tmp_path / "out")
    found = read_model_state(tmp_path / "out")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
