"""A file of lines that grows: its newest part at first, then what is appended, and anew when it is another file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from trainway.board.place import Place, Signature, signature

MOST_BYTES = 1 << 20
"""Read at once. Where more was appended since the last look, the newest part is read again instead."""
_SEAM = 128


class Tail:
    """Reads whole lines; a last one without its end waits for the next look."""

    def __init__(self, place: Place, path: Path, first_bytes: int) -> None:
        """`first_bytes`: how much of what is there already is read."""
        self._place, self._path, self._first = place, path, first_bytes
        self.seen: Signature | None = None
        """Of the file as it was read last; None while there is none."""
        self._forget()

    def _forget(self) -> None:
        self._at, self._seam, self._inside = 0, b"", False

    @property
    def changed(self) -> float:
        """When the file was last written, in seconds since 1970; 0 without a file."""
        return self.seen[2] / 1e9 if self.seen else 0.0

    def read(self) -> tuple[list[bytes], bool]:
        """(new whole lines, whether they begin anew: what was read before stands no longer in the file)."""
        now = signature(self._path)
        if now == self.seen:
            return [], False
        anew = self.seen is None
        try:
            with self._place.open(self._path) as file:
                status = os.fstat(file.fileno())
                if not anew and not self._goes_on(file, status):
                    anew = True
                if anew or status.st_size - self._at > MOST_BYTES:
                    anew = True
                    self._begin(status.st_size)
                self.seen = (status.st_ino, status.st_size, status.st_mtime_ns)
                return self._lines(file), anew
        except OSError:
            anew = self.seen is not None
            self.seen = None
            self._forget()
            return [], anew

    def _goes_on(self, file: BinaryIO, status: os.stat_result) -> bool:
        assert self.seen is not None
        if status.st_ino != self.seen[0] or status.st_size < self._at:
            return False
        file.seek(self._at - len(self._seam))
        return file.read(len(self._seam)) == self._seam

    def _begin(self, size: int) -> None:
        self._at = max(0, size - self._first)
        self._inside = self._at > 0  # probably within a line, of which the rest says nothing
        self._seam = b""

    def _lines(self, file: BinaryIO) -> list[bytes]:
        file.seek(self._at)
        data = file.read(MOST_BYTES)
        whole, end, torn = data.rpartition(b"\n")
        if not end:
            if len(data) == MOST_BYTES or (
                self._inside and data
            ):  # a line without an end in sight is passed over
                self._at, self._inside = self._at + len(data), True
                self._seam = data[-_SEAM:]
            return []
        self._at += len(data) - len(torn)
        self._seam = (whole + end)[-_SEAM:]
        lines = whole.split(b"\n")
        if self._inside:
            del lines[0]
            self._inside = False
        return lines
