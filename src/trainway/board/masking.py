"""Text from disk as the page may show it: secrets masked, control characters made visible."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from trainway.masking import MASK, secret_values
from trainway.report.html import plain

_SECRET = r"(?:token|secret|password|passwd|passphrase|api_?key|access_?key|credentials?|authorization)"
_ASSIGNED = re.compile(
    rf"""(?i)(?<![\w.\-])([\w.\-]*{_SECRET}["']?\s?=\s?["']?)(?!\*\*\*)([^\s"',;&]{{6,}})"""
)
_SETTING = re.compile(rf"(?i)(^|[._-]){_SECRET}$")
_NOT_SECRET = re.compile(r"(?i)(^|[._-])(pad|bos|eos|unk|sep|cls|mask|special|max|num)_?tokens?$")


class Masker:
    """Knows this process's own secrets, and those of known forms."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._values = secret_values(environ)

    def text(self, value: object) -> str:
        """A log's line, a sample, a name: prose stays as it is."""
        return _ASSIGNED.sub(rf"\1{MASK}", plain(value, self._values))

    def setting(self, key: str, value: object) -> str:
        """A value of the configuration, by its dotted key."""
        if _SETTING.search(key) and not _NOT_SECRET.search(key) and value not in (None, "", False):
            return MASK
        return self.text(value)
