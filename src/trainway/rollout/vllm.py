"""Rollouts by vLLM: the one module that knows its calls, which change between versions (these are of 0.32)."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trainway.config.schema import RolloutConfig
from trainway.engines.precision import Precision
from trainway.engines.world import World
from trainway.errors import ConfigError, EnvironmentFault
from trainway.files import disk_faults
from trainway.rollout.base import Request, Rollout, Sampling
from trainway.rollout.handover import check_complete, handover, head_is_tied
from trainway.rollout.vllm_server import VllmServer, check_url, server_in, start_server

VERSIONS = ((0, 32), (0, 33))
"""Of vLLM: from the first, up to but without the second."""
WriteWeights = Callable[[Path], None]
"""Writes the student as safetensors in Hugging Face's format into an empty directory; every rank calls it together."""

_DTYPES: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_MIN_TEMPERATURE = 0.01  # vLLM takes a lower one for this
_SEEDS = 2**63  # vLLM's are signed
_NOTHING = hashlib.sha256().hexdigest()
# whatever defaults a server was given: nothing but temperature and top_p shapes what is drawn
_PLAIN = {"n": 1, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
          "frequency_penalty": 0.0, "min_tokens": 0, "ignore_eos": True, "return_token_ids": True}  # fmt: skip


def open_vllm(
    config: RolloutConfig,
    world: World,
    model_dir: Path,
    write_weights: WriteWeights,
    *,
    precision: Precision,
    max_tokens: int,
) -> VllmRollout:
    """Start the servers, or find the one at `rollout.url`; every rank calls this together, before the first `sync`.

    Each `tensor_parallel` ranks with a GPU share a server on the same GPUs, which gives its memory back between
    rollouts; ranks without GPUs share one a machine. They end with `world.closing`, and when the process is killed.

    Args:
        model_dir: a model of the student's shape in Hugging Face's format, with any weights.
        precision: what the student computes in.
        max_tokens: of a prompt and its answer.

    Raises:
        ConfigError: the settings do not fit the ranks, or the server at the url.
        EnvironmentFault: a server does not start, is of another version, or takes no weights.
    """
    if config.temperature < _MIN_TEMPERATURE:
        raise ConfigError(
            f"rollout.temperature is {config.temperature:g}",
            f"vLLM samples at {_MIN_TEMPERATURE:g} or above",
            f"use rollout.temperature={_MIN_TEMPERATURE:g}, or rollout.engine=transformers",
        )
    sharing = _ranks_per_server(config, world)
    name: str = world.from_main(secrets.token_hex(4))
    leads = (world.rank if config.url else world.local_rank) % sharing == 0
    with ExitStack() as stack:
        weights = stack.enter_context(handover(world, model_dir, name, config.url))
        if config.url:
            server = VllmServer(check_url(config.url))
        else:
            place = Path(tempfile.gettempdir()) / f"trainway-vllm-{name}-{world.local_rank // sharing}"
            options, environment = _server_options(config, world, sharing, precision, max_tokens)
            start = partial(start_server, model_dir, place, options, environment)
            server = world.together(start if leads else partial(server_in, place))
            stack.callback(server.close)
        world.together(lambda: server.await_start() if leads else None)
        rollout = VllmRollout(
            world,
            server,
            model=world.together(lambda: _served_model(server, max_tokens)),
            leads=leads,
            sleeps=config.url is None and world.device.type == "cuda",
            model_dir=model_dir,
            weights=weights,
            write_weights=write_weights,
            parallel=config.batch_size,
            max_tokens=max_tokens,
        )
        rollout.begin()
        rollout.closing.push(stack.pop_all())
    world.closing.callback(rollout.close)
    return rollout


