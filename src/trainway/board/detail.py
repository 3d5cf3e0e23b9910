"""One run's own page: what it was asked to do, what it has saved and said, and the end of its log."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from trainway.board.masking import Masker
from trainway.board.place import Place, signature
from trainway.board.runs import RunWatch
from trainway.checkpoint.store import CheckpointStore
from trainway.errors import UserError
from trainway.masking import mask_secrets

SAMPLES_BYTES = 256 << 10
MOST_SAMPLES = 60
SAMPLE_CHARS = 6000
LOG_BYTES = 64 << 10
"""Of a log at once, and of what is there when a page begins to follow it."""
LINE_CHARS = 4000
_SAMPLE_TEXTS = ("prompt", "text", "reference", "teacher", "student")


class Details:
    """Puts together what the page of one run shows beside its charts."""

    def __init__(self, place: Place, masker: Masker) -> None:
        self._place, self._masker = place, masker

    def describe(self, run: RunWatch, since: str = "") -> tuple[str, dict[str, Any] | None]:
        """(token, all of it); None in its place while the token is still `since`."""
        token = self._token(run)
        if token == since:
            return token, None
        return token, {
            "description": run.settings.description,
            "problem": run.settings.problem,
            "settings": run.settings.flat,
            "origin": self._origin(run),
            "checkpoints": self._checkpoints(run),
            "samples": self._samples(run.run.samples),
            "warnings": run.warnings_json(),
        }

    def log(self, run: RunWatch, since: str = "") -> tuple[str, dict[str, Any] | None]:
        """(token, {lines, anew}): the whole lines after those of the token `since`; None while there are none.

        `anew`: what the page has is no longer what comes before them.
        """
        inode, _, offset = since.partition(".")
        try:
            with self._place.open(run.run.log) as file:
                status = os.fstat(file.fileno())
                own, size = f"{status.st_ino:x}", status.st_size
                goes_on = inode == own and offset.isascii() and offset.isdigit() and len(offset) < 16
                at = int(offset) if goes_on else -1
                if at < 0 or at > size:
                    goes_on, at = False, max(0, size - LOG_BYTES)
                file.seek(at)
                data = file.read(LOG_BYTES)
        except OSError:
            return "none.0", None if since == "none.0" else {"lines": [], "anew": True}
        whole, end, torn = data.rpartition(b"\n")
        if not end and len(data) == LOG_BYTES:
            lines, read = ["... a line too long to show"], len(data)
        else:
            lines = self._lines(whole, torn_start=not goes_on and at > 0) if end else []
            read = len(data) - len(torn)
        token = f"{own}.{at + read}"
        if goes_on and not read:
            return token, None
        return token, {"lines": lines, "anew": not goes_on}

    def _lines(self, whole: bytes, *, torn_start: bool) -> list[str]:
        lines = whole.decode("utf-8", "replace").split("\n")
        return [self._masker.text(line[:LINE_CHARS]) for line in (lines[1:] if torn_start else lines)]

    def _token(self, run: RunWatch) -> str:
        files = (run.run.config, run.run.provenance, run.run.samples, run.run.report)
        try:
            folder = os.lstat(run.run.checkpoints)
            saved: tuple[int, ...] = (folder.st_ino, folder.st_mtime_ns)
        except OSError:
            saved = ()
        seen = [*(signature(path) for path in files), saved, run.warned, bool(run.settings.flat)]
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]

    def _origin(self, run: RunWatch) -> dict[str, str]:
        found = run.provenance()
        versions, git, cpu = (found.get(name) for name in ("versions", "git", "cpu"))
        argv = found.get("argv")
        words = [str(word) for word in argv] if isinstance(argv, list) else []
        commits = {
            f"commit of {name}": f"{str(state.get('commit'))[:12]}{' with changes' if state.get('dirty') else ''}"
            for name, state in (git.items() if isinstance(git, dict) else ())
            if isinstance(state, dict)
        }
        shown = {
            "started": found.get("started"),
            "command": " ".join(mask_secrets(words)),
            "machine": found.get("hostname"),
            "processor": cpu.get("model") if isinstance(cpu, dict) else None,
            "GPU": run.row.get("device"),
            **commits,
            **(versions if isinstance(versions, dict) else {}),
            "configuration": found.get("config_hash"),
            "data": found.get("data_hash"),
        }
        return {
            self._masker.text(key): self._masker.text(value)[:2000] for key, value in shown.items() if value
        }

    def _checkpoints(self, run: RunWatch) -> list[dict[str, Any]]:
        if not self._place.is_reached(run.run.checkpoints):
            return []
        try:
            found = CheckpointStore(run.run.checkpoints, keep_last=1).describe()
        except (UserError, OSError):
            return []
        return [
            {
                "step": info.step,
                "bytes": info.size_bytes,
                "latest": info.is_latest,
                "best": info.is_best,
                "intact": info.info is not None,
            }
            for info in reversed(found)
        ]

    def _samples(self, path: Path) -> list[dict[str, Any]]:
        """The newest first."""
        try:
            with self._place.open(path) as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, size - SAMPLES_BYTES))
                lines = file.read(SAMPLES_BYTES).split(b"\n")
        except OSError:
            return []
        found: list[dict[str, Any]] = []
        for line in reversed(lines):
            if len(found) == MOST_SAMPLES:
                break
            if sample := self._sample(line):
                found.append(sample)
        return found

    def _sample(self, line: bytes) -> dict[str, Any] | None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return None  # cut off, or only half within what was read
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            return None
        texts = {
            name: self._masker.text(record[name])[:SAMPLE_CHARS]
            for name in _SAMPLE_TEXTS
            if isinstance(record.get(name), str)
        }
        scores = {
            name: round(float(record[name]), 4)
            for name in ("score", "teacher_score")
            if type(record.get(name)) is float and abs(record[name]) < 1e15
        }
        if "prompt" not in texts or not 0 <= record["step"] < 1 << 53:
            return None
        return {"step": record["step"], **texts, **scores, "truncated": record.get("truncated") is True}
