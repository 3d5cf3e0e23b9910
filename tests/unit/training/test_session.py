"""Ranks that would train on different files do not begin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trainway.errors import EnvironmentFault
from trainway.training.session import _check_agreement


def world(rank: int, main: dict[str, str]) -> Any:
    return SimpleNamespace(rank=rank, from_main=lambda own: main)


@pytest.mark.parametrize(
    ("main", "named"),
    [
        ({"data": "d2", "model.path": "b1"}, "data"),
        ({"data": "d1", "model.path": "b2"}, "model.path"),
        ({"data": "d2", "model.path": "b2"}, "data and model.path"),
    ],
)
def test_a_rank_that_read_other_files_is_named(main: dict[str, str], named: str) -> None:
    _check_agreement(world(3, {"data": "d1", "model.path": "b1"}), "d1", "b1")
    with pytest.raises(EnvironmentFault) as raised:
        _check_agreement(world(3, main), "d1", "b1")
    assert raised.value.what == f"rank 3 has read other files of {named} than rank 0"
