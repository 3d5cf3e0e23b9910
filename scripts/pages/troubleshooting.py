"""docs/troubleshooting.md: every error that a user can cause, by exit code and part, read from where the code raises it."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pages.tables import cell

SOURCE = Path(__file__).parent.parent.parent / "src" / "trainway"
BEGIN = "<!-- made by `python scripts/references.py` -->"
GAP = "…"
TITLES = {
    "ConfigError": "Exit code 2: configuration and arguments",
    "DataError": "Exit code 3: data and files",
    "EnvironmentFault": "Exit code 4: the machine, the network, logins",
}
LEVELS = ("UserError", *TITLES)


@dataclass(frozen=True)
class Entry:
    """One error as the code says it; what it fills in at run time is a gap."""

    kind: str
    part: str
    what: str
    why: str
    fix: str


def render(page: str) -> str:
    """The hand-written opening of the page, and the index below it."""
    opening = page.split(BEGIN)[0] if BEGIN in page else page
    return f"{opening}{BEGIN}\n\n{index()}"


def index() -> str:
    lines = []
    found = entries()
    for kind, title in TITLES.items():
        lines += [f"## {title}", ""]
        parts = defaultdict(set)
        for entry in found:
            if entry.kind == kind:
                parts[entry.part].add(entry)
        for part in sorted(parts):
            lines += [f"### {part}", ""]
            lines += ["| what it says | why | what to do |", "|---|---|---|"]
            lines += [
                f"| {cell(entry.what)} | {cell(entry.why)} | {cell(entry.fix)} |"
                for entry in sorted(
                    parts[part], key=lambda entry: (entry.what.lower(), entry.what, entry.why, entry.fix)
                )
            ]
            lines.append("")
    return "\n".join(lines)


def entries() -> list[Entry]:
    """Of every place that makes one of `errors.UserError`'s kinds; a text that is made elsewhere is a gap, or its name."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        place = path.relative_to(SOURCE).with_suffix("")
        part = place.parts[0] if len(place.parts) > 1 else place.name
        for scope, call in _calls(tree):
            kind = _name(call.func)
            for what in _texts(_argument(call, 0, "what"), scope):
                why = next(_texts(_argument(call, 1, "why"), scope))
                fix = next(_texts(_argument(call, 2, "fix"), scope))
                found.append(Entry("ConfigError" if kind == "UserError" else kind, part, what, why, fix))
    return found


def _calls(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.Call]]:
    """Each making of an error, with the function (or module) that it stands in."""
    pending: list[tuple[ast.AST, ast.AST]] = [(tree, tree)]
    while pending:
        scope, node = pending.pop()
        if isinstance(node, ast.Call) and _name(node.func) in LEVELS:
            yield scope, node
        inner = node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else scope
        pending += [(inner, child) for child in ast.iter_child_nodes(node)]


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _argument(call: ast.Call, place: int, name: str) -> ast.expr | None:
    if len(call.args) > place and not any(isinstance(word, ast.Starred) for word in call.args[: place + 1]):
        return call.args[place]
    return next((word.value for word in call.keywords if word.arg == name), None)


def _texts(node: ast.expr | None, scope: ast.AST) -> Iterator[str]:
    """The texts that an expression may give: of both branches of a choice, of each assignment to a name."""
    if node is None:
        yield ""
    elif isinstance(node, ast.IfExp):
        yield from _texts(node.body, scope)
        yield from _texts(node.orelse, scope)
    elif isinstance(node, ast.Name) and (values := list(_assigned(node.id, scope))):
        for value in values:
            yield from _texts(value, scope)
    else:
        yield _tidy(_text(node))


def _assigned(name: str, scope: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == name:
                    yield node.value
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    names = [element.id if isinstance(element, ast.Name) else "" for element in target.elts]
                    if name in names:
                        yield node.value.elts[names.index(name)]


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_text(value) for value in values)
        case ast.FormattedValue(value=value):
            return _filled(value)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
    return GAP


def _filled(value: ast.expr) -> str:
    """What stands where the code fills something in: its name, where it has one."""
    match value:
        case ast.Constant() | ast.JoinedStr():
            return _text(value)
        case ast.Name(id=name) | ast.Attribute(attr=name) if len(name) > 2:
            return f"‹{name.strip('_').replace('_', ' ')}›"
    return GAP


def _tidy(text: str) -> str:
    return re.sub(rf"{GAP}(\s*{GAP})+", GAP, text.split("\n")[0]).strip()
