"""A model behind OpenAI's API: by vLLM where it is installed, else by a small server of our own over transformers."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from trainway.checkpoint.adapter import ADAPTER_CONFIG, is_adapter
from trainway.errors import ConfigError, EnvironmentFault
from trainway.files import read_json
from trainway.release.bundle import adapter_base, model_directory
from trainway.release.views import view_adapter, view_merged, view_model
from trainway.rollout.keeper import Kept
from trainway.rollout.vllm_server import API_KEY as VLLM_KEY
from trainway.rollout.vllm_server import PYTHON

Backend = Literal["auto", "vllm", "transformers"]
KEY = "TRAINWAY_API_KEY"
"""Names the key that a server asks for; never on a command line."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# vLLM's choices of --max-lora-rank
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_SCRATCH = "<temporary>"


@dataclass(frozen=True)
class ServePlan:
    """How a model is served."""

    backend: Literal["vllm", "transformers"]
    name: str
    """What clients call the model."""
    source: Path
    """The model directory."""
    how: Literal["plain", "adapter", "merged"]
    """An adapter goes with its base, or is merged into it first."""
    url: str
    notes: tuple[str, ...]
    command: tuple[str, ...]
    """vLLM's; its model directory is made when it starts. Empty without vLLM."""


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    backend: Backend = "auto",
    name: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    options: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve a run (its best checkpoint), a checkpoint or a model directory, until SIGTERM or SIGINT.

    Args:
        host: requests from other machines are only answered with a key, which TRAINWAY_API_KEY holds.
        backend: `auto` takes vLLM where it is installed, or TRAINWAY_VLLM_PYTHON names an interpreter that has it.
        name: what clients call the model; its directory's name otherwise.
        dtype: what the model computes in; fp32, or with vLLM the type of the weights, if not said.
        options: further ones of vLLM's command line.
        say: told what goes on, line by line.

    Raises:
        ConfigError: no model there, options without vLLM, or no key for a public address.
        EnvironmentFault: the port is taken, vLLM is missing, or it ended by itself.
    """
    plan = plan_serving(model, host=host, port=port, backend=backend, name=name, dtype=dtype, options=options)
    check_free(host, port)
    for note in plan.notes:
        say(f"note: {note}")
    if plan.backend == "vllm":
        _serve_by_vllm(plan, host, port, dtype, options, say)
    else:
        _serve_ourselves(plan, host, port, dtype or "float32", say)


def plan_serving(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    backend: Backend = "auto",
    name: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    options: Sequence[str] = (),
) -> ServePlan:
    """What `serve` would do; nothing is started or written. Raises as `serve` does, but for the port."""
    if host not in LOOPBACK and not os.environ.get(KEY):
        raise ConfigError(
            f"--host {host} is open to other machines, and there is no key",
            "whoever reaches the port could use the model",
            f"set {KEY}, or keep 127.0.0.1 and reach it through `trainway tunnel` or ssh -L",
        )
    source = model_directory(model)
    chosen = _backend(backend)
    if options and chosen != "vllm":
        raise ConfigError(
            f"{' '.join(options)}: options after -- are vLLM's",
            "this model is served by transformers",
            "leave them out, or use --backend vllm",
        )
    name = name or _name(Path(model))
    how, notes = _how(source, chosen)
    shown = f"[{host}]" if ":" in host else host
    command = tuple(_vllm_command(source, Path(_SCRATCH), how, name, host, port, dtype, options))
    return ServePlan(
        chosen,
        name,
        source,
        how,
        f"http://{shown}:{port}/v1",
        notes,
        command if chosen == "vllm" else (),
    )


def check_free(host: str, port: int) -> None:
    """Raise EnvironmentFault when nobody can listen there: before a model is loaded, not after."""
    from trainway.release.server import cannot_listen

    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except (OSError, OverflowError) as error:
        raise cannot_listen(host, port, error) from None


def vllm_python() -> str | None:
    """An interpreter that has vLLM; None where there is none."""
    if named := os.environ.get(PYTHON):
        if shutil.which(named) is None:
            raise EnvironmentFault(f"{PYTHON} names {named}", "there is no such program", f"correct {PYTHON}")
        return named
    return sys.executable if find_spec("vllm") else None


def _backend(wanted: Backend) -> Literal["vllm", "transformers"]:
    if wanted == "transformers":
        return "transformers"
    if vllm_python():
        return "vllm"
    if wanted == "vllm":
        raise EnvironmentFault(
            "vLLM is not installed",
            "it needs an environment of its own, with its own torch",
            f"install it in one and name its interpreter in {PYTHON}, or use --backend transformers",
        )
    return "transformers"


def _name(model: Path) -> str:
    place = model.resolve()
    if re.fullmatch(r"step-[0-9]+", place.name):
        place = place.parent.parent  # a checkpoint is called as its run
    return place.name or "model"


def _how(source: Path, backend: str) -> tuple[Literal["plain", "adapter", "merged"], tuple[str, ...]]:
    if not is_adapter(source):
        return "plain", ()
    obstacle = _lora_obstacle(read_json(source / ADAPTER_CONFIG))
    if backend != "vllm" or obstacle is None:
        return "adapter", ()
    return "merged", (f"the adapter is merged into its base first: vLLM serves none with {obstacle}",)


def _lora_obstacle(config: dict[str, Any]) -> str | None:
    """What of an adapter vLLM cannot apply by itself."""
    if config.get("use_dora"):
        return "DoRA"
    if config.get("modules_to_save"):
        return f"whole modules ({', '.join(config['modules_to_save'])})"
    if config.get("target_parameters"):
        return f"adapted parameters ({', '.join(config['target_parameters'])})"
    if config.get("alpha_pattern") or config.get("rank_pattern"):
        return "a rank or alpha for each module"
    rank = int(config.get("r") or 0)
    return f"a rank of {rank}" if rank > _RANKS[-1] else None


# ---- by vLLM


def _vllm_command(
    source: Path,
    scratch: Path,
    how: str,
    name: str,
    host: str,
    port: int,
    dtype: str | None,
    options: Sequence[str],
) -> Iterator[str]:
    """vLLM's command line, a list of words: no shell reads it. `scratch`: where the files for it are made."""
    yield vllm_python() or sys.executable
    yield from ("-m", "vllm.entrypoints.openai.api_server")  # not `vllm serve`: the package for CPUs lacks it
    if how == "adapter":
        model, revision = _published_base(source)
        yield f"--model={model}"
        if revision:
            yield f"--revision={revision}"
        yield from (f"--tokenizer={scratch}", f"--generation-config={scratch}", "--enable-lora")
        rank = int(read_json(source / ADAPTER_CONFIG)["r"])
        yield f"--max-lora-rank={next(allowed for allowed in _RANKS if allowed >= rank)}"
        # as JSON: a path may hold an equals sign
        yield f"--lora-modules={json.dumps({'name': name, 'path': str(scratch)})}"
        yield f"--served-model-name={name}-base"
    else:
        yield from (f"--model={scratch}", f"--served-model-name={name}")
    yield from (f"--host={host}", f"--port={port}")
    if dtype:
        yield f"--dtype={dtype}"
    yield from options


