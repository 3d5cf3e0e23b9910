"""The stages of a run of recipe gad."""

from __future__ import annotations

from typing import Any

import pytest

from trainway.config.load import load_config
from trainway.config.schema import RunConfig
from trainway.errors import ConfigError
from trainway.planning.gad import describe_stages, gad_stages, stage_of
from trainway.planning.geometry import describe_plan, resolve_geometry

ROWS = 282_000


def config(*words: str, **gad: Any) -> RunConfig:
    base = {"recipe": "gad", "model": {"path": "./student"}, "gad": gad, "train": {"global_batch_size": 256}}
    return load_config(base | {"schedule": {"warmup_steps": 0, "name": "constant"}}, words).config


@pytest.mark.parametrize(("prompts", "steps"), [(256, 1102), (128, 2203), (64, 4406)])
def test_steps_of_an_epoch_follow_from_rows_and_batch(prompts: int, steps: int) -> None:
    geometry = resolve_geometry(config(f"global_batch_size={prompts}"), 8, ROWS)
    assert geometry.steps_per_epoch == steps


def test_all_is_warmup_then_adversarial() -> None:
    stages = gad_stages(config(), ROWS)
    assert stages is not None
    assert [(stage.name, stage.before, stage.steps) for stage in stages] == [
        ("warmup", 0, 2203),
        ("adversarial", 2203, 4406),
    ]
    assert describe_stages(stages) == (
        "warmup 2,203 steps (2.00 epochs) + adversarial 4,406 steps (4.00 epochs) = 6,609 steps"
    )
    assert [stage_of(stages, step).name for step in (1, 2203, 2204, 6609)] == [
        "warmup", "warmup", "adversarial", "adversarial",
    ]  # fmt: skip
    assert stages[1].own_step(2204) == 1
    assert resolve_geometry(config(), 8, ROWS).total_steps == 6609


def test_steps_that_are_set_need_no_rows() -> None:
    stages = gad_stages(config(warmup_steps=5, adversarial_steps=7))
    assert stages is not None
    assert [stage.last for stage in stages] == [5, 12]
    assert gad_stages(config()) is None
    assert describe_plan(config(warmup_steps=5, adversarial_steps=7))["geometry"]["total_steps"] == 12


@pytest.mark.parametrize("stage", ["seqkd", "warmup"])
def test_a_stage_of_its_own(stage: str) -> None:
    stages = gad_stages(config(stage=stage), ROWS)
    assert stages is not None
    assert [(found.name, found.steps) for found in stages] == [(stage, 2203)]


def test_a_schedule_must_fit_the_shortest_stage() -> None:
    short = config("schedule.warmup_steps=6", warmup_steps=5, adversarial_steps=70)
    with pytest.raises(ConfigError, match=r"schedule\.warmup_steps is 6\nstage warmup has only 5 steps"):
        resolve_geometry(short, 1)


GIB = 2**30


@pytest.mark.parametrize(
    ("preset", "ranks", "parameters", "gib"),
    [
        ("gad_3b", 8, 3_085_938_688, 20.7),
        ("gad_7b", 8, 7_615_616_512, 47.5),
        ("gad_14b", 16, 14_770_033_664, 52.3),
        ("gad_235b", 64, 235_093_634_560, 154.6),
    ],
)
def test_what_the_presets_take(preset: str, ranks: int, parameters: int, gib: float) -> None:
    """Published sizes; two models with their optimisers and a reference, over fsdp's ranks. A rank of 64 cannot hold
    its part of the largest in 141 GB: that preset needs more ranks, or adapters."""
    plan = describe_plan(load_config(preset).config, ranks, rows_per_epoch=ROWS)
    assert plan["parameters"]["total"] == parameters
    assert plan["memory_bytes"]["total"] / GIB == pytest.approx(gib, abs=0.1)
    assert [stage["name"] for stage in plan["stages"]] == ["warmup", "adversarial"]


def test_both_models_and_the_reference_are_counted() -> None:
    def memory(*words: str) -> dict[str, int]:
        found: dict[str, int] = describe_plan(load_config("gad_7b", words).config, 8)["memory_bytes"]
        return found

    seqkd, warmup, whole = memory("gad=seqkd"), memory("gad=warmup"), memory()
    total, head = 7_615_616_512, 152_064 * 3_584
    assert seqkd["weights"] == 4 * total // 8
    assert warmup["weights"] == 4 * total // 8 + 4 * (total - head) // 8
    assert whole["weights"] - warmup["weights"] == 4 * total // 8  # the reference
    assert memory("kl_coef=0")["weights"] == warmup["weights"]
    assert warmup["optimizer"] == 8 * total // 8 + 8 * (total - head) // 8
    assert whole["activations"] == seqkd["activations"]  # one model at a time
    # answers in the training's own processes need whole weights for a while
    assert memory("rollout=transformers", "rollout.batch_size=256")["total"] > whole["total"]
