"""The plan: what fits and what does not, steps, costs, disk, and what is said of what is not known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.unit.config.test_load import load
from tests.unit.planning.test_measured import ONE
from trainway.config.load import preset_names
from trainway.config.schema import RunConfig
from trainway.errors import ConfigError, DataError
from trainway.planning.gpus import find_gpu
from trainway.planning.headroom import FRAGMENTATION, GIB, NCCL_BYTES
from trainway.planning.measured import record
from trainway.planning.model_shape import find_shape
from trainway.planning.plan import Plan, make_plan, plan
from trainway.planning.plan_text import describe
from trainway.planning.published import PUBLISHED
from trainway.planning.rows import known_rows

ROWS = 282_000


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No measurement and no price of this machine gets into a test."""
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def on(name: str | dict[str, Any], gpu: str, num_gpus: int = 1, *words: str, nodes: int = 1, rows: int | None = None) -> Plan:  # fmt: skip
    config = load(name, list(words))
    return make_plan(
        config, gpu=find_gpu(gpu), num_gpus=num_gpus, num_nodes=nodes, rows_per_epoch=rows
    )  # fmt: skip


# ---- what the seeds claim


def test_two_billion_fit_on_one_a100_with_80_gb_and_not_with_40() -> None:
    # R4, R25
    assert on("runpod_2b", "A100-80").fits
    assert not on("runpod_2b", "A100-40").fits
    assert not on("runpod_2b", "RTX 4090").fits


def test_four_billion_fit_on_one_a100_as_configured_and_not_with_32_rows_at_once() -> None:
    # R25: the states alone are two thirds of the card; one row at a time with checkpointing leaves room
    found = on("runpod_4b", "A100-80")
    assert found.fits
    assert found.memory.weights + found.memory.optimizer == pytest.approx(12 * 3_722_382_336, rel=0.001)
    assert found.geometry.grad_accum_steps == 256
    assert not on("runpod_4b", "A100-80", 1, "micro_batch_size=32", "grad_accum_steps=8").fits
    plain = "activation_checkpointing=none"
    assert not on("runpod_4b", "A100-80", 1, plain, "micro_batch_size=4", "grad_accum_steps=64").fits


def test_full_fine_tuning_of_gpt_oss_20b_on_four_h100() -> None:
    # R4, R27, R28
    found = on("gpt_oss_20b_full", "H100 PCIe", 4)
    assert found.fits and found.config.engine.name == "zero3"
    assert not on("gpt_oss_20b_full", "H100 PCIe", 4, "cpu_offload=none").fits
    assert on("gpt_oss_20b_full", "H100 PCIe", 8, "cpu_offload=none").fits


def test_lora_of_gpt_oss_20b_on_four_h200() -> None:
    # R31-R33: 20 to 40 GB were reported; under ZeRO-2 the bf16 weights alone are 41.8 GB, and Axolotl reports 44 GiB
    found = on("gpt_oss_20b_lora", "H200", 4)
    assert found.fits
    assert found.memory.weights / 1e9 == pytest.approx(41.9, abs=0.2)
    assert found.headroom.peak_bytes / GIB == pytest.approx(44, rel=0.15)
    sharded = on("gpt_oss_20b_lora", "H200", 4, "engine=zero3")
    assert 15 < sharded.headroom.peak_bytes / 1e9 < 40


