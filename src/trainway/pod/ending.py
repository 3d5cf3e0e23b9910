"""The end of the machine: by its own exit, by a command of the user's, or by RunPod's API, asked until it agrees."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainway.planning.prices import API, API_VARIABLE
from trainway.planning.prices import KEY_VARIABLE as KEY

Action = Literal["terminate", "stop", "keep"]

POD, CLUSTER = "RUNPOD_POD_ID", "RUNPOD_CLUSTER_ID"
TIMEOUT_S = 30.0
COMMAND_S = 300.0
LONGEST_WAIT_S = 300.0
GONE = 404
REFUSED = (400, 401, 403, 405, 409, 422)
"""Answers after which another way of ending the same machine is tried at once."""


@dataclass(frozen=True)
class Answer:
    """What came of one attempt."""

    ended: bool
    what: str
    """In words, without secrets."""
    wait_s: float | None = None
    """How long the server wants to be left alone."""
    refused: bool = False
    """Whether asking the same again is in vain."""
    gone: bool = False
    """Whether the server knows no such machine."""


def keep_asking(
    attempt: Callable[[], Answer],
    say: Callable[[str], None],
    wait: Callable[[float], bool],
    first_wait_s: float,
) -> bool:
    """Attempt until the machine has agreed to end, ever more slowly, and say each failure; False when interrupted.

    wait: sleeps for so many seconds; True means that this process itself is to end.
    """
    pause, tries = first_wait_s, 0
    while True:
        tries += 1
        try:
            answer = attempt()
        except Exception as error:  # whatever it is: who does not ask again leaves the machine costing
            answer = Answer(False, f"failed: {type(error).__name__}")
        if answer.ended:
            say(answer.what)
            return True
        pause_now = max(pause, answer.wait_s or 0.0)
        say(
            f"the machine is NOT ended and goes on costing (attempt {tries}): {answer.what}; again in {pause_now:.3g} s"
        )
        if wait(pause_now):
            return False
        pause = min(2 * pause, max(LONGEST_WAIT_S, first_wait_s))


def run_end_command(command: tuple[str, ...], environ: Mapping[str, str]) -> Answer:
    """The user's own way to end the machine; exit code 0 means that it will."""
    try:
        done = subprocess.run(
            command, env=dict(environ), stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Answer(False, f"{command[0]}: {getattr(error, 'strerror', None) or 'no end within 300 s'}")
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        return Answer(False, f"{command[0]} ended with exit code {done.returncode}: {''.join(said)[:200]}")
    return Answer(True, f"{command[0]} has ended the machine")


def ask_runpod(action: Action, environ: Mapping[str, str] = os.environ) -> Answer:
    """Ask RunPod's API v2 once to stop or terminate this pod, or to delete the cluster that it belongs to."""
    key, pod, cluster = (environ.get(name, "") for name in (KEY, POD, CLUSTER))
    missing = [name for name, value in ((KEY, key), (POD, pod or cluster)) if not value]
    base = (environ.get(API_VARIABLE) or API).rstrip("/")
    if missing:
        return Answer(False, f"{' and '.join(missing)} not set: RunPod cannot be asked")
    if not (key.isascii() and key.isprintable()):
        return Answer(False, f"{KEY} cannot be sent: it holds a character that no header may have")
    if not _is_safe(base):
        return Answer(
            False, f"{API_VARIABLE} is neither https nor on this machine: the key is not sent there"
        )
    if cluster:
        return _ask("DELETE", f"{base}/clusters/{urllib.parse.quote(cluster, safe='')}", key, None)
    place = f"{base}/pods/{urllib.parse.quote(pod, safe='')}"
    answer = _ask("POST", f"{place}/action", key, {"action": action})
    if action != "terminate" or not (answer.refused or answer.gone):
        return answer
    second = _ask("DELETE", place, key, None)  # we are still here, whatever the first one says
    return (
        second
        if second.ended or answer.gone
        else Answer(False, f"{answer.what}; then {second.what}", second.wait_s)
    )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _ask(method: str, url: str, key: str, body: dict[str, str] | None) -> Answer:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", "User-Agent": "trainway"}
    data = None if body is None else json.dumps(body).encode()
    words = f"{method} {urllib.parse.urlsplit(url).path}"
    try:
        request = urllib.request.Request(url, data=data, headers=headers, method=method)
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S) as response:
            return Answer(True, f"RunPod has agreed: {words} {response.status}")
    except urllib.error.HTTPError as error:
        with error:
            if error.code == GONE:
                what = f"RunPod says that the machine is gone: {words} {error.code}"
                return Answer(True, what, gone=True)
            refused = error.code in REFUSED
            what = f"{'refused' if refused else 'failed'}: {words} {error.code} {_detail(error)}".rstrip()
            return Answer(False, what, _retry_after(error), refused)
    except Exception as error:  # the network has many ways to fail, and none may keep this from asking again
        return Answer(False, f"failed: {words} {getattr(error, 'reason', None) or type(error).__name__}")


def _detail(error: urllib.error.HTTPError) -> str:
    """The server's own words, of RFC 9457's `detail` or `title`."""
    try:
        said = json.loads(error.read(1 << 16))
    except Exception:  # cut, endless, nested a thousand times: the status has said what counts
        return ""
    text = (said.get("detail") or said.get("title") or "") if isinstance(said, dict) else ""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())[:200]


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    text = error.headers.get("Retry-After", "")
    return min(float(text), LONGEST_WAIT_S) if text.isascii() and text.isdigit() else None


def _is_safe(base: str) -> bool:
    parts = urllib.parse.urlsplit(base)
    return parts.scheme == "https" or (
        parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1")
    )
