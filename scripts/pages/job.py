"""docs/job.md: every key of a job file, from its form."""

from __future__ import annotations

from typing import Any

from pages.tables import HEAD, default_of, row
from trainway.jobs.spec import JobSpec

OPENING = """# The job file

This page is made from the form of a job by `python scripts/references.py`. What to use it for is in [launch.md](launch.md).

A job file is YAML or TOML. `KEY=VALUE` words on the command line stand above it: `trainway up job.yaml limits.hours=2`.
An unknown or misspelt key is an error that names the nearest; so is a section of another target than the job's. Paths of
`config`, `upload` and `source` are seen from the job file, all others from the volume's root.
"""


def render(page: str = "") -> str:
    schema = JobSpec.model_json_schema()
    parts = [OPENING, *_table(schema, "", "The job", schema)]
    for name, value in schema["properties"].items():
        section = _section(schema, value)
        if section is not None:
            entry = f"{name}[]" if value.get("type") == "array" else name
            parts += _table(schema, f"{entry}.", entry, section)
    return "\n".join(parts) + "\n"


def _table(schema: dict[str, Any], prefix: str, title: str, section: dict[str, Any]) -> list[str]:
    about = section.get("description", "").splitlines()
    lines = [
        f"\n## {title}\n",
        f"{about[0] if about else ''}\n",
        HEAD,
    ]
    required = set(section.get("required", ()))
    for key, value in section["properties"].items():
        inner = _section(schema, value)
        default = "required" if key in required else default_of(value)
        if inner is not None and (prefix or value.get("type") == "array") and value.get("type") != "array":
            lines += _rows(inner, f"{prefix}{key}.")
        elif inner is None or value.get("type") == "array":
            lines.append(row(f"{prefix}{key}", default, value))
    return lines


def _rows(section: dict[str, Any], prefix: str) -> list[str]:
    required = set(section.get("required", ()))
    return [
        row(f"{prefix}{key}", "required" if key in required else default_of(value), value)
        for key, value in section["properties"].items()
    ]


def _section(schema: dict[str, Any], value: dict[str, Any]) -> dict[str, Any] | None:
    reference = value.get("$ref") or value.get("items", {}).get("$ref")
    if reference is None:
        return None
    found: dict[str, Any] = schema["$defs"][reference.rsplit("/", 1)[1]]
    return found if "properties" in found else None