def test_235_billion_on_eight_gpus_are_refused_with_what_would_fit() -> None:
    # X5: 16 bytes of each parameter are 3.8 TB
    config = load("gad_235b")
    found = plan(config, "B200", 8, rows=ROWS)
    assert not found.fits
    text = describe(found, "gad_235b")
    assert "all 235.09B parameters trained are 3.76 TB" in text
    assert "engine.cpu_offload=all saves" in text
    assert "lora=true" not in text  # a vLLM server takes whole models only: that would be refused
    assert found.fitting and all(
        fit.num_nodes > 1 and fit.peak_bytes <= fit.device_bytes for fit in found.fitting
    )
    tuned = {
        "recipe": "sft",
        "model": {"path": "Qwen/Qwen3-235B-A22B-Instruct-2507"},
        "engine": {"name": "fsdp"},
    }
    train = {
        "epochs": 1,
        "seq_len": 2048,
        "micro_batch_size": 1,
        "precision": "bf16",
        "activation_checkpointing": "full",
    }
    whole = plan(load(tuned | {"train": train, "data": {"train": ["x.jsonl"]}}), "H200", 8)
    assert not whole.fits
    assert {"lora=true", "engine.cpu_offload=all"} <= {item.change for item in whole.advice}
    assert all(fit.num_nodes > 1 for fit in whole.fitting)


# ---- steps


@pytest.mark.parametrize(
    ("name", "steps"), [("gad_3b", 1102), ("gad_7b", 1102), ("gad_14b", 2203), ("gad_235b", 4406)]
)
def test_steps_of_an_epoch_of_282_000_rows(name: str, steps: int) -> None:
    # X4, R38
    found = on(name, "B200", 8, rows=ROWS)
    assert found.geometry.steps_per_epoch == steps
    assert found.stages is not None
    assert [stage.steps for stage in found.stages] == [round(2 * ROWS / found.geometry.global_batch_size), round(4 * ROWS / found.geometry.global_batch_size)]  # fmt: skip
    assert f"{steps:,} an epoch of 282,000 rows (given)" in describe(found, name)


def test_what_is_not_known_is_named() -> None:
    found = on("gad_7b", "B200", 8)
    assert (found.hours, found.dollars, found.geometry.total_steps) == (None, None, None)
    assert found.step_s is not None
    assert "--rows N" in found.missing[0]
    assert "missing: the rows of an epoch" in describe(found, "gad_7b")
    unpriced = on("runpod_1b", "RTX 3090", 8, "engine=fsdp")
    assert unpriced.hours is not None and unpriced.dollars is None
    assert "the price of RTX 3090: --price USD" in unpriced.missing
    cpu = on("cpu_small", "cpu")
    assert cpu.step_s is None and any("trainway bench" in what for what in cpu.missing)


def test_rows_are_counted_where_that_is_cheap(tmp_path: Path) -> None:
    rows = [{"content": [{"role": "user", "content": "hi"}], "teacher_response": "yes"}] * 200
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))  # no newline at the end
    found = known_rows(load("gad_small", ["data.train=t.jsonl"]))
    assert found is not None and (found.count, found.fill) == (190, None)  # 5 % are held out
    assert found.source == "200 records in 1 file"
    parquet.write_table(
        pa.table({"content": ["x"] * 500, "teacher_response": ["y"] * 500}), tmp_path / "t.parquet"
    )
    kept = known_rows(load("gad_7b", ["data.train=t.parquet", "data.validation=t.parquet"]))
    assert kept is not None and kept.count == 500
    # packed conversations and documents have to be tokenised first; a directory elsewhere cannot be read
    assert known_rows(load("sft_small", ["data.train=t.jsonl"])) is None
    assert known_rows(load("runpod_1b")) is None
    plain = known_rows(load("sft_small", ["data.train=t.jsonl", "packing=none"]))
    assert plain is not None and plain.count == 190


# ---- costs


def test_dollars_are_hours_times_gpus_times_the_price() -> None:
    found = on("runpod_2b", "H100", 8)
    assert found.price is not None and found.hours is not None and found.step_s is not None
    assert found.dollars == pytest.approx(found.hours * 8 * found.price.usd_per_hour)
    assert found.hours > 400_000 * found.step_s / 3600
    assert found.hours == pytest.approx(400_000 * found.step_s / 3600, rel=0.02)  # with evaluations and saves
    given = plan(load("runpod_2b"), "H100", 8, price=1.0)
    assert given.dollars == pytest.approx(given.hours and given.hours * 8)
    assert "at $1.00 per GPU-hour (given, by --price)" in describe(given, "x")
    assert found.price.date in describe(found, "x")


