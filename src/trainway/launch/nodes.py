"""The nodes of a run: how many, which one this is, and where they meet, from torchrun's words or the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trainway.config.schema import EngineConfig
from trainway.errors import ConfigError
from trainway.launch.network import MASTER_VARIABLES, own_addresses, source_address

NODES = ("NUM_NODES", "PET_NNODES")
NODE_RANK = ("NODE_RANK", "JOB_COMPLETION_INDEX", "PET_NODE_RANK")
"""The rank of this node: Instant Clusters, an Indexed Job of Kubernetes, torchrun's own operator."""
MASTER = (*MASTER_VARIABLES, "PET_MASTER_ADDR", "HOST_NODE_ADDR", "PET_RDZV_ENDPOINT")
MASTER_PORT = ("MASTER_PORT", "PRIMARY_PORT", "PET_MASTER_PORT")
DEFAULT_PORT = 29500

_MEETING = ("rdzv-endpoint", "master-addr")


@dataclass(frozen=True)
class Meeting:
    """How the nodes of this run find each other."""

    nodes: int
    master: str | None
    """Host of the first node; None on one node."""
    arguments: tuple[str, ...]
    """What torchrun is told, besides what the user tells it."""


ALONE = Meeting(1, None, ("--standalone",))


def plan_meeting(
    torchrun_args: Sequence[str],
    nproc: int,
    engine: EngineConfig,
    environ: Mapping[str, str] = os.environ,
) -> Meeting:
    """Complete the user's torchrun arguments from the environment that Kubernetes or a cluster sets.

    A node that knows its rank meets the others at the first node under that rank; one that does not takes part in
    torchrun's c10d rendezvous, which gives out the ranks. Waiting for the others ends after engine.timeout_s.

    Raises:
        ConfigError: no host to meet at, or two statements that contradict each other.
    """
    given = torchrun_options(torchrun_args)
    nodes = _node_count(given, nproc, environ)
    _check(nodes, nproc, engine, environ)
    if nodes == 1 and not set(given) & set(_MEETING):
        return replace(ALONE, arguments=()) if "standalone" in given else ALONE
    rank = _node_rank(given, nodes, environ)
    host, port = _master(given, nodes, environ)
    words = {} if "nnodes" in given else {"nnodes": f"{nodes}"}
    backend = given.get("rdzv-backend") or ("c10d" if rank is None else "static")
    words["rdzv-backend"] = backend
    if "rdzv-endpoint" not in given and not (backend == "static" and "master-addr" in given):
        words["rdzv-endpoint"] = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if backend == "static" and rank is not None:
        words["node-rank"] = f"{rank}"
    if "rdzv-conf" not in given:
        words["rdzv-conf"] = _patience(backend, rank, engine.timeout_s)
    if backend == "c10d" and (addresses := own_addresses(environ, host, source_address)):
        # by itself torchrun gives out the host's name, which other containers cannot resolve
        words["local-addr"] = addresses[0]
    fresh = [f"--{name}={value}" for name, value in words.items() if name not in given]
    return Meeting(nodes, host, tuple(fresh))


def torchrun_options(words: Sequence[str]) -> dict[str, str]:
    """torchrun's options by name with dashes; a switch has the value ''."""
    found: dict[str, str] = {}
    for number, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            follows = words[number + 1] if number + 1 < len(words) else "--"
            found[name.replace("_", "-")] = value if equals else "" if follows.startswith("--") else follows
    return found


def _node_count(given: Mapping[str, str], nproc: int, environ: Mapping[str, str]) -> int:
    if "nnodes" in given:
        # torchrun's MIN:MAX
        return _number("--nnodes", given["nnodes"].partition(":")[2] or given["nnodes"], least=1)
    if set(given) & set(_MEETING) or "standalone" in given:
        return 1  # torchrun's own default
    name, value = _first(NODES, environ)
    if value:
        return _number(name, value.partition(":")[2] or value, least=1)
    world_size = environ.get("WORLD_SIZE", "")
    if not world_size or not _first(MASTER, environ)[1]:
        return 1
    total = _number("WORLD_SIZE", world_size, least=1)
    if total % nproc:
        raise ConfigError(
            f"WORLD_SIZE is {total}, and {nproc} processes are to start on each node",
            "that is no whole number of nodes",
            "set NUM_NODES and NODE_RANK, or --nproc, or unset WORLD_SIZE",
        )
    return total // nproc


