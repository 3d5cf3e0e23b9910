"""`trainway bench`: the steps that a run would take, what they are like, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trainway
from tests.conftest import kill_all, metrics, run_cli, tiny, wait_for, write_config
from tests.gad_material import teacher, tiny_gad
from tests.sft_material import LORA, base_model, conversations, tiny_sft
from trainway.cli.app import main
from trainway.config.load import load_config
from trainway.planning.measured import load_measurements
from trainway.recipes.bench_result import BenchResult

PHASES = ["data", "forward", "backward", "optimizer", "other"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    base_model(root / "base")
    conversations(root / "chats.jsonl")
    teacher(root / "teacher.jsonl")
    return root


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
        for path in sorted(directory.rglob("*"))
    }


def measure(tmp_path: Path, config: dict[str, Any], **how: Any) -> BenchResult:
    """Benchmark in this process; the run's directory must not come into being, nor anything beside it."""
    (tmp_path / "runs").mkdir()
    config["run_dir"] = str(tmp_path / "runs" / "run")
    loaded = load_config(write_config(tmp_path / "c.yaml", config)).config
    found = trainway.bench(loaded, **how)
    assert list((tmp_path / "runs").iterdir()) == []
    assert isinstance(found, BenchResult)
    return found


def check_part(part: Any, steps: int, phases: list[str] = PHASES) -> None:
    """What holds of every part by construction."""
    spread = part.step_s
    assert part.steps == steps
    assert 0 < spread.least <= spread.quartiles[0] <= spread.median <= spread.quartiles[1] <= spread.most
    assert list(part.phases) == phases
    assert all(seconds >= 0 for seconds in part.phases.values())
    assert sum(part.phases.values()) == pytest.approx(spread.mean, rel=1e-9)
    assert part.tokens_per_s == pytest.approx(part.tokens_per_step / spread.mean)
    assert part.supervised_tokens_per_s == pytest.approx(part.supervised_per_step / spread.mean)
    assert 0 < part.supervised_per_step < part.tokens_per_step


