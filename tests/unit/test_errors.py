"""The three lines of an error: one text, whichever program prints it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import trainway
from trainway.cli.terminal import print_error
from trainway.errors import ConfigError


def test_the_lines_that_there_are() -> None:
    assert ConfigError("a", "b", "c").lines == "error: a\nwhy: b\nfix: c"
    assert ConfigError("a", "", "c").lines == "error: a\nfix: c"
    assert ConfigError("a").lines == "error: a"


def test_the_command_line_prints_them_once_for_all_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    print_error(ConfigError("a", "b", "c"))
    assert capsys.readouterr().err == "error: a\nwhy: b\nfix: c\n"
    monkeypatch.setenv("RANK", "1")
    print_error(ConfigError("a", "b", "c"))
    assert capsys.readouterr().err == "rank 1: a\n"


def test_nobody_else_spells_them() -> None:
    root = Path(trainway.__file__).parent
    spelt = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if '("why", ' in (text := path.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Tuple)
        and [getattr(item, "value", None) for item in node.elts[:1]] == ["why"]
        and ast.unparse(node.elts[-1]) in ("error.why", "self.why")
    ]
    assert spelt == ["errors.py"]
