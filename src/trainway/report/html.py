"""Writing HTML that nobody's names, samples or settings can break out of: escaped text, embedded data, the page's policy."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from trainway.masking import hide_secrets, secret_values

STATIC = ("uPlot.iife.min.js", "charts.js", "uPlot.min.css", "style.css")
"""What every page with charts holds, in this order: scripts, then styles."""
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
# controls and what turns the direction of writing: a terminal's and an editor's trap, and invisible on a page
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def static_text(name: str) -> str:
    """One of the files of `static/`."""
    return resources.files("trainway.report").joinpath("static", name).read_text(encoding="utf-8")


def plain(value: object, secrets: Iterable[str] | None = None) -> str:
    """A value as text for people: secrets masked (None: this process's), control characters shown as `\\ufffd`."""
    return _CONTROLS.sub("\ufffd", hide_secrets(str(value), secrets).replace("\r\n", "\n"))


def json_for_page(value: Any) -> str:
    """JSON that may stand in a `<script type="application/json">`: no tag begins or ends in it; NaN and infinities are
    null, secrets in its strings are masked."""
    found = json.dumps(
        _clean(value, secret_values()), ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )
    return re.sub("[<>&\u2028\u2029]", lambda match: _UNSAFE[match[0]], found)


def render(template: str, **values: Any) -> str:
    """A file of `templates/` with its values as text; only what is `Markup` already goes in as it is.

    Raises jinja2.UndefinedError for a value that the template wants and does not get.
    """
    from jinja2 import Environment, StrictUndefined

    secrets = secret_values()
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if hasattr(value, "__html__") else plain(value, secrets),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source = resources.files("trainway.report").joinpath("templates", template).read_text(encoding="utf-8")
    return environment.from_string(source).render(**values)


def content_policy(scripts: Iterable[str], styles: Iterable[str]) -> str:
    """The Content-Security-Policy of a page that holds exactly these inline scripts and styles, and loads nothing."""
    script, style = " ".join(map(_source, scripts)), " ".join(map(_source, styles))
    return (
        f"default-src 'none'; script-src {script or chr(39) + 'none' + chr(39)}; "
        f"style-src {style or chr(39) + 'none' + chr(39)}; img-src data:; base-uri 'none'; form-action 'none'"
    )


def _source(inline: str) -> str:
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _clean(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {plain(key, secrets): _clean(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item, secrets) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return plain(value, secrets) if isinstance(value, str) else value