def test_disk_of_the_checkpoints() -> None:
    found = on("runpod_2b", "H100", 8)
    each = 12 * 1_961_617_920  # fp32 weights and two moments
    assert (found.disk.each_checkpoint, found.disk.copies, found.disk.model) == (
        each,
        5,
        0,
    )  # keep 3, best, in work
    assert found.checkpoint_bytes == 5 * each == found.disk_bytes
    assert on("runpod_2b", "H100", 8, "total_steps=4000").disk.copies == 2  # it saves twice
    muon = on("runpod_2b", "H100", 8, "optim=muon").disk.each_checkpoint
    matrices = 24 * (4 * 2560 * 2560 + 3 * 2560 * 6784)
    assert muon == each - 4 * matrices
    lora = on("lora_default", "H100").disk
    assert lora.each_checkpoint == 12 * 36 * 16 * (2 * 4096 + 2 * 2304)
    assert lora.model == 2 * 3_085_938_688
    # student and discriminator (without a head), and the reference's checkpoint
    gad = on("gad_7b", "B200", 8, rows=ROWS).disk
    assert gad.each_checkpoint == 12 * (2 * 7_615_616_512 - 152_064 * 3584)
    assert gad.copies == 6


# ---- memory


def test_every_part_is_counted_and_the_allowance_is_stated() -> None:
    one, eight = on("runpod_1b", "H100"), on("runpod_1b", "H100", 8)
    for found in (one, eight):
        head = found.headroom
        assert head.peak_bytes == found.memory.total + head.allowance_bytes
        assert head.free_bytes == find_gpu("H100").memory_bytes - head.peak_bytes
        assert sum(found.to_json()["memory"]["parts_bytes"].values()) == found.memory.total
    assert one.headroom.allowance_bytes == GIB + round(FRAGMENTATION * one.memory.total)
    assert eight.headroom.allowance_bytes == GIB + NCCL_BYTES + round(FRAGMENTATION * eight.memory.total)


def test_a_vllm_server_shares_the_gpu() -> None:
    found = on("gad_7b", "H100", 8, rows=ROWS)
    head = found.headroom
    assert head.server_bytes == round(0.7 * find_gpu("H100").memory_bytes)
    assert (
        head.answering_bytes
        == found.memory.weights + found.memory.optimizer + head.server_bytes + GIB + NCCL_BYTES
    )
    share = next(item.change for item in found.advice if item.change.startswith("rollout.memory_share="))
    assert on("gad_7b", "H100", 8, share, rows=ROWS).fits
    assert head.training_bytes == found.memory.total + head.allowance_bytes
    assert head.is_answering and head.peak_bytes == head.answering_bytes
    elsewhere = on("gad_7b", "H100", 8, "rollout.url=http://other:8000", rows=ROWS)
    assert elsewhere.fits and elsewhere.headroom.server_bytes == 0
    assert on("gad_7b", "H100", 8, "gad=seqkd", rows=ROWS).headroom.server_bytes == 0
    tight = on("gad_7b", "H200", 8, "rollout.tensor_parallel=1", "rollout.memory_share=0.1", rows=ROWS)
    assert not tight.fits and "raise rollout.tensor_parallel" in describe(tight, "x")


@pytest.mark.parametrize(
    ("name", "gpu", "words"),
    [
        ("runpod_2b", "RTX 5090", []),
        ("lora_default", "RTX 4090", []),
        ("sft_small", "L4", ["train.micro_batch_size=64", "train.global_batch_size=64"]),
    ],
)
def test_advice_that_is_enough_is_enough(name: str, gpu: str, words: list[str]) -> None:
    found = on(name, gpu, 1, *words)
    assert not found.fits and found.advice
    for item in found.advice:
        # a preset that gives the global batch has no accumulation to give
        change = [
            word for word in item.change.split() if "grad_accum_steps" not in word or name != "sft_small"
        ]
        settings = dict(word.split("=") for word in [*words, *change])
        changed = on(name, gpu, 1, *(f"{key}={value}" for key, value in settings.items()))
        assert changed.headroom.peak_bytes < found.headroom.peak_bytes, item.change
        if item.saves_bytes >= -found.headroom.free_bytes:
            assert changed.fits, item.change


