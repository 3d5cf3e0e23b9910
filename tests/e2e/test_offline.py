"""Without a network, a local directory is all that a model to start from needs (R36)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.base_models import save, tiny_model
from tests.conftest import metrics, run_cli, write_config
from tests.sft_material import EXPERT_LORA, LORA, base_model, conversations, tiny_sft

NO_NETWORK = """
import socket

def refuse(*arguments, **settings):
    raise AssertionError(f"somebody asked for the network: {arguments[1:]}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""

LOAD = (
    NO_NETWORK
    + """
import sys
from pathlib import Path

import torch
from trainway.checkpoint.weights import model_pieces
from trainway.data.tokenizer import load_tokenizer
from trainway.errors import UserError
from trainway.models.base import BaseWeights, build_base, find_base
from trainway.models.load import allocate

try:
    base = find_base(sys.argv[1], cache=Path(sys.argv[2]))
except UserError as error:
    print(error)
    sys.exit(error.code)
tokenizer = load_tokenizer(base.directory)
model = build_base(base, dtype=torch.float32)
allocate(model, model, device="cpu")
BaseWeights(base)(model_pieces(model).items())
ids = torch.tensor([tokenizer.encode("abc")])
with torch.no_grad():
    print(model(ids).logits.sum().item())
"""
)


def load(directory: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    environ |= {"HF_HOME": str(cache / "no-hub"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, str(directory), str(cache)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environ)


def test_r36_a_local_directory_needs_no_network(tmp_path: Path) -> None:
    directory = save(
        tiny_model("qwen3_moe"), tmp_path / "model", max_shard_size="40KB"
    )  # one that is imported
    done = load(directory, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout.splitlines()[-1])) > 0

    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    (directory / "tokenizer.json").unlink()
    done = load(directory, tmp_path / "cache")
    assert done.returncode == 3, done.stderr
    what, why, fix = done.stdout.splitlines()[-3:]
    assert what == f"{directory}: 2 files are missing"
    assert why == f"{directory} lacks tokenizer.json, {shard.name}"
    assert fix.startswith("copy the whole directory")


@pytest.mark.parametrize(
    ("family", "lora"), [pytest.param("llama", LORA, marks=pytest.mark.slow), ("gpt_oss", EXPERT_LORA)]
)
def test_a_run_from_its_data_to_its_export_needs_no_network(
    tmp_path: Path, family: str, lora: dict[str, object]
) -> None:
    (tmp_path / "python").mkdir()
    (tmp_path / "python/sitecustomize.py").write_text(NO_NETWORK)
    base = base_model(tmp_path / "model", family)
    chats = conversations(tmp_path / "chats.jsonl")
    config = tiny_sft(base, chats, tmp_path / "store", tmp_path / "run", lora=lora, train={"total_steps": 6})
    environ = {"PYTHONPATH": str(tmp_path / "python"), "HF_HOME": str(tmp_path / "no-hub")}
    path = write_config(tmp_path / "c.yaml", config)
    said = run_cli("train", path, **environ).stderr
    assert "trainable " in said
    assert len(metrics(tmp_path / "run")) == 6
    run_cli("export", tmp_path / "run", "--merge", "--out", tmp_path / "merged", **environ)
    assert (tmp_path / "merged/model.safetensors").exists()
    (base / "model.safetensors").unlink()
    refused = run_cli("train", path, "--resume", "never", check=3, **environ).stderr
    assert f"{base} lacks model.safetensors" in refused