def _published_base(source: Path) -> tuple[str, str | None]:
    """The base of an adapter as its family publishes it: its directory, or its id and commit on the Hub."""
    base = adapter_base(source)
    local = Path(base.source).expanduser()
    return (str(local.resolve()), None) if local.is_dir() else (base.source, base.revision)


def _serve_by_vllm(
    plan: ServePlan,
    host: str,
    port: int,
    dtype: str | None,
    options: Sequence[str],
    say: Callable[[str], None],
) -> None:
    scratch = Path(tempfile.mkdtemp(prefix="trainway-serve-"))
    try:
        place = scratch / "model"
        {"plain": view_model, "adapter": view_adapter, "merged": view_merged}[plan.how](plan.source, place)
        command = list(_vllm_command(plan.source, place, plan.how, plan.name, host, port, dtype, options))
        environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if key := os.environ.get(KEY):
            environment[VLLM_KEY] = key
        with _asked_to_end() as ended:
            kept = Kept(command, remove=[scratch], environment=environment, show=True)
            try:
                _await_end(kept, plan, ended, say)
            finally:
                kept.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _await_end(kept: Kept, plan: ServePlan, ended: threading.Event, say: Callable[[str], None]) -> None:
    ready = False
    while not ended.wait(0.5):
        if (code := kept.exit_code()) is not None:
            raise EnvironmentFault(
                f"vLLM ended by itself (exit code {code})",
                "it says why above",
                "cure that, or use --backend transformers",
            )
        if not ready and _is_healthy(plan.url):
            ready = True
            say(f"serving {plan.name} at {plan.url} (vLLM)")


def _is_healthy(url: str) -> bool:
    address = url.removeprefix("http://").removesuffix("/v1").replace("0.0.0.0", "127.0.0.1")
    connection = http.client.HTTPConnection(address, timeout=5)
    with suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    return False


# ---- by ourselves


def _serve_ourselves(
    plan: ServePlan,
    host: str,
    port: int,
    dtype: Literal["float32", "bfloat16"],
    say: Callable[[str], None],
) -> None:
    from trainway.release.generate import load_speaker
    from trainway.release.server import ApiServer

    with _asked_to_end() as ended:
        speaker = load_speaker(plan.source, dtype)
        server = ApiServer(host, port, speaker, plan.name, os.environ.get(KEY) or None)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        chat = "" if speaker.can_chat else "; it has no chat template: completions alone"
        say(f"serving {plan.name} at {server.url} (transformers{chat})")
        ended.wait()
        server.shutdown()
        server.server_close()


@contextmanager
def _asked_to_end() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, instead of what they do otherwise."""
    ended = threading.Event()
    before = {one: signal.signal(one, lambda *_: ended.set()) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ended
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
