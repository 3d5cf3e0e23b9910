"""A pod's log from the API: every line once and in order, however often the connection is cut."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from queue import Queue
from threading import Thread
from unicodedata import category

import httpx
from pydantic import ValidationError

from trainway.errors import UserError
from trainway.jobs.runpod.api import Api, Lost, Refused
from trainway.jobs.runpod.models import LogLine, Pod

MOST_TAIL = 5000
"""Lines that the API goes back, at most; with a time to begin at, it goes back to that."""
IDLE_S = 3.0
"""A log that says nothing for so long has said all that there is so far: the stream itself has no such mark."""
SILENCE_S = 60.0
"""When a followed stream is made again, so that a connection that died without a word is noticed."""
ATTEMPTS = 8
"""Connections in a row that bring no line."""


@dataclass
class _Cursor:
    """What has come last, so that a new connection goes on right there.

    Events with one id are one moment, and a connection may be cut within it. So the stream is resumed after the moment
    before, and what had come of the last is counted and passed over; whether the server repeats the moment that it is
    told makes no difference.
    """

    before: str | None = None
    last: str | None = None
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Events of those two moments, by id and content."""
    again: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Those that this connection has not repeated yet."""
    is_open: bool = False
    """Whether this connection has been answered: silence before that is no end of a log."""

    @property
    def resume(self) -> str | None:
        return self.before or self.last

    def connected(self) -> None:
        self.again, self.is_open = self.seen.copy(), False

    def is_new(self, event_id: str, data: str) -> bool:
        """Take note of an event; False for one that came before."""
        if self.again[event_id, data] > 0:
            self.again[event_id, data] -= 1
            return False
        if event_id != self.last:
            kept = {key: count for key, count in self.seen.items() if key[0] == self.last}
            self.before, self.last, self.seen = self.last, event_id, Counter(kept)
        self.seen[event_id, data] += 1
        return True


def pod_log(
    api: Api, pod: Pod, *, follow: bool, tail: int | None, source: str = "container"
) -> Iterator[LogLine]:
    """The lines of one pod, from its last `tail` ones or from its first on; with `follow` until the pod has ended.

    Raises Refused, or Lost when the log cannot be had any more.
    """
    asked = {"source": source}
    if tail is None or tail > MOST_TAIL:
        asked["since"] = pod.created_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    else:
        asked["tail"] = str(tail)
    cursor = _Cursor()
    failures = 0
    while True:
        came = False
        fault: UserError | None = None
        try:
            patience_s = SILENCE_S if follow else IDLE_S * (1 + failures)
            for line in _connection(api, pod.id, asked, cursor, patience_s):
                came = True
                yield line
            is_cut = False
        except httpx.ReadTimeout as error:
            is_cut, fault = not cursor.is_open, _cut(error)
            if not follow and cursor.is_open:
                return
        except httpx.RequestError as error:
            is_cut, fault = True, _cut(error)
        except Lost as lost:
            is_cut, fault = True, lost
        except Refused as refused:
            if refused.status == 404 and _has_ended(api, pod.id):  # gone while it was read
                return
            if refused.status not in (404, 429):  # 404 of a pod that is there: its log is not yet
                raise
            is_cut, fault = True, refused
        if not is_cut and not follow:
            return
        if not is_cut and _has_ended(api, pod.id):
            # what it said between the last line and its end
            if cursor.last is not None:
                yield from _rest(api, pod.id, asked, cursor)
            return
        failures = 0 if came else failures + is_cut
        if failures >= ATTEMPTS and fault is not None:
            raise fault
        api.clock.sleep(api.clock.backoff(max(failures, 1)))


def pod_lines(api: Api, pod: Pod, *, follow: bool, tail: int | None) -> Iterator[str]:
    """As `pod_log`, fit for a terminal: no control bytes."""
    for found in pod_log(api, pod, follow=follow, tail=tail):
        yield _readable(found.line)


def cluster_log(api: Api, pods: Sequence[Pod], *, follow: bool, tail: int | None) -> Iterator[str]:
    """The lines of all nodes, each with its node's number; as they come, when they are followed."""
    if not follow:
        for number, pod in enumerate(pods):
            for line in pod_lines(api, pod, follow=False, tail=tail):
                yield f"[node {number}] {line}"
        return
    # each node's stream blocks; the daemons end with the program when the reader leaves first
    news: Queue[str | UserError | None] = Queue(maxsize=1000)

    def read(number: int, pod: Pod) -> None:
        try:
            for line in pod_lines(api, pod, follow=True, tail=tail):
                news.put(f"[node {number}] {line}")
            news.put(None)
        except UserError as error:
            news.put(error)

    for number, pod in enumerate(pods):
        Thread(target=read, args=(number, pod), daemon=True).start()
    open_streams = len(pods)
    while open_streams:
        item = news.get()
        if isinstance(item, UserError):
            raise item
        if item is None:
            open_streams -= 1
        else:
            yield item


def _connection(
    api: Api, pod_id: str, asked: dict[str, str], cursor: _Cursor, timeout_s: float
) -> Iterator[LogLine]:
    cursor.connected()
    # within the first moment there is none before it: all from the start again, and what has come is passed over
    last_id = cursor.before if "since" in asked else cursor.resume
    params = asked if last_id is None else {"source": asked["source"]}
    with api.log_stream(pod_id, params, last_id, timeout_s) as chunks:
        cursor.is_open = True
        for event_id, data in _events(_lines(chunks)):
            found = _parse(data)
            if found is not None and cursor.is_new(event_id or found.ts, data):
                yield found


def _rest(api: Api, pod_id: str, asked: dict[str, str], cursor: _Cursor) -> Iterator[LogLine]:
    try:
        yield from _connection(api, pod_id, asked, cursor, IDLE_S)
    except (httpx.RequestError, Refused, Lost):
        return  # the log goes with its pod


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Lines that end with \\n or \\r\\n: str.splitlines would cut a message at U+2028 too."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode("utf-8", "replace")
    if rest:
        yield rest.removesuffix(b"\r").decode("utf-8", "replace")


def _events(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """(id, data) of each event of a stream in the form of WHATWG's Server-Sent Events."""
    event_id, data = "", list[str]()
    for line in lines:
        if not line:
            if data:
                yield event_id, "\n".join(data)
            data = []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name == "id" and "\0" not in value:
            event_id = value
    if data:  # the end of the stream ends an event whose data is whole; `_parse` passes over one that is not
        yield event_id, "\n".join(data)


def _parse(data: str) -> LogLine | None:
    try:
        return LogLine.model_validate(json.loads(data))
    except (ValueError, ValidationError, RecursionError):
        return None


def _readable(line: str) -> str:
    # a progress bar draws over itself: its last state stands
    last = line.rstrip("\r\n").rpartition("\r")[2]
    return "".join(letter for letter in last if letter == "\t" or category(letter) != "Cc")


def _has_ended(api: Api, pod_id: str) -> bool:
    pod = api.find_pod(pod_id)
    return pod is None or pod.status in ("EXITED", "ERROR", "TERMINATED")


def _cut(error: httpx.RequestError) -> Lost:
    return Lost(
        "the log of the pod breaks off",
        type(error).__name__,
        "check the network, then start the command again",
    )
