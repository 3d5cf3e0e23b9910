"""Every finding has a fault that shows it and a line in docs/doctor.md: none is forgotten, none is invented."""

from __future__ import annotations

import ast
from pathlib import Path

import trainway.doctor
from tests.doctor_material import documented_cures
from tests.faults.test_doctor import FAULTS

LEVELS = {"warning": "warning", "failure": "failure", "fault": "failure"}


def in_code() -> set[tuple[str, str]]:
    """(name, level) of every warning and failure that the package can make."""
    found = set()
    for path in Path(trainway.doctor.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in LEVELS:
                name = node.args[0]
                if isinstance(name, ast.Name):
                    continue  # `bounded` hands on the name of the check that it was given
                assert isinstance(name, ast.Constant), (
                    f"{path}:{node.lineno}: the name of a finding is a literal"
                )
                found.add((str(name.value), LEVELS[node.func.id]))
    return found


def test_every_finding_has_a_fault_and_a_line_in_the_documentation() -> None:
    shown = {(name, level) for _, level, name, _, _ in FAULTS}
    assert in_code() == shown
    assert set(documented_cures()) == shown
