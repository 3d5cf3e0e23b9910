"""pip and uv install the same versions, and every dependency is pinned."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned_alike_for_pip_and_uv() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {normal(name): version for name, version in (line.split("==") for line in lines)}
    for_uv = dict(line.split("==") for line in project["tool"]["uv"]["constraint-dependencies"])
    extras = project["project"]["optional-dependencies"]
    pinned = ("hub", "kubernetes", "s3", "wandb", "mlflow", "trackio", "eval", "gguf", "docs")
    wanted = [*project["project"]["dependencies"], *(line for name in pinned for line in extras[name])]
    needed = [normal(re.match(r"[\w.-]+", line)[0]) for line in wanted]
    assert sorted(for_uv) == sorted(needed)
    assert {name: pins[name] for name in needed} == for_uv


def test_the_board_serves_exactly_the_files_that_are_shipped_with_it() -> None:
    from trainway.board.server import OWN_STATIC

    shipped = {path.name for path in (ROOT / "src" / "trainway" / "board" / "static").iterdir()}
    assert shipped == {*OWN_STATIC, "index.html"}
