"""The scripts and styles of pages: ours is what we wrote, uPlot's is what its authors released."""

from __future__ import annotations

import hashlib
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from trainway.report.html import static_text
from trainway.report.page import SCRIPTS, STYLES

ROOT = Path(__file__).parents[3]
UPLOT = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}
"""sha256 of the files of npm's uplot@1.6.32."""


@pytest.mark.parametrize("name", UPLOT)
def test_uplot_is_as_released(name: str) -> None:
    assert hashlib.sha256(static_text(name).encode()).hexdigest() == UPLOT[name]


def test_uplots_licence_is_with_it() -> None:
    assert "The MIT License" in static_text("uPlot.LICENSE")
    assert "Leon Sorokin" in static_text("uPlot.LICENSE")


@pytest.mark.parametrize("name", [*SCRIPTS, *STYLES])
def test_no_file_loads_anything_or_leaves_its_tag(name: str) -> None:
    found = static_text(name)
    assert not re.search(r"</(script|style)|https?://(?!github\.com/leeoniya/uPlot)|@import|\burl\(", found)


@pytest.mark.parametrize("word", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("])
def test_our_scripts_make_text_of_text(word: str) -> None:
    assert word not in static_text("charts.js") + static_text("report.js")


def test_every_colour_exists_in_light_and_in_dark() -> None:
    light, dark = static_text("style.css").split("@media (prefers-color-scheme: dark)")
    wanted = set(re.findall(r"var\((--[\w-]+)\)", static_text("style.css"))) - {"--swatch"}
    named = set(re.findall(r"(--[\w-]+): #", light))
    assert named == set(re.findall(r"(--[\w-]+): #", dark))
    assert wanted <= named | {"--font", "--mono"}
    # charts.js fades colours by two more digits
    assert all(len(value) == 6 for value in re.findall(r"--series-\d: #([0-9a-f]+)", light + dark))


def test_what_pages_are_made_of_gets_into_the_wheel() -> None:
    # hatch takes every file of the package that git does not ignore
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["src/trainway"]}
    files = [
        path for name in ("static", "templates") for path in (ROOT / "src/trainway/report" / name).iterdir()
    ]
    assert {*SCRIPTS, *STYLES, "uPlot.LICENSE", "report.html.j2"} == {path.name for path in files}
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    for path in files:
        parts = path.relative_to(ROOT).parts
        assert not [line for line in ignored if any(fnmatch(part, line) for part in parts)], path
