"""`trainway plan` as a user runs it: without torch, with the exit codes of its page, and its page is true."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_cli
from tests.servers import QuietHandler, http_server
from trainway.config.load import preset_names
from trainway.planning.published import PUBLISHED

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/plan.md").read_text()
PRESETS = preset_names()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_preset_is_planned_without_torch() -> None:
    """In one process, so that it costs one start: torch, numpy and transformers must not be there at its end."""
    code = f"""
import sys
from trainway.cli.app import main
for name in {PRESETS!r}:
    count = "8" if name.startswith("gad_") and name != "gad_small" else "1"
    code = main(["plan", name, "--gpu", "H200", "--num-gpus", count, "--rows", "282000", "--json"])
    assert code in (0, 4), (name, code)
    code = main(["plan", name, "--gpu", "H200", "--num-gpus", count, "--rows", "282000"])
    assert code in (0, 4), (name, code)
heavy = {{"torch", "numpy", "transformers", "tokenizers", "huggingface_hub", "pyarrow"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"schema": 1') == len(PRESETS)
    assert done.stdout.count("where it fits, cheapest first") == len(PRESETS)
    assert done.stderr == ""


def test_commands_of_the_page_run() -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    codes = {}
    for line in block.strip().splitlines():
        program, *words = shlex.split(line)
        assert program == "trainway"
        done = run_cli(*words, check=None)
        assert done.stderr == "", line
        codes[line] = done.returncode
    assert len(codes) == 5 and set(codes.values()) == {0}, codes


def test_the_pages_python_is_true() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    fits, peak, step_s, hours, dollars, disk = done.stdout.split()
    assert fits == "True" and int(peak) > 2**30 and float(step_s) < float(hours) < float(dollars)
    assert int(disk) == 5 * 12 * 1_961_617_920


def test_exit_codes_and_their_words() -> None:
    fits = run_cli("plan", "runpod_2b", "--gpu", "a100", "--num-gpus", "1")
    assert re.search(r"^fits: [\d.]+ of 79\.1 GiB on each GPU, [\d.]+ free$", fits.stdout, re.M)
    assert "█" not in fits.stdout  # bars are for people
    short = run_cli("plan", "runpod_2b", "--gpu", "RTX-4090", "--num_gpus=1", check=4)
    assert "does not fit: " in short.stdout and "what would make room, each by itself" in short.stdout
    unknown = run_cli("plan", "runpod_2b", "--gpu", "H1O0", check=2)
    assert unknown.stderr.startswith("error: there is no GPU 'H1O0' in the catalogue\nwhy: near it are H100")
    assert run_cli("plan", "sft_small", "--gpu", "L4", "model.path=./none", check=3).stderr.startswith(
        "error: "
    )
    setting = run_cli("plan", "runpod_2b", "--gpu", "H100", "optim.lrr=1", check=2)
    assert "optim.lr" in setting.stderr


def test_json_is_stable() -> None:
    done = run_cli("plan", "gad_7b", "--gpu", "H200", "--num-gpus", "8", "--rows", "282000", "--json")
    found: dict[str, Any] = json.loads(done.stdout)
    assert list(found) == [
        "schema", "fits", "recipe", "engine", "precision", "model", "gpu", "geometry", "stages", "rows", "memory",
        "time", "cost", "disk", "advice", "fitting", "missing", "notes",
    ]  # fmt: skip
    assert found["geometry"]["steps_per_epoch"] == 1102
    assert found["model"]["total"] == 7_615_616_512
    memory = found["memory"]
    assert memory["estimate_bytes"] == sum(memory["parts_bytes"].values())
    assert memory["peak_bytes"] == max(memory["training_bytes"], memory["answering_bytes"])
    assert set(found["time"]["steps"]) == {"warmup", "adversarial"}
    assert found["cost"]["dollars"] == pytest.approx(
        found["time"]["hours"] * 8 * found["cost"]["price"]["usd_per_hour"]
    )
    assert found["time"]["efficiency"]["kind"] == "modelled"
    assert found["missing"] == []


class Answers(QuietHandler):
    """Both services that a plan may ask: RunPod's catalogue, and a Hub with one model."""

    def answer(self) -> None:
        if self.path == "/v2/catalog/gpus" and self.headers.get("Authorization") == "Bearer my-key":
            price = {"secure": 1.23, "community": 1.0}
            body: dict[str, Any] = {"gpus": [{"id": "NVIDIA H200", "secure": True, "price": price}]}
        elif self.path == "/somebody/else/resolve/main/config.json":
            body = PUBLISHED["Qwen/Qwen3-8B"]
        else:
            self.send_error(404)
            return
        self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})


def test_what_is_asked_of_the_network() -> None:
    words = ("plan", "lora_default", "--gpu", "H200", "--num-gpus", "1")
    with http_server(Answers) as url:
        asked = run_cli(*words, "--refresh-prices", TRAINWAY_RUNPOD_API=f"{url}/v2", RUNPOD_API_KEY="my-key")
        assert "$1.23 per GPU-hour" in asked.stdout
        kept = run_cli(*words)
        assert "$1.23 per GPU-hour" in kept.stdout
        refused = run_cli(*words, "--refresh-prices", TRAINWAY_RUNPOD_API=f"{url}/v2", RUNPOD_API_KEY="wrong")
        assert "note: prices are not refreshed: the catalogue answered 404" in refused.stdout
        assert "$1.23 per GPU-hour" in refused.stdout and "wrong" not in refused.stdout + refused.stderr
        hub = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": "hub"}
        other = run_cli(*words, "--model", "somebody/else", **hub)
        assert "somebody/else, 8.19B parameters" in other.stdout
        missing = run_cli(*words, "--model", "somebody/nothing", check=4, **hub)
        assert missing.stderr.startswith("error: the shape of somebody/nothing is not known here")
        offline = run_cli(*words, "--model", "somebody/else", check=4, **{**hub, "HF_HUB_OFFLINE": "1"})
        assert "HF_HUB_OFFLINE is set" in offline.stderr


def test_a_store_tells_the_rows(corpus: Path, store_dir: Path, tmp_path: Path) -> None:
    from tests.conftest import tiny, write_config

    own = tmp_path / "stores"
    config = write_config(tmp_path / "tiny.yaml", tiny(corpus, own, tmp_path / "run"))
    before = run_cli("plan", config, "--gpu", "L4")
    assert "missing: the rows of an epoch, so epochs: --rows N" in before.stdout
    prepared = json.loads(run_cli("prepare", config, "--json").stdout)
    tokens = prepared["manifest"]["splits"]["train"]["tokens"]
    found = json.loads(run_cli("plan", config, "--gpu", "L4", "--json").stdout)
    assert found["rows"]["count"] == tokens // 64
    assert found["rows"]["source"].startswith(f"prepared in {own}")
    assert found["geometry"]["steps_per_epoch"] == round(tokens // 64 / 8)
    with corpus.open("rb") as file:
        other = tmp_path / "other.jsonl"
        other.write_bytes(file.read()[:1000])
    changed = json.loads(run_cli("plan", config, f"data.train={other}", "--gpu", "L4", "--json").stdout)
    assert changed["rows"] is None
