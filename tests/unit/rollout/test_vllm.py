"""Answers through vLLM's calls, against a server that answers in its format and can be made to fail."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.fake_vllm import END, answer, digest, install
from tests.unit.rollout.test_keeper import alive, wait_for
from trainway.config.schema import RolloutConfig
from trainway.engines.world import World
from trainway.errors import ConfigError, EnvironmentFault
from trainway.rollout import handover as handover_module
from trainway.rollout import vllm_server
from trainway.rollout.base import Request, Sampling
from trainway.rollout.handover import check_complete, head_is_tied
from trainway.rollout.vllm import VllmRollout, open_vllm

SAMPLING = Sampling(max_new_tokens=5, temperature=0.8, top_p=0.9, end_tokens=(END, 9))
ALONE = World(0, 0, 1, 1, torch.device("cpu"))
REQUESTS = [
    Request(np.array([1, 2, 3], np.int32), (11, 2**64 - 1)),
    Request(np.array([4], np.int32), (11, 12, 13)),
]


class Student:
    """Weights that are handed over; `value` is what they are made of."""

    def __init__(self) -> None:
        self.value = 0
        self.left_out: set[str] = set()

    def write(self, directory: Path) -> None:
        for name in {"a", "b"} - self.left_out:
            save_file({name: np.array([self.value, ord(name)])}, directory / f"{name}.safetensors")

    def answers(self, tmp_path: Path) -> list[list[list[int]]]:
        """What a server with the present weights says to REQUESTS."""
        folder = tmp_path / f"expected-{self.value}"
        folder.mkdir(exist_ok=True)
        self.write(folder)
        weights = json.dumps({file.name: digest(file) for file in sorted(folder.iterdir())})
        return [[answer(weights, request.prompt.tolist(), seed % 2**63, 5) for seed in request.seeds]
                for request in REQUESTS]  # fmt: skip


class Bench:
    """A model directory, a student, and the calls that the servers have got."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.student = tmp_path, Student()
        self.model = tmp_path / "model"
        self.model.mkdir()
        self.student.write(self.model)
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("PYTHONPATH", str(install(tmp_path / "fake")))
        monkeypatch.setenv("FAKE_VLLM_CALLS", str(tmp_path))
        monkeypatch.setenv("TRAINWAY_VLLM_WEIGHTS", str(tmp_path))
        monkeypatch.delenv("TRAINWAY_VLLM_PYTHON", raising=False)
        monkeypatch.setattr(vllm_server, "_PAUSE_S", 0.01)

    def open(self, world: World = ALONE, faults: dict[str, Any] | None = None, **config: Any) -> VllmRollout:
        self._monkeypatch.setenv("FAKE_VLLM", json.dumps(faults or {}))
        settings = RolloutConfig(engine="vllm", **config)
        return open_vllm(settings, world, self.model, self.student.write, precision="fp32", max_tokens=64)

    def calls(self) -> list[tuple[str, Any, int]]:
        """(path, body, other requests then under way) of every call with a body."""
        file = self.path / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def pid(self) -> int:
        return int(json.loads((self.path / "start.json").read_text())[2])


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def tokens(answers: list[list[Any]]) -> list[list[list[int]]]:
    return [[one.tokens.tolist() for one in group] for group in answers]


