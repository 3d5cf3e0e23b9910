"""DeepSpeed's configuration: made of the run's own settings, and joined with a file of the user's where they agree."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trainway.config.schema import RunConfig
from trainway.engines.precision import Precision
from trainway.errors import ConfigError
from trainway.planning.geometry import resolve_geometry

AUTO = "auto"
"""Says in Hugging Face's dialect that the trainer is to fill in a value."""

BUCKET = 50_000_000
"""Elements that travel together: 200 MB of fp32 gradients, enough for full bandwidth."""


def ds_config(
    config: RunConfig, world_size: int, precision: Precision, *, on_gpu: bool = False
) -> dict[str, Any]:
    """What `deepspeed.initialize` gets under engine zero2 or zero3, as JSON values.

    Raises ConfigError for settings that the engine does not have, and for a file in engine.ds_config that is missing,
    malformed, has an unknown key, or contradicts another setting (the message names file, key and both values).
    """
    _refuse_unsupported(config, precision)
    decided = _decided(config, world_size, precision)
    settings = _joined(_chosen(config, precision, on_gpu), decided)
    if config.engine.ds_config is None:
        return settings
    path = Path(config.engine.ds_config)
    given = _read(path)
    _refuse_keys(given, path)
    compared = _joined(decided, _compared(config))
    for key, value in _leaves(given):
        _compare(path, key, value, compared)
    # what agrees is there already, and some of it only to be compared
    added = _without({key: given[key] for key in given if key in _PASSED}, compared)
    return _joined(settings, added)


def _refuse_unsupported(config: RunConfig, precision: Precision) -> None:
    name = config.engine.name
    if config.optim.name == "muon":
        raise ConfigError(
            f"optim.name is muon under engine.name {name}",
            "Muon works on whole matrices, and DeepSpeed cuts them anywhere",
            "set optim.name=adamw, or engine.name=fsdp",
        )
    if precision == "fp16":
        raise ConfigError(
            f"train.precision is fp16 under engine.name {name}",
            "DeepSpeed would keep the weights themselves in fp16, and sums over targets leave its range",
            "set train.precision=bf16 or fp32, or engine.name=fsdp",
        )
    if config.train.compile and name == "zero3":
        raise ConfigError(
            "train.compile is true under engine.name zero3",
            "DeepSpeed gathers weights in hooks between the operations that are compiled together",
            "set train.compile=false, or engine.name=fsdp",
        )
    if config.engine.cpu_offload == "all" and name == "zero2":
        raise ConfigError(
            "engine.cpu_offload is all under engine.name zero2",
            "every rank computes with all weights, so they stay on its device",
            "set engine.cpu_offload=optimizer, or engine.name=zero3",
        )


# ---- the run's own settings


def _decided(config: RunConfig, world_size: int, precision: Precision) -> dict[str, Any]:
    """What other settings, or the way Trainway works, leave no choice about."""
    geometry = resolve_geometry(config, world_size)
    offload = config.engine.cpu_offload
    zero: dict[str, Any] = {
        "stage": 3 if config.engine.name == "zero3" else 2,
        "offload_optimizer": {"device": "none" if offload == "none" else "cpu"},
    }
    if config.engine.name == "zero3":
        zero["offload_param"] = {"device": "cpu" if offload == "all" else "none"}
    return {
        # DeepSpeed checks the product; gad, whose step is dealt by tokens, has one row a rank for it
        "train_batch_size": geometry.micro_batch_size * geometry.grad_accum_steps * world_size,
        "train_micro_batch_size_per_gpu": geometry.micro_batch_size,
        "gradient_accumulation_steps": geometry.grad_accum_steps,
        "gradient_clipping": config.train.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,  # PyTorch's fused AdamW, as under every engine
        "zero_force_ds_cpu_optimizer": False,
    }


def _chosen(config: RunConfig, precision: Precision, on_gpu: bool) -> dict[str, Any]:
    """Where DeepSpeed leaves a choice, ours; a file of the user's may choose otherwise."""
    zero: dict[str, Any] = {
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": 4 * BUCKET,
    }
    if config.engine.name == "zero3":
        zero["stage3_prefetch_bucket_size"] = BUCKET
        zero["stage3_param_persistence_threshold"] = 100_000
    if config.engine.cpu_offload != "none":
        zero["offload_optimizer"] = {"pin_memory": on_gpu}
    if config.engine.cpu_offload == "all":
        zero["offload_param"] = {"pin_memory": on_gpu}
    settings: dict[str, Any] = {
        "zero_optimization": zero,
        "communication_data_type": "fp32",  # gradients are summed in fp32 under every engine
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if precision == "bf16":
        settings["bf16"] = {"check_grad_overflow": False}  # the norm of the gradients shows it
    return settings


def _compared(config: RunConfig) -> dict[str, Any]:
    """What is settled by other settings and not told to DeepSpeed."""
    optim, offload = config.optim, config.engine.cpu_offload
    return {
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optim.lr,
                "betas": list(optim.betas),
                "eps": optim.eps,
                "weight_decay": optim.weight_decay,
                "adam_w_mode": True,
                "torch_adam": True,
                "bias_correction": True,
                "amsgrad": False,
            },
        },
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean",
        "managed_gradient_accumulation": True,
        "zero_optimization": {
            "cpu_offload": offload != "none",
            "cpu_offload_param": offload == "all",
            "offload_param": {"device": "cpu" if offload == "all" else "none"},
            "round_robin_gradients": False,
            "zero_hpz_partition_size": 1,
            "zero_quantized_weights": False,
            "zero_quantized_nontrainable_weights": False,
            "zero_quantized_gradients": False,
        },
    }


# ---- a file of the user's