class VllmRollout:
    """A student that answers through vLLM servers; see `RolloutEngine`.

    A request's tokens, seed and weights decide its answer as far as vLLM makes the same logits for them: those may
    differ in their last bits with the other requests of the moment, and then another token is drawn now and then.
    Its VLLM_BATCH_INVARIANT=1, in the environment of the training, rules that out where the GPU has the kernels.
    Another version, another GPU, or another tensor_parallel draw other answers from the same seeds.
    """

    def __init__(
        self,
        world: World,
        server: VllmServer,
        *,
        model: str,
        leads: bool,
        sleeps: bool,
        model_dir: Path,
        weights: Path,
        write_weights: WriteWeights,
        parallel: int,
        max_tokens: int,
    ) -> None:
        self._world = world
        self._server = server
        self._model = model
        self._leads = leads
        self._sleeps = sleeps
        self._asleep = False
        self._model_dir = model_dir
        self._weights = weights
        self._write_weights = write_weights
        self._parallel = parallel
        self._max_tokens = max_tokens
        self._generation = 0
        self._checksums: dict[str, str] = {}
        self.closing = ExitStack()

    def begin(self) -> None:
        """Note what the server's weights are, for the proof that the first `sync` changes all of them; let it sleep."""
        self._world.together(lambda: self._note_weights() if self._leads else None)
        self._sleep()

    def sync(self) -> None:
        """Hand the student's present weights over; when this returns, no server has any other.

        Raises:
            EnvironmentFault: the disk is full, or a server did not take all of them.
        """
        self._world.together(self._turn_generation)
        with disk_faults(self._directory):
            self._world.together(lambda: self._write_weights(self._directory))
        if self._generation == 1:
            self._world.together(self._check_written)
        self._load()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Rollout]]:
        """The answers to each request, in order, one for each of its seeds.

        Raises:
            EnvironmentFault: the server failed, or gave an answer that is none.
        """
        assert self._generation, "sync comes first"
        longest = max((len(request.prompt) for request in requests), default=0) + sampling.max_new_tokens
        assert longest <= self._max_tokens, "vLLM would end such an answer early"
        if self._asleep:
            self._load()
        answers = self._world.together(lambda: self._answers(requests, sampling))
        self._sleep()
        return answers

    def close(self) -> None:
        """End the servers that this run has started, and remove the weights that were on their way to them."""
        self.closing.close()

    # ---- weights

    @property
    def _version(self) -> str:
        """What servers with the present weights call them; no other run's server does."""
        return f"{self._weights.name}-{self._generation}"

    @property
    def _directory(self) -> Path:
        return self._weights / str(self._generation)

    def _turn_generation(self) -> None:
        # a directory of its own for each: nothing that a server remembers by path is ever taken for the next
        if self._world.is_main:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._generation += 1
        if self._world.is_main:
            self._directory.mkdir(parents=True)

    def _check_written(self) -> None:
        if self._world.is_main:
            check_complete(self._directory, self._model_dir)

    def _load(self) -> None:
        """Let the servers take the weights from the directory."""
        self._world.together(lambda: self._load_here() if self._leads else None)
        self._asleep = False

    def _load_here(self) -> None:
        call = self._server.call
        if self._asleep:
            call("/wake_up?tags=weights")
        zeros = self._zero() if self._checksums else {}
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(self._directory)}}
        call("/collective_rpc", reload)
        if zeros:
            self._check_that_all_is_loaded(zeros)
        if self._asleep:
            call("/wake_up?tags=kv_cache")
        if not call("/reset_prefix_cache")["success"]:
            raise self._server.fault("did not forget what it had computed with earlier weights")
        call("/update_weight_version", {"new_version": self._version})

    def _sleep(self) -> None:
        if self._sleeps:
            self._world.together(
                lambda: self._server.call("/sleep?level=2&mode=wait") if self._leads else None
            )
            self._asleep = True

    def _note_weights(self) -> None:
        self._checksums = self._checksum()
        # Tensors of no bytes: kernels for CPUs hold them packed. vLLM packs those that it reads anew, and so never
        # again a head that is tied: it would answer with the head that it was started with.
        if _NOTHING in self._checksums.values() and head_is_tied(self._model_dir):
            raise self._server.fault(
                "cannot take other weights for a head that is tied to the embedding",
                "vLLM on a CPU keeps a packed copy of that head",
                "use rollout.engine=transformers, or a GPU",
            )

    def _zero(self) -> dict[str, str]:
        self._server.call("/weight_checker", {"action": "reset"})
        return self._checksum()

    def _checksum(self) -> dict[str, str]:
        checksums: dict[str, str] = self._server.call("/weight_checker", {"action": "checksum"})["checksums"]
        return checksums

    def _check_that_all_is_loaded(self, zeros: dict[str, str]) -> None:
        # vLLM warns in its log of what it has not found among the weights, and goes on with what was there
        loaded, before = self._checksum(), self._checksums
        missing = [name for name, zero in zeros.items() if loaded[name] == zero != before[name]]
        if missing:
            raise self._server.fault(
                f"did not find {missing[0].rpartition(':')[2]} among the weights",
                f"{len(missing)} of its {len(zeros)} tensors are not those of the student",
                "vLLM names the weights of this family otherwise: use rollout.engine=transformers",
            )
        self._checksums = {}

    # ---- answers

    def _answers(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Rollout]]:
        with ThreadPoolExecutor(self._parallel) as pool:
            answers = [
                [pool.submit(self._answer, request.prompt, seed, sampling) for seed in request.seeds]
                for request in requests
            ]
            wait([one for group in answers for one in group], return_when=FIRST_EXCEPTION)
            failed = [one for group in answers for one in group if one.done() and one.exception()]
            pool.shutdown(wait=True, cancel_futures=True)
            if failed:
                failed[0].result()
        if answers:
            version = self._server.call("/weight_info", get=True)["weight_version"]
            if version != self._version:
                raise self._server.fault(
                    f"has the weights {version}, not {self._version}",
                    "it was started anew, or another run uses it",
                    "start the run again; give each run a server of its own",
                )
        return [[one.result() for one in group] for group in answers]

    def _answer(self, prompt: np.ndarray, seed: int, sampling: Sampling) -> Rollout:
        body = {
            "model": self._model,
            "prompt": prompt.tolist(),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed % _SEEDS,
            "stop_token_ids": list(sampling.end_tokens),
            **_PLAIN,
        }
        answer = self._server.call("/v1/completions", body)
        try:
            (choice,) = answer["choices"]
            asked, tokens, cause = choice["prompt_token_ids"], choice["token_ids"], choice["finish_reason"]
            found = np.array(tokens, np.int32)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise self._server.fault("gave an answer of another form", str(answer)[:400]) from None
        if asked != body["prompt"]:
            raise self._server.fault("answered another prompt than the one that it was sent")
        self._check_end(tokens, cause, sampling)
        return Rollout(found, tokens[-1] not in sampling.end_tokens)

    def _check_end(self, tokens: list[int], cause: str, sampling: Sampling) -> None:
        ends = [token in sampling.end_tokens for token in tokens]
        if cause == "length" and len(tokens) == sampling.max_new_tokens and not any(ends[:-1]):
            return
        if cause == "stop" and ends and ends[-1] and not any(ends[:-1]):
            return
        raise self._server.fault(
            f"ended an answer of {len(tokens)} tokens with {tokens[-1:]} ({cause})",
            f"answers end after {sampling.max_new_tokens} tokens, or with one of {list(sampling.end_tokens)}",
            "start it with --generation-config vllm, and without defaults of its own",
        )


