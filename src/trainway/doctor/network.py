"""The network: interfaces between ranks, what NCCL is told, and the way to the Hub."""

from __future__ import annotations

import email.utils
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainway.doctor.findings import Finding, Subject, failure, ok, warning
from trainway.doctor.machine import INFINIBAND, has_infiniband
from trainway.launch.network import (
    INTERFACE_VARIABLES,
    MASTER_VARIABLES,
    OBSOLETE_VARIABLES,
    Interfaces,
    communication_environment,
    doubtful_settings,
    local_interfaces,
)

ASK_S = 8.0
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Answer:
    """What a server answered: its status and clock, or why there is no answer."""

    status: int = 0
    skew_s: float | None = None
    """Seconds that our clock is ahead of the server's."""
    fault: str = ""


def endpoint(environ: Mapping[str, str]) -> str:
    return environ.get("HF_ENDPOINT", "").rstrip("/") or HUB


def ask(url: str, *, timeout_s: float = ASK_S, clock: Callable[[], float] = time.time) -> Answer:
    """Send a HEAD request; proxies of the environment are used. Never fails."""
    if not url.startswith(("http://", "https://")):
        return Answer(fault=f"{url!r} is not an http address")
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "trainway-doctor"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            status, headers = response.status, response.headers
    except urllib.error.HTTPError as error:
        status, headers = error.code, error.headers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return Answer(fault=f"{type(reason).__name__}: {reason}")
    date = email.utils.parsedate_to_datetime(headers["Date"]).timestamp() if headers["Date"] else None
    return Answer(status, None if date is None else clock() - date)


def check_hub(answer: Answer | None, url: str, *, needed: str) -> Iterator[Finding]:
    """answer: None where HF_HUB_OFFLINE forbids to ask; needed: what the run takes from there, if anything."""
    if answer is None:
        yield ok("hub", "HF_HUB_OFFLINE is set: no network was asked, and logins were not tried")
        return
    if answer.status and answer.status < 500:
        yield ok("hub", f"{url} answers")
        return
    why = answer.fault or f"it answers with status {answer.status}"
    fix = "see to the network, HTTPS_PROXY and HF_ENDPOINT; or bring everything here and set HF_HUB_OFFLINE=1"
    if needed:
        yield failure("hub", f"{url} cannot be reached, and the run needs {needed} from there", why, fix)
    else:
        yield warning("hub", f"{url} cannot be reached", why, fix)


def check_variables(
    environ: Mapping[str, str],
    *,
    infiniband: Path = INFINIBAND,
    interfaces: Callable[[], Interfaces] = local_interfaces,
) -> Iterator[Finding]:
    """What the environment tells the communication that is obsolete or wrong here."""
    for name, cure in OBSOLETE_VARIABLES.items():
        if environ.get(name):
            yield warning(
                "obsolete-variable", f"{name} is set", "nothing reads it any more", f"unset {name}; {cure}"
            )
    for note in doubtful_settings(
        _only(environ, "NCCL_IB_DISABLE"), infiniband=infiniband, interfaces=interfaces
    ):
        why = "gradients would go over slow sockets"
        yield warning("infiniband", note.partition(":")[0], why, "unset NCCL_IB_DISABLE")
    if has_infiniband(infiniband) and environ.get("NCCL_IB_DISABLE") != "1":
        yield ok("infiniband", f"InfiniBand: {', '.join(sorted(path.name for path in infiniband.iterdir()))}")
    for name in INTERFACE_VARIABLES:
        for note in doubtful_settings(_only(environ, name), infiniband=infiniband, interfaces=interfaces):
            yield failure(
                "interface",
                note,
                "the processes would not find each other, and wait for engine.timeout_s",
                f"unset {name}: the interface of the route to the first node is found by itself",
            )


def check_route(
    environ: Mapping[str, str],
    *,
    resolve: Callable[[str], object] = lambda host: socket.getaddrinfo(host, None),
) -> Iterator[Finding]:
    """Whether the first node of a run over several can be found, and over which interface."""
    master = next((environ[name] for name in MASTER_VARIABLES if environ.get(name)), None)
    if master is None:
        return
    try:
        resolve(master)
    except OSError as error:
        yield failure(
            "first-node",
            f"the first node {master} is unknown here",
            str(error),
            "correct MASTER_ADDR; in Kubernetes the headless Service needs publishNotReadyAddresses: true",
        )
        return
    told = communication_environment(environ, master=master)
    over = told.get("GLOO_SOCKET_IFNAME") or environ.get("GLOO_SOCKET_IFNAME") or "an unknown interface"
    yield ok("first-node", f"{master} is reached over {over}")


def check_network(subject: Subject, answer: Answer | None, needed: str) -> Iterator[Finding]:
    yield from check_hub(answer, endpoint(subject.environ), needed=needed)
    yield from check_variables(subject.environ)
    yield from check_route(subject.environ)


def _only(environ: Mapping[str, str], name: str) -> dict[str, str]:
    return {name: environ[name]} if name in environ else {}