def test_where_it_fits_is_cheapest_first_and_true() -> None:
    found = plan(load("runpod_4b"), "A100-80", 1)
    costs = [fit.dollars for fit in found.fitting if fit.dollars is not None]
    assert costs == sorted(costs) and len(costs) >= 10
    for fit in found.fitting:
        words = fit.change.split()
        again = on("runpod_4b", fit.gpu, fit.num_gpus, *words, nodes=fit.num_nodes)
        assert again.fits and again.headroom.peak_bytes == fit.peak_bytes, fit
        if fit.num_gpus > 1 and words:
            assert not on("runpod_4b", fit.gpu, fit.num_gpus // 2, *words).fits, fit
    small = {fit.gpu: fit for fit in found.fitting}
    assert small["RTX 4090"].change == "engine.name=fsdp" and small["H200"].change == ""


def test_without_a_gpu_the_cheapest_is_taken() -> None:
    found = plan(load("runpod_2b"))
    first = next(fit for fit in found.fitting if not fit.change)  # as it is configured
    assert (found.gpu.name, found.num_gpus, found.num_nodes) == (first.gpu, first.num_gpus, first.num_nodes)
    assert found.fits
    eight = plan(load("gad_7b"), num_gpus=8)
    assert eight.fits and eight.num_gpus == 8


def test_offload_asks_for_memory_that_machines_have() -> None:
    found = plan(load("gpt_oss_20b_full"), "H100", 4, rows=20_000)
    for fit in found.fitting:
        assert 16 * 20_914_757_184 / fit.num_gpus / fit.num_nodes <= find_gpu(fit.gpu).host_gib * GIB, fit


# ---- measurements


def test_a_measurement_marks_what_it_replaces(home: Path) -> None:
    config = load("runpod_2b")
    before = plan(config, "H200", 1)
    assert before.efficiency is not None and before.efficiency.kind == "modelled"
    record(replace(ONE, parameters=1_961_617_920, trainable=1_961_617_920, micro_batch_size=2, peak_bytes=33 * GIB, planned_bytes=30 * GIB))  # fmt: skip
    after = plan(config, "H200", 1)
    assert after.efficiency is not None and after.efficiency.kind == "measured"
    assert after.headroom.correction == pytest.approx(1.1)
    assert after.headroom.peak_bytes > before.headroom.peak_bytes
    text = describe(after, "x")
    assert (
        "50% of the peak, measured: bench of 2026-11-20: pretrain of 1.96B, 1 x NVIDIA H200, single" in text
    )
    assert "1.10 times the estimate, as measured" in text
    assert plan(config, "H100", 1).headroom.correction == 1.0
    record(replace(ONE, date="2026-11-21", parameters=1_961_617_920, trainable=1_961_617_920, micro_batch_size=2, peak_bytes=330 * GIB))  # fmt: skip
    assert plan(config, "H200", 1).headroom.correction == 1.0  # ten times the plan is of something else


def test_a_measured_cpu_has_hours(home: Path) -> None:
    record(replace(ONE, device="cpu", precision="fp32", parameters=5_868_800, trainable=5_868_800, seq_len=256,
                   micro_batch_size=16, flops_per_step=1e12, step_s=10.0, gemm_flops=2e11))  # fmt: skip
    found = on("cpu_small", "cpu")
    assert found.step_s is not None and found.hours is not None and found.dollars is None
    assert found.precision == "fp32" and found.missing == ("the rows of an epoch, so epochs: --rows N",)


# ---- every preset, every model


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("gpu", ["H100", "cpu"])
def test_every_preset_has_a_plan(name: str, gpu: str) -> None:
    config = load(name)
    found = plan(config, gpu, config.rollout.tensor_parallel if gpu == "H100" else 1, rows=ROWS)
    assert found.to_json() == json.loads(json.dumps(found.to_json()))
    text, drawn = describe(found, name), describe(found, name, bars=True)
    assert "█" not in text and drawn.count("█") >= 1
    assert all(len(line) < 240 for line in drawn.splitlines())
    assert found.parameters.total > 1e6 and found.disk_bytes > 0
    if gpu == "H100":
        assert found.hours is not None and math.isfinite(found.hours) and found.dollars is not None


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_has_a_plan(name: str) -> None:
    for words in (["lora=false"], [], ["lora.quantize=4bit"]):
        config = load("lora_default", [f"model.path={name}", *words])
        found = make_plan(config, gpu=find_gpu("H200"), num_gpus=1, num_nodes=1)
        assert found.memory.total > 0 and found.step_s is not None
        assert (found.parameters.trainable < found.parameters.total) == config.lora.enabled


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp", "zero2", "zero3"])
def test_every_engine_has_a_plan(engine: str) -> None:
    ranks = 1 if engine == "single" else 4
    for words in ([], ["lora=true"]):
        found = on("sft_small", "H100", ranks, f"engine={engine}", *words)
        assert found.fits and found.step_s is not None


def test_a_models_own_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen/Qwen3-30B-A3B"]))
    (tmp_path / "other.json").write_text(json.dumps(PUBLISHED["Qwen/Qwen3-8B"]))
    for path, total in ((tmp_path, 30_532_122_624), (tmp_path / "config.json", 30_532_122_624), (tmp_path / "other.json", 8_190_735_360)):  # fmt: skip
        shape = find_shape(load("lora_default", [f"model.path={path}"]))
        assert sum(weight.size for weight in shape.weights()) == total
    found = on("lora_default", "H200", 1, f"model.path={tmp_path}")
    assert found.parameters.active < found.parameters.total / 8
    assert found.disk.model == 0


@pytest.mark.parametrize(
    ("content", "error", "what"),
    [
        ("{", DataError, "cannot read the config.json"),
        ("[]", DataError, "cannot read the config.json"),
        ('{"model_type": "llama"}', DataError, "cannot read the config.json"),
        ('{"model_type": "mamba"}', ConfigError, "the family 'mamba' is not known"),
    ],
)
def test_a_file_that_tells_no_shape(tmp_path: Path, content: str, error: type[Exception], what: str) -> None:
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(error, match=what):
        find_shape(load("lora_default", [f"model.path={tmp_path}/model.json"]))


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no model at"):
        find_shape(load("lora_default", ["model.path=./nothing"]))
    with pytest.raises(DataError, match=r"has no config\.json"):
        find_shape(load("lora_default", [f"model.path={tmp_path}"]))
    unknown = RunConfig.model_validate({"tokenizer": {"path": "tok"}, "train": {"total_steps": 500}})
    with pytest.raises(ConfigError, match="vocabulary is not known"):
        find_shape(unknown)


@pytest.mark.parametrize(
    ("words", "gpus", "nodes", "what"),
    [
        ([], 0, 1, "0 GPUs"),
        ([], 1, 0, "1 GPUs in each of 0 nodes"),
        (["engine=single"], 2, 1, "engine.name=single uses one GPU of 2"),
        (
            ["recipe=gad", "rollout.engine=vllm", "rollout.tensor_parallel=4"],
            2,
            1,
            "tensor_parallel is 4, with 2",
        ),
        (["global_batch_size=6", "micro_batch_size=2"], 4, 1, "not divisible"),
    ],
)
def test_what_cannot_be_a_plan(words: list[str], gpus: int, nodes: int, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        on("sft_small", "H100", gpus, *words, nodes=nodes)


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.parquet").write_text("{}\n")
    with pytest.raises(DataError, match=r"t\.parquet: not a Parquet file") as raised:
        known_rows(load("gad_7b", ["data.train=t.parquet", "data.validation=t.parquet"]))
    assert "smaller than the minimum" in raised.value.why