def test_json_of_a_pretraining(tmp_path: Path, corpus: Path, store_dir: Path) -> None:
    config = tiny(corpus, store_dir, tmp_path / "runs" / "run", total_steps=40)
    # a run of other settings lies there, and a benchmark is no business of it
    (tmp_path / "runs" / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "config.yaml").write_text("recipe: sft\n")
    before = tree(tmp_path / "runs")
    path, trace = write_config(tmp_path / "c.yaml", config), tmp_path / "trace.json"
    done = run_cli(
        "bench", path, "--steps", 6, "--gpu-price", 3.6, "--json", "--trace", trace,
        TRAINWAY_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert tree(tmp_path / "runs") == before
    assert set(found) == {
        "recipe", "device", "world_size", "engine", "precision", "parameters", "trainable", "warm_up_steps", "parts",
        "flops_per_token", "gemm_flops", "memory", "forecast", "trace", "measurement",
    }  # fmt: skip
    assert (found["recipe"], found["device"], found["engine"]) == ("pretrain", "cpu", "single")
    (part,) = found["parts"]
    assert set(part) == {
        "name", "steps", "run_steps", "step_s", "phases", "tokens_per_step", "supervised_per_step", "tokens_per_s",
        "supervised_tokens_per_s", "mfu", "gemm_share", "gad_s", "communication",
    }  # fmt: skip
    assert (part["name"], part["steps"], part["run_steps"]) == ("train", 6, 40)
    assert part["tokens_per_step"] == 8 * 64
    assert part["communication"] is None  # there is nobody to talk to
    share = part["tokens_per_s"] * found["flops_per_token"] / found["gemm_flops"]
    assert part["mfu"] == part["gemm_share"] == pytest.approx(share)

    forecast = found["forecast"]
    assert (forecast["steps"], forecast["evaluations"], forecast["saves"]) == (40, 5, 4)
    assert forecast["steps_s"] == pytest.approx(40 * part["step_s"]["mean"])
    assert forecast["training_s"] == pytest.approx(
        forecast["steps_s"] + 5 * forecast["evaluation_s"] + 3 * forecast["save_s"] + forecast["last_save_s"]
    )
    assert forecast["seconds"] == pytest.approx(forecast["start_s"] + forecast["training_s"])
    assert forecast["dollars"] == pytest.approx(forecast["seconds"] / 1000)
    assert forecast["save_basis"] == "measured" and forecast["save_bytes"] > 12 * found["parameters"]

    assert (
        found["memory"]["peak_bytes"]
        >= found["memory"]["longest_batch_bytes"]
        > found["memory"]["planned_bytes"]
    )
    events = json.loads(trace.read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)

    (kept,) = load_measurements(tmp_path / "home" / "measured")
    assert found["measurement"].startswith(str(tmp_path / "home"))
    assert (kept.source, kept.recipe, kept.family, kept.world_size) == ("bench", "pretrain", "llama", 1)
    assert (kept.step_s, kept.tokens_per_step) == (part["step_s"]["median"], 512)
    assert kept.flops_per_step == pytest.approx(512 * found["flops_per_token"])
    assert (kept.peak_bytes, kept.planned_bytes) == (
        found["memory"]["peak_bytes"],
        found["memory"]["planned_bytes"],
    )
    assert (kept.micro_batch_size, kept.seq_len, kept.gemm_flops) == (2, 64, found["gemm_flops"])


def test_text_of_a_fine_tuning_and_the_longest_batch_first(
    tmp_path: Path, material: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_sft(
        material / "base", material / "chats.jsonl", material / "stores", tmp_path / "run",
        data={"packing": "none"}, log={"level": "debug", "batches": "all"},
    )  # fmt: skip
    path = write_config(tmp_path / "c.yaml", config)
    assert main(["bench", str(path), "--steps", "5", "--no-record"]) == 0
    said = capsys.readouterr()
    widths = [int(width) for width in re.findall(r"2 rows of (\d+) tokens", said.err)]
    assert len(widths) == 4 * (3 + 5)
    assert widths[0] == max(widths) and widths[0] > statistics.median(widths)
    for word in (
        "step ",
        "quartiles",
        "tokens/s",
        "of a matrix product",
        "backward",
        "peak",
        "the plan:",
        "forecast",
    ):
        assert word in said.out
    assert "measurement" not in said.out
    assert not (tmp_path / "run").exists() and sorted(tmp_path.iterdir()) == [path]


def test_adapters(tmp_path: Path, material: Path) -> None:
    config = tiny_sft(
        material / "base", material / "chats.jsonl", material / "stores", tmp_path / "run", lora=LORA
    )
    found = measure(tmp_path, config, steps=4, gpu_price=None, record=False)
    check_part(found.parts[0], 4)
    assert found.trainable < found.parameters / 10
    assert found.forecast.dollars is None and found.measurement is None
    assert found.forecast.save_bytes < 4 * found.parameters  # of adapters alone
    assert found.memory.peak_bytes >= found.memory.longest_batch_bytes > 0


def test_distillation_stage_by_stage(tmp_path: Path, material: Path) -> None:
    config = tiny_gad(material / "base", material / "teacher.jsonl", material / "stores", tmp_path / "run")
    found = measure(tmp_path, config, steps=4, record=False)
    assert [(part.name, part.run_steps) for part in found.parts] == [("warmup", 4), ("adversarial", 4)]
    for part in found.parts:
        check_part(part, 2, ["data", "rollout", "forward", "backward", "optimizer", "other"])
        assert set(part.gad_s) == {"rollout", "score", "discriminator", "student"}
        assert sum(part.gad_s.values()) < part.step_s.mean
        assert part.mfu is None
    warmup, adversarial = found.parts
    # in the first of the four steps of the warm-up the student does not learn
    expected = 4 * warmup.step_s.mean - warmup.gad_s["student"] + 4 * adversarial.step_s.mean
    assert found.forecast.steps_s == pytest.approx(expected)
    assert (found.forecast.evaluations, found.forecast.saves) == (5, 4)


def test_two_processes(tmp_path: Path, corpus: Path, store_dir: Path) -> None:
    path = write_config(tmp_path / "c.yaml", tiny(corpus, store_dir, tmp_path / "run"))
    done = run_cli("bench", path, "--steps", 4, "--nproc", 2, "--json", "--no-record")
    found = json.loads(done.stdout)
    assert (found["engine"], found["world_size"]) == ("ddp", 2)
    (part,) = found["parts"]
    assert part["tokens_per_step"] == 512
    assert 500 < part["supervised_per_step"] < 512
    assert sum(part["phases"].values()) == pytest.approx(part["step_s"]["mean"], rel=1e-9)
    talk = part["communication"]
    assert 0 <= talk["exposed_s"] <= talk["busy_s"] and talk["busy_s"] > 0
    assert len(found["memory"]["ranks"]) == 2
    assert found["memory"]["peak_bytes"] == max(found["memory"]["ranks"])
    assert found["forecast"]["gpus"] == 1  # one machine without a GPU
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_under_an_outside_launcher(tmp_path: Path, corpus: Path, store_dir: Path) -> None:
    path = write_config(tmp_path / "c.yaml", tiny(corpus, store_dir, tmp_path / "run"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "trainway", "bench", str(path), "--steps", "2", "--json", "--no-record"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["world_size"] == 2
    assert sorted(tmp_path.iterdir()) == [path]


def test_memory_that_is_not_there_is_said_as_by_train(
    tmp_path: Path, corpus: Path, store_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "c.yaml", tiny(corpus, store_dir, tmp_path / "run"))
    said = {}
    for verb in ("train", "bench"):
        assert main([verb, str(path), "model.vocab_size=10000000000000"]) == 4
        said[verb] = [
            line for line in capsys.readouterr().err.splitlines() if line[:5] in ("error", "why: ", "fix: ")
        ]
    assert said["bench"] == said["train"]
    assert "memory is full" in said["bench"][0] and "the plan: about" in said["bench"][1]
    assert not [name for name in os.listdir(tmp_path) if "bench" in name]


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["--steps", "0"], 2, "--steps is 0"),
        (["--gpu-price", "-1"], 2, "--gpu-price is -1"),
        (["--trace", "trace.txt"], 2, ".json"),
        (["--trace", "nowhere/trace.json"], 2, "no directory nowhere"),
        (["--nproc", "none"], 2, "--nproc is 'none'"),
        (["train.global_batch_size=9"], 2, "not divisible"),
        (["data.train=missing.jsonl"], 3, "missing.jsonl"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, corpus: Path, store_dir: Path, capsys: pytest.CaptureFixture[str],
    words: list[str], code: int, named: str,
) -> None:  # fmt: skip
    path = write_config(tmp_path / "c.yaml", tiny(corpus, store_dir, tmp_path / "run"))
    assert main(["bench", str(path), *words]) == code
    said = capsys.readouterr()
    assert named in said.err and said.out == ""
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_benchmark_that_is_stopped_saves_nothing(tmp_path: Path, corpus: Path, store_dir: Path) -> None:
    path = write_config(tmp_path / "c.yaml", tiny(corpus, store_dir, tmp_path / "run"))
    log = tmp_path / "said.txt"
    command = [sys.executable, "-m", "trainway", "bench", str(path), "--steps", "1000000"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            start_new_session=True,
            stdout=file,
            stderr=file,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
    try:
        wait_for(lambda: "step 10/" in log.read_text(), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 75
    finally:
        if process.poll() is None:
            kill_all(process)
    assert "stopped: a benchmark saves nothing" in log.read_text()
    assert sorted(tmp_path.iterdir()) == [path, log]


def test_a_finished_run_is_measured_too(
    tmp_path: Path, material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path / "home"))
    config = tiny_sft(
        material / "base", material / "chats.jsonl", material / "stores", tmp_path / "run", lora=LORA
    )
    trainway.train(load_config(write_config(tmp_path / "c.yaml", config)).config)
    (kept,) = load_measurements()
    steps = [float(str(record["perf/step_s"])) for record in metrics(tmp_path / "run")]
    assert kept.step_s == pytest.approx(statistics.median(steps[3:]))
    assert (kept.source, kept.recipe, kept.engine, kept.gemm_flops) == ("run", "sft", "single", 0.0)
    assert kept.trainable < kept.parameters / 10
    assert kept.attention == "trainway_packed"


def test_a_measurement_that_cannot_be_kept_does_not_end_a_run(
    tmp_path: Path,
    corpus: Path,
    store_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path / "home"))
    path = write_config(tmp_path / "c.yaml", tiny(corpus, store_dir, tmp_path / "run"))
    assert main(["train", str(path)]) == 0
    assert "the measurement of these steps is not kept" in capsys.readouterr().err
