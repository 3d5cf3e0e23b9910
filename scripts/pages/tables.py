"""Tables of settings out of a JSON schema."""

from __future__ import annotations

from typing import Any

HEAD = "| key | default | meaning |\n|---|---|---|"


def row(key: str, default: str, value: dict[str, Any]) -> str:
    return f"| `{key}` | {default} | {meaning(value)} |"


def default_of(value: dict[str, Any]) -> str:
    """As it is written in a configuration; empty where nothing is set."""
    default = value.get("default")
    if default in (None, "", [], {}) and default is not False:
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def meaning(value: dict[str, Any]) -> str:
    """The setting's own words, and what it may be."""
    choices = value.get("enum") or value.get("items", {}).get("enum") or []
    allowed = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
    return cell(str(value.get("description", ""))) + allowed


def cell(text: str) -> str:
    """One line that no table breaks on."""
    return " ".join(text.replace("|", "\\|").split())