_COMPARED_ONLY = ("optimizer", "managed_gradient_accumulation", "gradient_allreduce_op",
                  "gradient_predivide_factor", "prescale_gradients")  # fmt: skip
_PASSED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_optimization", "bf16", "fp16", "data_types", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "communication_data_type", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state",
    "comms_logger", "flops_profiler", "aio", "timers", "log_level", "disable_allgather", "dataloader_drop_last",
)  # fmt: skip
_OURS = {
    "scheduler": "the learning rate is set by schedule.*",
    "activation_checkpointing": "it is set by train.activation_checkpointing",
    "checkpoint": "checkpoints are Trainway's own",
    "load_universal_checkpoint": "checkpoints are Trainway's own",
    "nebula": "checkpoints are Trainway's own",
    "datastates_ckpt": "checkpoints are Trainway's own",
    **dict.fromkeys(("tensorboard", "wandb", "comet", "csv_monitor"), "metrics are written as tracking.* says"),
    **dict.fromkeys(("curriculum_learning", "data_efficiency"), "data is read as data.* says"),
    **dict.fromkeys(
        ("amp", "torch_autocast", "fp32", "bfloat16"), "the number format is set by train.precision"
    ),
    **dict.fromkeys(
        ("autotuning", "compile", "compression_training", "eigenvalue", "elasticity", "expert_parallel",
         "hybrid_engine", "pipeline", "progressive_layer_drop", "quantize_training", "sequence_parallel_size",
         "sparse_attention", "sparse_gradients", "tensor_parallel", "use_data_before_expert_parallelism",
         "disable_python_gc", "seq_parallel_communication_data_type", "vocabulary_size", "weight_quantization",
         "zenflow"),
        "Trainway does not use it",
    ),
}  # fmt: skip
_SETTINGS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "the batch of train.*",
    "gradient_clipping": "train.max_grad_norm",
    "zero_optimization.stage": "engine.name",
    "zero_optimization.offload_optimizer.device": "engine.cpu_offload",
    "zero_optimization.offload_param.device": "engine.cpu_offload",
    "zero_optimization.cpu_offload": "engine.cpu_offload",
    "zero_optimization.cpu_offload_param": "engine.cpu_offload",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "optimizer.type": "optim.name",
    "optimizer.params.lr": "optim.lr",
    "optimizer.params.betas": "optim.betas",
    "optimizer.params.eps": "optim.eps",
    "optimizer.params.weight_decay": "optim.weight_decay",
}
"""Settings behind the values that we decide; the others follow from the way Trainway works."""


def _read(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, _ in pairs:
            if sum(key == other for other, _ in pairs) > 1:
                raise ValueError(f"{key} is there twice")
        return dict(pairs)

    where = f"engine.ds_config: {path}"
    try:
        given = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError as error:
        raise ConfigError(
            f"{where} cannot be read", error.strerror or f"{error}", "correct the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where} is no JSON file", f"{error}", "DeepSpeed's configuration is a JSON object"
        ) from error
    if not isinstance(given, dict):
        raise ConfigError(f"{where} holds no JSON object", fix="DeepSpeed's configuration is a JSON object")
    return given


def _refuse_keys(given: dict[str, Any], path: Path) -> None:
    """Drop sections that are turned off, and refuse those that are unknown or would be ignored."""
    known = {*_PASSED, *_COMPARED_ONLY, *_OURS}
    for key, value in list(given.items()):
        if key not in known:
            near = get_close_matches(key, sorted(known), 1)
            fix = f"did you mean {near[0]}?" if near else "take it out"
            raise ConfigError(
                f"{path}: {key} is no setting of DeepSpeed", f"its value is {_shown(value)}", fix
            )
        if key not in _OURS:
            continue
        if isinstance(value, Mapping) and value.get("enabled", True) in (False, AUTO):
            del given[key]
            continue
        raise ConfigError(
            f"{path}: {key} is {_shown(value)} and would have no effect", _OURS[key], f"take {key} out"
        )


def _compare(path: Path, key: str, value: Any, decided: Mapping[str, Any]) -> None:
    ours: Any = decided
    section, _, name = key.rpartition(".")
    for part in key.split("."):
        if not isinstance(ours, Mapping) or part not in ours:
            if section == "optimizer" or section == "optimizer.params":
                raise ConfigError(
                    f"{path}: {key} is {_shown(value)} and would have no effect",
                    "the optimiser is the one of optim.*",
                    f"take {name} out",
                )
            return
        ours = ours[part]
    if value == AUTO or _same(key, value, ours):
        return
    setting = _SETTINGS.get(key)
    why = f"{setting} makes it {_shown(ours)}" if setting else f"Trainway needs {_shown(ours)}"
    fix = f"take it out of the file, or change {setting}" if setting else "take it out of the file"
    raise ConfigError(f"{path}: {key} is {_shown(value)}", why, fix)


def _same(key: str, theirs: Any, ours: Any) -> bool:
    if key == "optimizer.type":  # its Adam decouples weight decay, too
        return str(theirs).lower() in ("adam", "adamw")
    if isinstance(theirs, bool) or isinstance(ours, bool):
        return theirs is ours
    return bool(theirs == ours)


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _without(section: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are neither in `known` nor left to us."""
    result: dict[str, Any] = {}
    for key, value in section.items():
        there = known.get(key)
        if isinstance(value, Mapping):
            result[key] = _without(value, there if isinstance(there, Mapping) else {})
        elif key not in known and value != AUTO:
            result[key] = value
    return result


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both, section by section; `second` wins."""
    result = dict(first)
    for key, value in second.items():
        before = result.get(key)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        result[key] = _joined(before, value) if both else value  # type: ignore[arg-type]
    return result


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
