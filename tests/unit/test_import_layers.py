"""Imports go one way, and what plans or parses does so without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trainway

ROOT = Path(trainway.__file__).parent
LAYERS = (
    {"planning", "config", "run_dir", "files", "errors", "logs", "masking", "provenance"},
    {
        "engines",
        "checkpoint",
        "models",
        "data",
        "tracking",
        "losses",
        "muon",
        "optim",
        "schedules",
        "storage",
    },
    {"training", "rollout"},
    {"gad"},
    {"recipes", "release", "launch", "report", "board", "doctor", "smoke", "jobs", "pod"},
    {"cli", "__main__"},
)
"""Lowest first; a module imports from its own layer and those below."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
HEAVY = {"torch", "transformers", "numpy", "tokenizers", "matplotlib", "tensorboard"}


def imported_modules(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import of our own package, those inside functions too."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            if node.module == "trainway":
                found += [(node.lineno, f"trainway.{alias.name}") for alias in node.names]
            elif node.module:
                found.append((node.lineno, node.module))
    return [(line, name) for line, name in found if name.startswith("trainway.")]


def sources() -> list[Path]:
    # the package itself only forwards names, on first use
    return [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_part_has_its_layer() -> None:
    assert {part_of(path) for path in sources()} <= set(LEVEL)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    own = LEVEL[part_of(path)]
    for line, name in imported_modules(path):
        target = name.split(".")[1]
        if target == "__version__":
            continue
        assert LEVEL[target] <= own, f"{path.relative_to(ROOT)}:{line} imports {name}, which lies above it"


def light_modules() -> list[str]:
    parts = (
        "board",
        "cli",
        "config",
        "doctor",
        "planning",
        "launch",
        "jobs",
        "pod",
        "report",
        "errors.py",
        "run_dir.py",
    )
    files = [path for path in sources() if path.relative_to(ROOT).parts[0] in parts]
    names = [".".join(("trainway", *path.relative_to(ROOT).with_suffix("").parts)) for path in files]
    return ["trainway", *(name.removesuffix(".__init__") for name in names)]


def test_the_light_parts_import_without_the_heavy_libraries() -> None:
    names = light_modules()
    assert {
        "trainway.cli.app",
        "trainway.config.load",
        "trainway.doctor.checks",
        "trainway.planning.geometry",
        "trainway.launch",
    } <= set(names)
    code = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\n"
    code += f"print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_the_public_functions_are_found_where_they_live() -> None:
    code = "import sys, trainway\nassert callable(trainway.load_config) and callable(trainway.plan)\n"
    code += f"assert not {HEAVY!r} & set(sys.modules)\nassert set(trainway.__all__) <= set(dir(trainway))\n"
    code += "try: trainway.nothing\nexcept AttributeError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "module 'trainway' has no attribute 'nothing'", done.stderr
