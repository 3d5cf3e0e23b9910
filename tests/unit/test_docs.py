"""The documentation: made from the code where it repeats it, whole in its links, true in its commands, and without the network."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer

from trainway.cli.app import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
PROGRAM = typer.main.get_command(app)


def test_pages_that_repeat_the_code_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts/references.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_error_is_in_the_index_of_troubleshooting() -> None:
    """Counted by another way than the page is made: no place of the code that makes an error is passed over."""
    page = (DOCS / "troubleshooting.md").read_text()
    for path in sorted((ROOT / "src/trainway").rglob("*.py")):
        for text in literal_openings(path):
            assert text.replace("|", "\\|") in page, f"{path.name}: {text}"
    assert page.count("\n| ") > 500


def literal_openings(path: Path) -> Iterator[str]:
    """The first words of errors whose first argument begins with plain text."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
            continue
        if node.func.id in ("ConfigError", "DataError", "EnvironmentFault", "UserError"):
            first = node.args[0]
            opening = first.values[0] if isinstance(first, ast.JoinedStr) and first.values else first
            if isinstance(opening, ast.Constant) and isinstance(opening.value, str):
                yield " ".join(opening.value.split("\n")[0].split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), f"{page.name} links {target}"
        if anchor:
            assert anchor in anchors(place.read_text()), f"{page.name} links {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_of_this_program(page: Path) -> None:
    """Every `trainway` line of a code block names verbs and options that there are."""
    for line in commands(page.read_text()):
        verb, options = parsed(line)
        assert verb is not None, f"{page.name}: {line}"
        known = {
            option for parameter in verb.params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        if verb.context_settings.get("ignore_unknown_options"):
            continue  # settings may stand there as options
        unknown = options - known - {"--help", "-h", "--debug"}
        assert not unknown, f"{page.name}: {line}: {unknown}"


def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")]
    environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == 0, done.stderr
    built = list((tmp_path / "site").rglob("*.html"))
    assert len(built) >= len(list(DOCS.glob("*.md")))
    for path in built:
        fetched = Fetched()
        fetched.feed(path.read_text())
        assert [url for url in fetched.urls if "//" in url] == [], path


class Fetched(HTMLParser):
    """What a browser loads by itself with a page."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.urls.append(told.get("src") or "")
        if tag == "link" and (told.get("rel") or "") in ("stylesheet", "icon", "preload", "preconnect"):
            self.urls.append(told.get("href") or "")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.S))


def anchors(text: str) -> set[str]:
    """Of the page's headings, as Python-Markdown and GitHub make them of plain words."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


def commands(text: str) -> Iterator[str]:
    for block in re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, flags=re.S | re.M):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            command = line.strip().removeprefix("$ ")
            if re.match(r"trainway(\s|$)", command):
                yield command


def parsed(line: str) -> tuple[typer.core.TyperCommand | None, set[str]]:
    """The verb of a command line, and the options that it names."""
    words = shlex.split(line, comments=True)[1:]
    for end in ("|", ">", "&", "&&", "--"):
        if end in words:
            words = words[: words.index(end)]
    verb = PROGRAM
    while getattr(verb, "commands", None) and words and not words[0].startswith("-"):
        named = words[0] in verb.commands
        verb = verb.commands.get(words[0] if named else "list")  # `runs DIR` lists
        words = words[named:]
        if verb is None:
            return None, set()
    options = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    return verb, options