def _check(nodes: int, nproc: int, engine: EngineConfig, environ: Mapping[str, str]) -> None:
    if nodes == 1:
        return
    if engine.name == "single":
        raise ConfigError(
            f"engine.name is single, but the run has {nodes} nodes",
            "each of them would train the same model",
            "set engine.name=ddp, or start it on one node",
        )
    told = environ.get("NUM_TRAINERS")
    if told and _number("NUM_TRAINERS", told, least=1) != nproc:
        raise ConfigError(
            f"NUM_TRAINERS is {told}, but {nproc} processes are to start on this node",
            "the nodes would not agree on the number of ranks",
            f"set --nproc {told}, or unset NUM_TRAINERS on every node",
        )
    total = environ.get("WORLD_SIZE")
    if total and environ.get("NUM_NODES") and _number("WORLD_SIZE", total, least=1) != nodes * nproc:
        raise ConfigError(
            f"WORLD_SIZE is {total}, but {nodes} nodes of {nproc} processes are {nodes * nproc}",
            "two statements about the same number",
            "correct NUM_NODES, --nproc or WORLD_SIZE",
        )


def _node_rank(given: Mapping[str, str], nodes: int, environ: Mapping[str, str]) -> int | None:
    if "node-rank" in given:
        name, rank = "--node-rank", _number("--node-rank", given["node-rank"])
    else:
        ranks = {name: _number(name, environ[name]) for name in NODE_RANK if environ.get(name)}
        if len(set(ranks.values())) > 1:
            said = ", ".join(f"{name}={rank}" for name, rank in ranks.items())
            raise ConfigError(f"this node has two ranks: {said}", "", "unset the one that is wrong")
        if not ranks:
            return None
        name, rank = next(iter(ranks.items()))
    if rank >= nodes:
        raise ConfigError(
            f"{name} is {rank}, but the run has {nodes} node{'s' if nodes > 1 else ''}",
            f"the ranks of the nodes go from 0 to {nodes - 1}",
            "correct it, or the number of nodes",
        )
    return rank


def _master(given: Mapping[str, str], nodes: int, environ: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of the first node."""
    said = given.get("rdzv-endpoint") or given.get("master-addr")
    name, found = _first(MASTER, environ)
    endpoint = said or found
    if not endpoint:
        raise ConfigError(
            f"the run has {nodes} nodes and no place to meet",
            "neither --rdzv-endpoint nor MASTER_ADDR is given",
            "set MASTER_ADDR to the address of node 0, the same on every node",
        )
    host, port = _split(endpoint)
    if port is None:
        name, number = (
            ("--master-port", given.get("master-port", "")) if said else _first(MASTER_PORT, environ)
        )
        port = _number(name, number, least=1) if number else DEFAULT_PORT
    if port > 65535:
        raise ConfigError(f"{name}: the port {port} does not exist", "ports go up to 65535", "correct it")
    return host, port


def _split(endpoint: str) -> tuple[str, int | None]:
    """`host`, `host:port`, `[v6]:port` or a bare IPv6 address."""
    if found := re.fullmatch(r"(\[[^\]]+\]|[^:]+):([0-9]+)", endpoint):
        return found[1].strip("[]"), int(found[2])
    return endpoint.strip("[]"), None


def _patience(backend: str, rank: int | None, timeout_s: int) -> str:
    if backend == "static":
        return f"timeout={timeout_s}"
    # torchrun tells the host by its name, which says little in a container
    host = "" if rank is None else f",is_host={int(rank == 0)}"
    return f"join_timeout={timeout_s},read_timeout={timeout_s}{host}"


def _first(names: Sequence[str], environ: Mapping[str, str]) -> tuple[str, str]:
    """The first of the variables that is set, and its value; the first name and '' when none is."""
    return next(((name, environ[name]) for name in names if environ.get(name)), (names[0], ""))


def _number(name: str, text: str, *, least: int = 0) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise ConfigError(f"{name} is {text!r}", f"it is a number from {least}", "correct it")
    return int(text)
