"""Every command of the README is run, in order, as a stranger would type it (on a model of a size for tests)."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.conftest import run_cli, tiny, write_config
from tests.gad_material import teacher, tiny_gad
from tests.hub_server import Account, HubServer, serve_hub
from tests.sft_material import LORA, base_model, conversations, tiny_sft
from trainway.config.load import load_config, preset_names
from trainway.planning.geometry import describe_plan

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SCRIPTS = (
    "bash scripts/quickstart.sh",
    "bash scripts/test.sh",
)  # the first in test_quickstart.py; we are in the second


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.timeout(900)
def test_commands_run_in_order(
    tmp_path: Path, corpus: Path, store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(corpus, tmp_path / "corpus.jsonl")
    config = tiny(Path("corpus.jsonl"), store_dir, tmp_path, total_steps=6)
    del config["run_dir"], config["data"]["val_ratio"]  # some commands name validation sources
    config["schedule"] = {"warmup_steps": 2}
    write_config(tmp_path / "m3_medium.yaml", config)
    conversations(tmp_path / "chats.jsonl")
    base_model(tmp_path / "MODEL")
    for preset, sections in {"sft_small": {}, "lora_small": {"lora": LORA}}.items():
        tuning = tiny_sft(Path(), Path(), store_dir, tmp_path, **sections)
        del tuning["run_dir"], tuning["model"], tuning["data"]["train"]
        tuning["train"]["total_steps"] = 5
        write_config(tmp_path / f"{preset}.yaml", tuning)
    teacher(tmp_path / "teacher.jsonl")
    distilling = tiny_gad(
        Path(), Path(), store_dir, tmp_path, gad={"warmup_steps": 2, "adversarial_steps": 1}
    )
    del distilling["run_dir"], distilling["model"], distilling["data"]["train"]
    write_config(tmp_path / "gad_small.yaml", distilling)
    # the same verbs, on this machine
    (tmp_path / "job.yaml").write_text(
        "name: my-job\nconfig: m3_medium.yaml\ntarget: local\nat_end: {release: {to: released}}\n"
    )
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run = 0
    for command in commands():
        if command in SCRIPTS:
            continue
        program, *words = shlex.split(command)
        assert program == "trainway", command
        words = [f"{word}.yaml" if (tmp_path / f"{word}.yaml").exists() else word for word in words]
        if any("NAME" in word for word in words):
            (name,) = (path.name for path in (tmp_path / "runs").iterdir())
            words = [word.replace("NAME", name) for word in words]
        if words[0] in ("board", "serve"):
            assert served_until_interrupted(words).startswith("http://127.0.0.1:"), command
        elif words[0] == "chat":
            assert said_to(words, "Where is the north wind?\n"), command
        elif words[0] == "release" and "--dry-run" not in words:
            assert "v0.1" in released(words, tmp_path / "hub")
        else:
            done = run_cli(*words)
            assert done.stdout or done.stderr, command
        run += 1
    assert run >= 44
    for model in ("my-model", "sharded-model", "tuned-model", "merged", "student", "reward-model"):
        assert (tmp_path / model / "model.safetensors").exists()
    assert (tmp_path / "released/model.safetensors").exists()
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()


def served_until_interrupted(words: list[str]) -> str:
    """The address that a verb says it serves at, which answers; Ctrl-C ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "trainway", *words, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    found = None
    while found is None:
        line = process.stdout.readline()
        assert line, "it ended without an address"
        found = re.search(r"http://[\d.]+:\d+", line)
    path = "/v1/models" if words[0] == "serve" else "/"
    end = time.monotonic() + 120
    while (status := answer(found[0] + path)) != 200:
        assert process.poll() is None and time.monotonic() < end, status
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (0, 130)
    return found[0]


def answer(url: str) -> int:
    try:
        return httpx.get(url, timeout=30).status_code
    except httpx.HTTPError:
        return 0


def said_to(words: list[str], text: str) -> str:
    command = [sys.executable, "-m", "trainway", *words, "--max-new-tokens", "8"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def released(words: list[str], root: Path) -> dict[str, str]:
    """The tags of the repository on a Hub of our own, after the release."""
    token = "hf_" + "aB3" * 12
    with serve_hub(HubServer(root, {token: Account("me")})) as hub:
        run_cli(*words, HF_TOKEN=token, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
        return hub.tags("me/my-chat")


def test_python_example_runs(tmp_path: Path, corpus: Path, store_dir: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    shutil.copy(corpus, tmp_path / "corpus.jsonl")
    config = tiny(Path("corpus.jsonl"), store_dir, tmp_path / "run")
    write_config(tmp_path / "tiny.yaml", config)
    script = block.replace('"m3_medium"', '"tiny.yaml"').replace("total_steps=1000", "total_steps=6")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0
    assert (tmp_path / "my-model/config.json").exists()


def test_scripts_are_the_first_two_commands() -> None:
    assert commands()[:2] == list(SCRIPTS)
    for command in SCRIPTS:
        assert (ROOT / command.split()[1]).exists()


def test_table_of_presets_is_true() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+[MB]) \|", README, re.M))
    assert sorted(rows) == sorted(preset_names())
    assert rows["quickstart_tune"] == rows["quickstart"]  # its base is what the other makes
    for name, said in rows.items():
        if name == "quickstart_tune":
            continue
        total = describe_plan(load_config(name).config)["parameters"]["total"]
        assert float(said[:-1]) * {"M": 1e6, "B": 1e9}[said[-1]] == pytest.approx(total, rel=0.06), name