def _ranks_per_server(config: RolloutConfig, world: World) -> int:
    if config.url:
        return world.world_size
    if world.device.type != "cuda":
        return world.local_world_size
    if world.local_world_size % config.tensor_parallel:
        raise ConfigError(
            f"rollout.tensor_parallel is {config.tensor_parallel}, with {world.local_world_size} ranks a machine",
            "each copy of the student is spread over the GPUs of that many ranks",
            "use a divisor of the ranks, or a server of your own in rollout.url",
        )
    return config.tensor_parallel


def _server_options(
    config: RolloutConfig, world: World, sharing: int, precision: Precision, max_tokens: int
) -> tuple[list[str], dict[str, str]]:
    """What a server is told: options of its command line, and variables."""
    options = [
        f"--dtype={_DTYPES[precision]}",
        f"--max-model-len={max_tokens}",
        f"--max-num-seqs={config.batch_size * sharing}",
        f"--tensor-parallel-size={config.tensor_parallel}",
        "--generation-config=vllm",
        "--seed=0",
    ]
    if world.device.type != "cuda":
        # what it is there for is to try things out: no compilation, and a cache of 1 GiB
        return [*options, "--enforce-eager"], {
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
        }
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = told.split(",") if told else [str(number) for number in range(world.local_world_size)]
    first = world.local_rank // sharing * sharing
    options += [f"--gpu-memory-utilization={config.memory_share}", "--enable-sleep-mode"]
    return options, {"CUDA_VISIBLE_DEVICES": ",".join(seen[first : first + sharing])}


def _served_model(server: VllmServer, max_tokens: int) -> str:
    """The name of the one model that a server has; after a look at what it is and can do."""
    version: str = server.call("/version", get=True)["version"]
    numbers = re.match(r"(\d+)\.(\d+)", version)
    lowest, end = (".".join(map(str, bound)) for bound in VERSIONS)
    if numbers is None or not VERSIONS[0] <= (int(numbers[1]), int(numbers[2])) < VERSIONS[1]:
        raise EnvironmentFault(
            f"the vLLM server at {server.address} is of version {version}",
            "the calls that hand weights over change between versions",
            f"install vllm>={lowest},<{end}",
        )
    models: list[dict[str, Any]] = server.call("/v1/models", get=True)["data"]
    if len(models) != 1 or models[0]["max_model_len"] < max_tokens:
        found = ", ".join(f"{model['id']} of {model['max_model_len']} tokens" for model in models)
        raise ConfigError(
            f"the vLLM server at {server.address} serves {found}",
            f"a prompt and its answer take up to {max_tokens} tokens, of one model",
            f"start it with --max-model-len {max_tokens}, without adapters",
        )
    try:
        server.call("/weight_info", get=True)
    except EnvironmentFault as error:
        raise EnvironmentFault(
            f"the vLLM server at {server.address} takes no weights",
            error.what,
            "start it with VLLM_SERVER_DEV_MODE=1 in its environment",
        ) from None
    name: str = models[0]["id"]
    return name
