"""DeepSpeed's configuration by value, and what becomes of a file of the user's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainway.config.schema import EngineConfig, OptimConfig, RunConfig, TrainConfig
from trainway.engines.ds_config import ds_config
from trainway.errors import ConfigError


def run(engine: str = "zero3", **settings: Any) -> RunConfig:
    train = {
        "global_batch_size": 16,
        "micro_batch_size": 2,
        "max_grad_norm": 0.5,
        **settings.pop("train", {}),
    }
    optim = settings.pop("optim", {})
    return RunConfig(
        engine=EngineConfig(name=engine, **settings), train=TrainConfig(**train), optim=OptimConfig(**optim)
    )


def with_file(tmp_path: Path, content: Any, engine: str = "zero3", **settings: Any) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return ds_config(run(engine, ds_config=str(path), **settings), 2, "bf16")


def test_zero3_on_two_ranks() -> None:
    assert ds_config(run(), 2, "fp32") == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "none"},
            "offload_param": {"device": "none"},
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 200_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
        },
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def test_zero2_offloaded_in_bf16_on_gpus() -> None:
    settings = ds_config(run("zero2", cpu_offload="optimizer"), 8, "bf16", on_gpu=True)
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], settings["gradient_accumulation_steps"]) == (2, True, 1)
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in zero
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": False}
    zero = ds_config(run(cpu_offload="all"), 2, "bf16")["zero_optimization"]
    assert zero["offload_param"] == zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


def test_a_file_adds_what_we_leave_open(tmp_path: Path) -> None:
    alone = ds_config(run(), 2, "bf16")
    zero = {"reduce_bucket_size": 1000, "stage3_max_live_parameters": 7, "stage": 3, "overlap_comm": "auto"}
    given = {"zero_optimization": zero, "communication_data_type": "bf16", "bf16": {"enabled": "auto"}}
    joined = with_file(tmp_path, {**given, "flops_profiler": {"enabled": False}})
    expected = {**alone["zero_optimization"], "reduce_bucket_size": 1000, "stage3_max_live_parameters": 7}
    assert joined == {
        **alone,
        "zero_optimization": expected,
        "communication_data_type": "bf16",
        "flops_profiler": {"enabled": False},
    }


def test_a_file_in_the_dialect_of_hugging_face_that_agrees(tmp_path: Path) -> None:
    params = {"lr": "auto", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": "auto"}
    given = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "amp": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": params},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none", "pin_memory": True},
                              "stage3_prefetch_bucket_size": "auto"},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": 16.0,
        "train_micro_batch_size_per_gpu": "auto",
    }  # fmt: skip
    joined, alone = with_file(tmp_path, given), ds_config(run(), 2, "bf16")
    alone["zero_optimization"]["offload_optimizer"]["pin_memory"] = True
    assert joined == alone


@pytest.mark.parametrize(
    ("given", "what", "why"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2", "engine.name makes it 3"),
        ({"train_batch_size": 32}, "train_batch_size is 32", "train.global_batch_size makes it 16"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0", "train.max_grad_norm makes it 0.5"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is false", "train.precision makes it true"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            'zero_optimization.offload_optimizer.device is "nvme"',
            'engine.cpu_offload makes it "none"',
        ),
        (
            {"optimizer": {"params": {"lr": 0.1}}},
            "optimizer.params.lr is 0.1",
            "optim.lr makes it 0.0006",
        ),
        (
            {"zero_optimization": {"round_robin_gradients": True}},
            "zero_optimization.round_robin_gradients is true",
            "Trainway needs false",
        ),
        ({"optimizer": {"type": "Lion"}}, 'optimizer.type is "Lion"', 'optim.name makes it "AdamW"'),
        (
            {"optimizer": {"params": {"muon_lr": 1}}},
            "optimizer.params.muon_lr is 1 and would have no effect",
            "the optimiser is the one of optim.*",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            'scheduler is {"type": "WarmupLR"} and would have no effect',
            "the learning rate is set by schedule.*",
        ),
        (
            {"activation_checkpointing": {"partition_activations": True}},
            'activation_checkpointing is {"partition_activations": true} and would have no effect',
            "it is set by train.activation_checkpointing",
        ),
    ],
)
def test_what_contradicts_is_refused(tmp_path: Path, given: dict[str, Any], what: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_file(tmp_path, given)
    assert (caught.value.what, caught.value.why) == (f"{tmp_path / 'ds.json'}: {what}", why)


def test_an_unknown_key_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        with_file(tmp_path, {"zero_optimisation": {"stage": 3}})
    assert caught.value.what == f"{tmp_path / 'ds.json'}: zero_optimisation is no setting of DeepSpeed"
    assert caught.value.why == 'its value is {"stage": 3}'
    assert caught.value.fix == "did you mean zero_optimization?"


@pytest.mark.parametrize(
    ("content", "what"),
    [("{", "is no JSON file"), ("[]", "holds no JSON object"), ('{"a":1,"a":2}', "is no")],
)
def test_a_malformed_file_is_named(tmp_path: Path, content: str, what: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.ds_config: .*ds.json {what}"):
        with_file(tmp_path, content)
    with pytest.raises(ConfigError, match=r"engine.ds_config: .*none.json cannot be read"):
        ds_config(run(ds_config=str(tmp_path / "none.json")), 2, "fp32")


@pytest.mark.parametrize(
    ("engine", "precision", "settings", "what"),
    [
        ("zero2", "fp32", {"optim": {"name": "muon"}}, "optim.name is muon under engine.name zero2"),
        ("zero3", "fp16", {}, "train.precision is fp16 under engine.name zero3"),
        ("zero3", "fp32", {"train": {"compile": True}}, "train.compile is true under engine.name zero3"),
        ("zero2", "fp32", {"cpu_offload": "all"}, "engine.cpu_offload is all under engine.name zero2"),
    ],
)
def test_what_the_engines_do_not_have_is_refused(
    engine: str, precision: Any, settings: dict[str, Any], what: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ds_config(run(engine, **settings), 2, precision)
    assert caught.value.what == what