def test_each_seed_of_each_request_is_answered_in_order(bench: Bench) -> None:
    rollout = bench.open(faults={"takes_s": 0.05}, batch_size=2)
    try:
        rollout.sync()
        answers = rollout.generate(REQUESTS, SAMPLING)
        assert tokens(answers) == bench.student.answers(bench.path)
        flat = [one for group in answers for one in group]
        assert all(one.tokens.dtype == np.int32 and 1 <= len(one.tokens) <= 5 for one in flat)
        assert {one.truncated for one in flat} == {True, False}
        assert all(one.truncated == (one.tokens[-1] != END) for one in flat)
        assert rollout.generate([], SAMPLING) == []
    finally:
        rollout.close()
    asked = [(body, others) for path, body, others in bench.calls() if path == "/v1/completions"]
    assert max(others for _, others in asked) == 1  # batch_size, this one among them
    assert {(tuple(body["prompt"]), body["seed"]) for body, _ in asked} == {
        ((1, 2, 3), 11), ((1, 2, 3), 2**63 - 1), ((4,), 11), ((4,), 12), ((4,), 13)
    }  # fmt: skip
    body = asked[0][0]
    for given in ("prompt", "seed"):
        del body[given]
    assert body == {
        "model": "student", "max_tokens": 5, "temperature": 0.8, "top_p": 0.9, "stop_token_ids": [END, 9],
        "n": 1, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "min_tokens": 0, "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip


def test_prompts_and_answers_fit_what_the_server_was_started_for(bench: Bench) -> None:
    rollout = bench.open()  # 64 tokens
    rollout.sync()
    fits, too_long = (Request(np.ones(length, np.int32), (1,)) for length in (59, 60))
    assert len(rollout.generate([fits], SAMPLING)) == 1
    with pytest.raises(AssertionError, match="end such an answer early"):
        rollout.generate([too_long], SAMPLING)
    rollout.close()


def test_the_newest_weights_answer_and_no_others_lie_around(bench: Bench) -> None:
    rollout = bench.open()
    seen = []
    for value in range(3):
        bench.student.value = value
        rollout.sync()
        seen.append(tokens(rollout.generate(REQUESTS, SAMPLING)))
        assert seen[-1] == bench.student.answers(bench.path)
        (folder,) = bench.path.glob("trainway-weights-*")
        assert [path.name for path in folder.iterdir()] == [str(value + 1)]
    assert seen[0] != seen[1] != seen[2]
    pid = bench.pid()
    assert alive(pid)
    rollout.close()
    assert not alive(pid) and not list(bench.path.glob("trainway-weights-*"))
    rollout.close()


def test_the_end_of_the_world_ends_the_server(bench: Bench) -> None:
    world = World(0, 0, 1, 1, torch.device("cpu"))
    with world.closing:
        bench.open(world)
        assert alive(bench.pid())
    assert not alive(bench.pid())


def test_a_server_is_told_what_the_config_says(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    world = World(2, 2, 4, 4, torch.device("cuda", 2))
    # as rank 2 of 4, of which 2 share a server; the others are not there
    monkeypatch.setattr(World, "sum", lambda self, *values: [float(value) for value in values])
    monkeypatch.setattr(World, "from_main", lambda self, value: value or str(bench.path / "made"))
    (bench.path / "made").mkdir()
    rollout = bench.open(world, tensor_parallel=2, memory_share=0.6, batch_size=16)
    rollout.close()
    arguments, seen, _ = json.loads((bench.path / "start.json").read_text())
    assert set(arguments) - {arguments[1]} == {
        f"--model={bench.model}",
        "--disable-uvicorn-access-log", "--dtype=float32", "--max-model-len=64", "--max-num-seqs=32",
        "--tensor-parallel-size=2", "--generation-config=vllm", "--seed=0", "--gpu-memory-utilization=0.6",
        "--enable-sleep-mode",
    }  # fmt: skip
    assert seen == {"RANK": None, "CUDA_VISIBLE_DEVICES": "6,7", "VLLM_SERVER_DEV_MODE": "1"}


def test_on_gpus_a_server_sleeps_but_while_it_answers(bench: Bench) -> None:
    rollout = bench.open(World(0, 0, 1, 1, torch.device("cuda", 0)))
    rollout.sync()
    first = tokens(rollout.generate(REQUESTS[:1], SAMPLING))
    assert first == bench.student.answers(bench.path)[:1]
    assert tokens(rollout.generate(REQUESTS[:1], SAMPLING)) == first  # with no weights handed over in between
    rollout.close()
    loading = ["/collective_rpc", "/wake_up?tags=kv_cache", "/reset_prefix_cache", "/update_weight_version"]
    answering = ["/v1/completions"] * 2 + ["/sleep?level=2&mode=wait"]
    assert [path for path, _, _ in bench.calls() if path != "/weight_checker"] == [
        "/sleep?level=2&mode=wait",
        *("/wake_up?tags=weights", *loading, *answering),
        *("/wake_up?tags=weights", *loading, *answering),
    ]


def test_a_connection_that_breaks_is_tried_again(bench: Bench) -> None:
    rollout = bench.open(faults={"breaks_at": 3})
    rollout.sync()
    assert tokens(rollout.generate(REQUESTS, SAMPLING)) == bench.student.answers(bench.path)
    rollout.close()
    assert sum(path == "/v1/completions" for path, _, _ in bench.calls()) == 6


def test_a_server_that_dies_is_named_with_the_end_of_its_log(bench: Bench) -> None:
    rollout = bench.open(faults={"dies_at": 2})
    rollout.sync()
    with pytest.raises(EnvironmentFault, match="cannot be reached for /v1/completions") as caught:
        rollout.generate(REQUESTS, SAMPLING)
    assert "RuntimeError: something of the engine" in caught.value.why
    rollout.close()


def test_a_server_that_was_started_anew_does_not_answer_for_the_student(bench: Bench) -> None:
    rollout = bench.open(faults={"forgets_at": 2})
    rollout.sync()
    with pytest.raises(EnvironmentFault, match=r"has the weights default, not trainway-weights-.*-1"):
        rollout.generate(REQUESTS, SAMPLING)
    rollout.close()


@pytest.mark.parametrize(
    ("choice", "what"),
    [
        ({"token_ids": None}, "gave an answer of another form"),
        ({"token_ids": ["a", END]}, "gave an answer of another form"),
        ({"token_ids": [2**40, END]}, "gave an answer of another form"),
        ({"token_ids": [], "finish_reason": "stop"}, r"ended an answer of 0 tokens with \[\] \(stop\)"),
        ({"token_ids": [100, 8], "finish_reason": "stop"}, r"2 tokens with \[8\] \(stop\)"),
        ({"token_ids": [END, 100, 100, 100, 100], "finish_reason": "length"}, r"5 tokens with \[100\]"),
        ({"token_ids": [100, 100], "finish_reason": "length"}, r"2 tokens with \[100\] \(length\)"),
        ({"token_ids": [100, END], "finish_reason": "abort"}, r"\(abort\)"),
        ({"prompt_token_ids": [0, 1, 2, 3]}, "answered another prompt"),
    ],
)
def test_an_answer_that_is_none_is_refused(bench: Bench, choice: dict[str, Any], what: str) -> None:
    rollout = bench.open(faults={"choice": choice})
    rollout.sync()
    with pytest.raises(EnvironmentFault, match=what):
        rollout.generate(REQUESTS[:1], SAMPLING)
    rollout.close()


@pytest.mark.parametrize(
    ("faults", "what"),
    [
        ({"does_not_load": ["b.safetensors"]}, "did not find b.safetensors among the weights"),
        ({"refuses_weights": True}, "refused /collective_rpc with status 500"),
        ({"keeps_prefixes": True}, "did not forget"),
    ],
)
def test_weights_that_are_not_taken_are_an_error(bench: Bench, faults: dict[str, Any], what: str) -> None:
    rollout = bench.open(faults=faults)
    with pytest.raises(EnvironmentFault, match=what):
        rollout.sync()
    rollout.close()


def test_weights_that_lack_a_tensor_are_refused(bench: Bench) -> None:
    rollout = bench.open()
    bench.student.left_out = {"b"}
    with pytest.raises(EnvironmentFault, match="b is not among the weights for vLLM"):
        rollout.sync()
    rollout.close()


def test_a_tied_tensor_is_not_missed(tmp_path: Path) -> None:
    for name in ("model", "same", "other"):
        (tmp_path / name).mkdir()
    value = np.arange(6).reshape(2, 3)
    save_file({"embed": value, "head": value, "norm": value[0]}, tmp_path / "model" / "m.safetensors")
    save_file({"embed": value + 1, "norm": value[1]}, tmp_path / "same" / "m.safetensors")
    check_complete(tmp_path / "same", tmp_path / "model")
    save_file({"embed": value, "norm": value[:, 0]}, tmp_path / "other" / "m.safetensors")
    with pytest.raises(
        EnvironmentFault, match="norm is not among the weights for vLLM, or has another shape"
    ):
        check_complete(tmp_path / "other", tmp_path / "model")


@pytest.mark.parametrize(
    ("tensors", "config", "tied"),
    [
        (["model.embed_tokens.weight"], {}, True),
        (["model.embed_tokens.weight", "lm_head.weight"], {"tie_word_embeddings": True}, True),
        (["model.embed_tokens.weight", "lm_head.weight"], {"tie_word_embeddings": False}, False),
        (["model.embed_tokens.weight", "language_model.lm_head.weight"], {}, False),
    ],
)
def test_packed_weights_and_a_tied_head_do_not_go_together(
    bench: Bench, tensors: list[str], config: dict[str, bool], tied: bool
) -> None:
    for file in bench.model.iterdir():
        file.unlink()
    save_file({name: np.zeros(1) for name in tensors}, bench.model / "model.safetensors")
    (bench.model / "config.json").write_text(json.dumps(config))
    assert head_is_tied(bench.model) == tied
    if not tied:
        bench.open(faults={"packed": True}).close()
        return
    with pytest.raises(EnvironmentFault, match="cannot take other weights for a head that is tied"):
        bench.open(faults={"packed": True})
    assert not alive(bench.pid())
    bench.open().close()


def test_a_slow_start_is_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.open(faults={"starts_in_s": 1.5}).close()
    monkeypatch.setattr(vllm_server, "START_S", 0.5)
    with pytest.raises(EnvironmentFault, match=r"did not start within 0 s|did not start within 1 s"):
        bench.open(faults={"starts_in_s": 60})
    assert not alive(bench.pid())


def test_a_server_that_does_not_start_says_why(bench: Bench) -> None:
    noise = [f"line {number}" for number in range(60)]
    cause = "ValueError: Free memory on device cuda:0 (3.1/79.1 GiB) on startup is less than desired"
    with pytest.raises(EnvironmentFault, match=r"ended while it was starting \(exit code 1\)") as caught:
        bench.open(faults={"fails_with": [cause, *noise, "RuntimeError: Engine core initialization failed."]})
    lines = caught.value.why.splitlines()
    assert lines[:2] == ["the end of its log:", cause]
    assert lines[-2:] == ["line 59", "RuntimeError: Engine core initialization failed."] and len(lines) == 27
    assert caught.value.fix.startswith("lower rollout.memory_share")
    assert not list(bench.path.glob("trainway-weights-*"))


def test_without_vllm_the_error_says_how_to_get_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(EnvironmentFault, match="ended while it was starting") as caught:
        bench.open()
    assert "TRAINWAY_VLLM_PYTHON" in caught.value.fix
    monkeypatch.setenv("TRAINWAY_VLLM_PYTHON", str(bench.path / "nothing"))
    with pytest.raises(EnvironmentFault, match="there is no such program"):
        bench.open()


@pytest.fixture
def url(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Start a server as a user would, and get its url."""
    started = []

    def start(**faults: Any) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "FAKE_VLLM": json.dumps(faults)}
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            f"--model={bench.model}",
            f"--port={port}",
        ]
        started.append(subprocess.Popen(command, env=environment))
        wait_for("it listens", lambda: _listens(port))
        return f"http://127.0.0.1:{port}"

    yield start
    for process in started:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_server_at_a_url_is_used_and_left_running(bench: Bench, url: Callable[..., str]) -> None:
    address = url()
    rollout = bench.open(url=address)
    rollout.sync()
    assert tokens(rollout.generate(REQUESTS, SAMPLING)) == bench.student.answers(bench.path)
    rollout.close()
    assert alive(bench.pid())


@pytest.mark.parametrize(
    ("faults", "error", "what", "fix"),
    [
        ({"version": "0.31.2"}, EnvironmentFault, "is of version 0.31.2", "install vllm>=0.32,<0.33"),
        ({"version": "0.33.0rc1"}, EnvironmentFault, "is of version 0.33.0rc1", "install vllm>=0.32,<0.33"),
        ({"max_model_len": 63}, ConfigError, "serves student of 63 tokens", "--max-model-len 64"),
        ({"no_dev_mode": True}, EnvironmentFault, "takes no weights", "VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(
    bench: Bench, url: Callable[..., str], faults: dict[str, Any], error: type[Exception], what: str, fix: str
) -> None:
    with pytest.raises(error, match=what) as caught:
        bench.open(url=url(**faults))
    assert fix in caught.value.fix  # type: ignore[attr-defined]


def test_a_url_without_a_server_is_an_error(bench: Bench) -> None:
    with pytest.raises(EnvironmentFault, match=r"at http://127\.0\.0\.1:9 cannot be reached"):
        bench.open(url="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"rollout\.url is 127\.0\.0\.1:8000"):
        bench.open(url="127.0.0.1:8000")


def test_settings_that_vllm_would_change_or_cannot_have_are_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"temperature is 0\.005"):
        bench.open(temperature=0.005)
    with pytest.raises(ConfigError, match="tensor_parallel is 2, with 3 ranks"):
        bench.open(World(0, 0, 3, 3, torch.device("cuda", 0)), tensor_parallel=2)


def test_weights_need_room_that_all_servers_see(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentFault, match=r"no room for 0\.00 GiB"):
        monkeypatch.setenv("TRAINWAY_VLLM_WEIGHTS", str(bench.path / "nothing"))
        bench.open()
    monkeypatch.delenv("TRAINWAY_VLLM_WEIGHTS")
    with pytest.raises(EnvironmentFault, match="on several machines"):
        bench.open(url="http://gpu-7:8000")
    # memory first, then the disk
    monkeypatch.setattr(handover_module, "SHARED_MEMORY", bench.path / "nothing")
    with tempfile.TemporaryDirectory() as short:  # a socket's path is
        monkeypatch.setattr("tempfile.tempdir", short)
        rollout = bench.open()
        assert len(list(Path(short).glob("trainway-weights-*"))) == 1
        rollout.close()


def test_nothing_is_left_when_the_training_process_is_killed(bench: Bench) -> None:
    bench.open().close()  # sets what the other process finds in the environment
    code = "import sys, time, torch\nfrom pathlib import Path\n"
    code += "from trainway.config.schema import RolloutConfig\nfrom trainway.engines.world import World\n"
    code += "from trainway.rollout.vllm import open_vllm\n"
    code += "world = World(0, 0, 1, 1, torch.device('cpu'))\n"
    code += "rollout = open_vllm(RolloutConfig(engine='vllm'), world, Path(sys.argv[1]), print, precision='fp32', "
    code += "max_tokens=64)\nprint('open', flush=True)\ntime.sleep(60)"
    root = Path(vllm_server.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{os.environ['PYTHONPATH']}"}
    trainer = subprocess.Popen(
        [sys.executable, "-c", code, str(bench.model)], stdout=subprocess.PIPE, env=environment
    )
    assert trainer.stdout is not None and trainer.stdout.readline() == b"open\n"
    pid = bench.pid()
    assert alive(pid) and list(bench.path.glob("trainway-weights-*"))
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    began = time.monotonic()
    wait_for("all is gone", lambda: not alive(pid) and not list(bench.path.glob("trainway-weights-*")))
    assert time.monotonic() - began < 10


RANK = """
import json, sys
from pathlib import Path
import numpy as np
from trainway.config.schema import EngineConfig, RolloutConfig
from trainway.engines.world import open_world
from trainway.errors import EnvironmentFault, PeerFailed
from trainway.rollout.base import Request, Sampling
from trainway.rollout.vllm import open_vllm

def write(directory):
    if world.is_main:
        for file in Path(sys.argv[1]).glob("*.safetensors"):
            (directory / file.name).write_bytes(file.read_bytes())

with open_world(EngineConfig(name="ddp")) as world:
    rollout = open_vllm(RolloutConfig(engine="vllm"), world, Path(sys.argv[1]), write, precision="fp32", max_tokens=64)
    rollout.sync()
    requests = [Request(np.array([world.rank, 5], np.int32), (21, 22))] * (1 + world.rank)
    answers = rollout.generate(requests, Sampling(5, 0.8, 1.0, (7,)))
    said = [[one.tokens.tolist() for one in group] for group in answers]
    try:
        # rank 1 alone asks, and is answered by no one
        rollout.generate(requests[: world.rank], Sampling(5, 0.8, 1.0, (7,)))
    except (EnvironmentFault, PeerFailed) as error:
        said.append(type(error).__name__)
print(json.dumps(said))
"""


@pytest.mark.slow
def test_ranks_share_a_server_and_fail_together(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("FAKE_VLLM", json.dumps({"dies_at": 7}))  # after the 2 + 4 answers of the first call
    root = Path(vllm_server.__file__).parents[2]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    told["PYTHONPATH"] = f"{root}:{os.environ['PYTHONPATH']}"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(bench.model)],
            env={**os.environ, **told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    said = [json.loads(rank.communicate(timeout=120)[0].splitlines()[-1]) for rank in ranks]
    weights = json.dumps({file.name: digest(file) for file in sorted(bench.model.iterdir())})
    expected = [[answer(weights, [rank, 5], seed, 5) for seed in (21, 22)] for rank in range(2)]
    assert said == [[expected[0], "PeerFailed"], [expected[1], expected[1], "EnvironmentFault"]]
    assert not alive(bench.pid()) and not list(bench.path.glob("trainway-weights-*"))
