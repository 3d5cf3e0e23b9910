"""The mark of this machine's Trainway: made once, the same for all, anew when it is damaged."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from trainway.jobs import origin


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("before", [None, "", "nothing of the kind\n"], ids=["absent", "empty", "damaged"])
def test_it_is_made_once_however_many_ask_at_once(state: Path, before: str | None) -> None:
    for _ in range(20):
        with suppress(FileNotFoundError):
            (state / "origin").unlink()
        if before is not None:
            (state / "origin").write_text(before)
        assert origin.known_origin() is None
        with ThreadPoolExecutor(16) as pool:
            (found,) = set(pool.map(lambda _: origin.origin(), range(64)))
    assert re.fullmatch("[0-9a-f]{16}", found) and origin.known_origin() == found
    assert [path.name for path in state.iterdir()] == ["origin"]
