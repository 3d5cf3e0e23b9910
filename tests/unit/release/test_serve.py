"""What a server would be started with: words for vLLM that no shell reads, and no secret among them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.release_material import finished_run
from tests.unit.release.test_merge import make_run
from trainway.errors import ConfigError, EnvironmentFault
from trainway.release import serve as serving
from trainway.release.serve import plan_serving
from trainway.release.text_stream import TextStream
from trainway.release.views import view_adapter, view_merged, view_model


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINWAY_VLLM_PYTHON", sys.executable)
    monkeypatch.setenv("TRAINWAY_API_KEY", "canary-51c0")


def test_a_whole_model(tmp_path: Path) -> None:
    run, _ = finished_run(tmp_path, "llama")
    plan = plan_serving(run, port=8123, options=["--max-model-len", "128"])
    assert (plan.backend, plan.name, plan.how) == ("vllm", "run", "plain")
    assert plan.command == (
        sys.executable,
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model=<temporary>", "--served-model-name=run", "--host=127.0.0.1", "--port=8123"),
        *("--max-model-len", "128"),
    )
    assert plan_serving(run / "checkpoints" / "step-1").name == "run"
    assert plan_serving(run, backend="transformers").command == ()
    assert "canary" not in json.dumps(plan.command)


def test_a_name_stays_one_word(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, "llama, tied")
    evil = "$(touch x);'\"\n<script>"
    plan = plan_serving(run, name=evil)
    assert plan.how == "adapter"
    (modules,) = [word for word in plan.command if word.startswith("--lora-modules=")]
    assert json.loads(modules.partition("=")[2]) == {"name": evil, "path": "<temporary>"}
    assert f"--model={(tmp_path / 'base').resolve()}" in plan.command
    assert f"--served-model-name={evil}-base" in plan.command
    assert {"--enable-lora", "--max-lora-rank=8", "--tokenizer=<temporary>"} <= set(plan.command)


@pytest.mark.parametrize(
    ("case", "obstacle"),
    [
        ("llama, dora and head", "DoRA"),
        ("gpt-oss", "adapted parameters (1.mlp.experts.gate_up_proj, 1.mlp.experts.down_proj)"),
        ("llama", "a rank or alpha for each module"),
    ],
)
def test_what_vllm_cannot_apply_is_merged_and_said(case: str, obstacle: str, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, case)
    plan = plan_serving(run)
    assert plan.how == "merged"
    assert plan.notes == (f"the adapter is merged into its base first: vLLM serves none with {obstacle}",)
    assert not any("lora" in word for word in plan.command)
    assert plan_serving(run, backend="transformers").how == "adapter"


def test_what_vllm_reads_is_complete(tmp_path: Path) -> None:
    """Links where the files are right already, the family's names where they are not, and where answers end."""
    run, _ = finished_run(tmp_path / "dense", "llama")
    view_model(run / "checkpoints/step-1/model", tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").is_symlink()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    ends = json.loads((tmp_path / "plain" / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends
    run, _ = finished_run(tmp_path / "moe", "qwen3_moe")
    view_model(run / "checkpoints/step-1/model", tmp_path / "published")
    assert any(".experts.3.up_proj" in name for name in load_file(tmp_path / "published/model.safetensors"))
    run, _ = make_run(tmp_path / "lora", "llama, tied")
    source = run / "checkpoints/step-7/model"
    view_adapter(source, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "tokenizer.json",
    }
    view_merged(source, tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("adapter*"))


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = finished_run(tmp_path, "llama")
    monkeypatch.setenv("TRAINWAY_VLLM_PYTHON", "/nowhere/python")
    with pytest.raises(EnvironmentFault, match="TRAINWAY_VLLM_PYTHON names /nowhere/python"):
        plan_serving(run)
    monkeypatch.delenv("TRAINWAY_VLLM_PYTHON")
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    assert plan_serving(run).backend == "transformers"
    with pytest.raises(EnvironmentFault, match="vLLM is not installed"):
        plan_serving(run, backend="vllm")
    with pytest.raises(ConfigError, match="options after -- are vLLM's"):
        plan_serving(run, options=["--max-model-len", "8"])
    monkeypatch.delenv("TRAINWAY_API_KEY")
    with pytest.raises(ConfigError, match="is open to other machines, and there is no key"):
        plan_serving(run, host="0.0.0.0")


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_the_child_ends_with_us(how: signal.Signals, tmp_path: Path) -> None:
    """A program that stands for vLLM, ended by a signal to us, of either kind."""
    run, _ = finished_run(tmp_path, "llama")
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nenv > "{tmp_path}/env"\necho "$@" > "{tmp_path}/args"\nexec sleep 300\n')
    program.chmod(0o755)
    environ = {**os.environ, "TRAINWAY_VLLM_PYTHON": str(program), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "trainway", "serve", str(run), "--port", "0"]
    ours = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not (tmp_path / "args").exists():
        assert ours.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    family = psutil.Process(ours.pid).children(recursive=True)
    assert len(family) >= 2
    words = (tmp_path / "args").read_text()
    assert "canary-51c0" not in words
    told = (tmp_path / "env").read_text()
    assert "VLLM_API_KEY=canary-51c0" in told and "VLLM_NO_USAGE_STATS=1" in told
    model = Path(words.split("--model=")[1].split()[0])
    assert (model / "config.json").exists()
    ours.send_signal(how)
    ours.communicate(timeout=60)
    assert ours.returncode == (0 if how == signal.SIGTERM else -signal.SIGKILL)
    _, left = psutil.wait_procs(family, timeout=40)
    assert not left
    assert not model.exists()


class Letters:
    """A tokenizer of one byte a token: a character may take several."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("Grüße, 世界! 👩‍👧", (), "Grüße, 世界! 👩‍👧"),
        ("one two three", ("two",), "one "),
        ("one two three", ("three!", "wo t"), "one t"),
        ("aab aaab", ("aaab",), "aab "),
        ("ends on", ("on and on",), "ends on"),
        ("", ("x",), ""),
    ],
)
def test_pieces_make_the_text(text: str, stop: tuple[str, ...], expected: str) -> None:
    stream = TextStream(Letters(), stop)  # type: ignore[arg-type]
    pieces = [stream.push(byte) for byte in text.encode()] + [stream.flush()]
    assert "".join(pieces) == expected
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.stopped == (expected != text)


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    stream = TextStream(Letters())  # type: ignore[arg-type]
    assert "".join([*(stream.push(byte) for byte in "aü".encode()[:2]), stream.flush()]) == "a\ufffd"
