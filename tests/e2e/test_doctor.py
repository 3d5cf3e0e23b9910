"""`trainway doctor` as a user meets it: exit codes, JSON, a machine without PyTorch, a pod, a Hub that refuses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import run_cli, tiny, write_config
from tests.doctor_material import TOKEN, gpu_xml, smi_xml
from tests.fakes_hub import FakeHub, serve
from tests.faults.test_doctor import BLOCK

FIELDS = {"level", "name", "what", "why", "fix"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(autouse=True)
def _no_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "HF_TOKEN",
        "HUGGINGFACEHUB_API_TOKEN",
        "HUGGINGFACE_HUB_TOKEN",
        "RUNPOD_POD_ID",
        "RUN_CONFIG",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def findings(*words: object, check: int = 0, **environ: str) -> dict[str, dict[str, str]]:
    """{name: the gravest finding of that name}, as --json says them."""
    said: list[dict[str, str]] = json.loads(
        run_cli("doctor", *words, "--json", check=check, **environ).stdout
    )
    assert all(set(item) == FIELDS for item in said)
    order = ("ok", "warning", "failure")
    return {item["name"]: item for item in sorted(said, key=lambda item: order.index(item["level"]))}


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Path:
    return write_config(tmp_path / "c.yaml", tiny(corpus, tmp_path / "store", tmp_path / "run"))


def test_the_machine_alone(tmp_path: Path) -> None:
    found = findings(**OFFLINE)
    assert {"python", "torch", "libraries", "memory", "disk-space", "hub", "secrets"} <= set(found)
    assert found["hub"]["what"].startswith("HF_HUB_OFFLINE is set")
    assert "geometry" not in found
    assert "ssh-key" not in found
    assert list(tmp_path.iterdir()) == []


def test_run_config_stands_in() -> None:
    # R8
    found = findings("data.train=none.jsonl", "--git", check=4, RUN_CONFIG="cpu_small", **OFFLINE)
    assert found["geometry"]["level"] == "ok"
    assert found["git"]["level"] in ("ok", "failure")


def test_a_run_that_is_ready(config: Path, tmp_path: Path) -> None:
    said = run_cli("doctor", config, **OFFLINE).stdout
    lines = said.splitlines()
    assert any(
        line.startswith("ok       geometry          8 rows a step: 2 x 4 x 1 process") for line in lines
    )
    assert lines[-1].startswith("0 failures, ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml"]


def test_everything_that_is_wrong_is_said_at_once(config: Path, tmp_path: Path) -> None:
    environ = {**OFFLINE, "RUNPOD_POD_ID": "abc", "NCCL_SOCKET_IFNAME": "bond7"}
    words = [config, "data.train=none.jsonl", "train.global_batch_size=7", "--run_dir", "/tmp/runs/x"]
    done = run_cli("doctor", *words, check=4, **environ)
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("failure")]
    assert failed == ["driver", "interface", "survives", "geometry", "data"]
    assert done.stdout.count("         fix: ") >= len(failed)
    assert done.stdout.splitlines()[-1].startswith("5 failures, ")
    assert not Path("/tmp/runs/x").exists()


def test_a_wrong_configuration_is_a_finding(config: Path) -> None:
    found = findings(config, "--train.seq_leng=5", check=4, **OFFLINE)
    assert found["config"]["level"] == "failure"
    assert found["config"]["fix"] == "did you mean train.seq_len?"
    assert found["python"]["level"] == "ok"


def test_a_machine_without_pytorch(config: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(BLOCK)
    path = os.pathsep.join([str(blocked), os.environ.get("PYTHONPATH", "")])
    found = findings(config, check=4, PYTHONPATH=path, **OFFLINE)
    assert found["torch"]["what"] == "PyTorch is not installed"
    assert found["torch"]["fix"].startswith("pip install torch")
    assert [name for name, item in found.items() if item["level"] == "failure"] == ["torch"]


def test_a_machine_with_gpus(config: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "answer").write_text(smi_xml(gpu_xml(0), gpu_xml(1, used=90000, holders={4711: 89000})))
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\ncat {tools}/answer\n")
    (tools / "nvidia-smi").chmod(0o755)
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    found = findings(config, "--nproc=4", check=4, PATH=path, CUDA_VISIBLE_DEVICES="0,1", **OFFLINE)
    assert found["driver"]["what"].startswith("2 x NVIDIA H200; driver 570.124.06")
    assert found["gpus"]["fix"] == "use engine.nproc=2, or take a machine with 4 GPUs"
    assert found["gpu-memory"]["fix"] == "let it end, or end it: kill 4711"
    assert found["torch-cuda"]["level"] == "failure"


def test_logins_and_a_gated_model(config: Path, tmp_path: Path) -> None:
    # R36, R59: 401 for a token that has expired, and for a licence that was not accepted
    hub = FakeHub()
    hub.token, hub.login = TOKEN, {"name": "ada", "auth": {"accessToken": {"role": "read"}}}
    hub.models["org/gated"] = {"1" * 40: {}}
    hub.gated.add("org/gated")
    (tmp_path / "chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    words = ["lora_default", "model.path=org/gated", "data.train=chats.jsonl", f"run_dir={tmp_path}/run"]
    with serve(hub):
        expired = f"hf_{'x' * 34}"
        refused = run_cli("doctor", *words, "--json", check=4, HF_ENDPOINT=hub.url, HF_TOKEN=expired).stdout
        assert expired not in refused
        found = {item["name"]: item for item in json.loads(refused) if item["level"] == "failure"}
        assert set(found) == {"token", "access"}
        assert "accept its terms" in found["access"]["fix"]
        allowed = findings(*words, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert allowed["token"]["what"] == "the token is that of ada (read)"
    assert allowed["access"]["what"] == "the model org/gated may be downloaded"
    assert allowed["clock"]["level"] == "ok"
    assert {path for path, _ in hub.requests} >= {"/api/whoami-v2", "/api/models/org/gated/auth-check"}


def test_a_model_that_is_not_here_without_a_network(tmp_path: Path) -> None:
    # R36
    (tmp_path / "chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    words = ["lora_default", "model.path=org/model", "data.train=chats.jsonl"]
    found = findings(*words, check=4, **OFFLINE)
    assert found["model-files"]["what"] == "the model org/model is not in the cache of the Hub"
    assert "hf download org/model" in found["model-files"]["fix"]


def test_a_paid_run_does_not_begin_where_its_output_is_lost(config: Path) -> None:
    # X6: named before torch is imported
    done = run_cli("train", config, "run_dir=/tmp/runs/x", check=4, RUNPOD_POD_ID="abc", **OFFLINE)
    what, _, fix = done.stderr.splitlines()
    assert what.startswith("error: one thing is wrong on this paid machine: /tmp/runs/x does not survive")
    assert "TRAINWAY_PAID=0" in fix
    assert not Path("/tmp/runs/x").exists()


IMPORTS = """
import sys
from trainway.cli.app import main
code = main(sys.argv[1:])
print(code, *sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""


@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_nothing_heavy_is_imported_to_say_so(verb: str, config: Path) -> None:
    command = [sys.executable, "-c", IMPORTS, verb, str(config), "run_dir=/tmp/runs/x"]
    environ = {**os.environ, **OFFLINE, "RUNPOD_POD_ID": "abc", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=300)
    assert done.stdout.splitlines()[-1] == "4", done.stderr


def test_a_hub_that_never_answers_does_not_hold_it_up(config: Path) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(8)
        hub = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        found = findings(config, HF_ENDPOINT=hub, HF_TOKEN=TOKEN)
    assert found["hub"]["level"] == "warning"
    assert found["token"]["what"].startswith("the token could not be tried: TimeoutError")
