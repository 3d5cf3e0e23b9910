"""What must hold for recipe `gad`: what its stages need, and the settings that they do not read."""

from __future__ import annotations

from collections.abc import Mapping

from trainway.config.schema import GadConfig, RolloutConfig, RunConfig
from trainway.errors import ConfigError

_ROWS = ("prompt_field", "response_field", "max_prompt_tokens", "max_response_tokens")
_OTHERS = (
    "data.text_field", "data.text_unit", "data.train_on",
    "train.total_steps", "train.epochs", "train.seq_len", "train.micro_batch_size", "train.grad_accum_steps",
    "train.z_loss", "eval.max_tokens", "eval.prompts", "eval.max_new_tokens", "eval.temperature",
)  # fmt: skip
"""Settings of the other recipes. Rows are read by data.prompt_field and response_field, the length of a run is that of
its stages, micro-batches follow from gad.tokens_per_gpu, and validation answers eval.num_prompts prompts greedily."""


def gad_problems(config: RunConfig, origins: Mapping[str, str]) -> list[ConfigError]:
    """Every rule on adversarial distillation that `config` breaks."""
    if config.recipe != "gad":
        return []
    gad, train, lora = config.gad, config.train, config.lora
    problems: list[ConfigError] = []

    def refuse(key: str, what: str, why: str, fix: str) -> None:
        problems.append(ConfigError(f"{origins[key]}: {what}", why, fix))

    if config.model.path is None:
        fix = "add e.g. model.path=Qwen/Qwen2.5-3B-Instruct, or a local directory"
        refuse("recipe", "recipe gad has no student to start from", "model.path is empty", fix)
    if train.global_batch_size is None:
        refuse(
            "train.global_batch_size", "train.global_batch_size is not set",
            "it is the number of prompts of one step", "set e.g. train.global_batch_size=256",
        )  # fmt: skip
    elif gad.prompts_per_update is not None and train.global_batch_size % gad.prompts_per_update:
        refuse(
            "gad.prompts_per_update", f"gad.prompts_per_update is {gad.prompts_per_update}",
            f"a step's {train.global_batch_size} prompts do not divide into such updates "
            f"({origins['train.global_batch_size']})", "use a divisor, or leave it empty",
        )  # fmt: skip
    if gad.stage == "adversarial" and gad.warmup_run is None:
        refuse(
            "gad.stage", "gad.stage adversarial has no warm-up to begin from",
            "gad.warmup_run is empty, and student and discriminator come from there",
            "set gad.warmup_run to the warm-up's run directory or one of its checkpoints, or gad.stage=all",
        )  # fmt: skip
    if config.data.packing == "concat":
        refuse(
            "data.packing", "data.packing is concat",
            "gad keeps conversations apart: attention must not cross from one into the next",
            "use data.packing=documents, or none",
        )  # fmt: skip
    if train.precision == "fp16":
        refuse(
            "train.precision", "train.precision is fp16",
            "rewards and ratios are small differences, which its loss scale would drown",
            "use train.precision=bf16 or fp32",
        )  # fmt: skip
    if lora.enabled and lora.dropout > 0:
        refuse(
            "lora.dropout", f"lora.dropout is {lora.dropout:g}",
            "scores and log-probabilities are taken in one pass and trained in another: both must see the same model",
            "set lora.dropout=0",
        )  # fmt: skip
    if lora.enabled and lora.quantize != "none":
        refuse(
            "lora.quantize", f"lora.quantize is {lora.quantize}",
            "a discriminator on a base of 4 bits is not supported", "set lora.quantize=none",
        )  # fmt: skip
    if lora.enabled and config.rollout.engine == "vllm":
        refuse(
            "rollout.engine", "rollout.engine is vllm",
            f"lora is on ({origins['lora.enabled']}), and the server takes whole models only",
            "use rollout.engine=transformers",
        )  # fmt: skip
    return problems


def ignored_by_gad(config: RunConfig) -> dict[str, str]:
    """Settings that a run does not read for its recipe being, or not being, gad, and for its stage; and why."""
    own = [f"gad.{name}" for name in GadConfig.model_fields]
    own += [f"rollout.{name}" for name in RolloutConfig.model_fields]
    own += [f"data.{name}" for name in _ROWS] + ["eval.num_prompts"]
    if config.recipe != "gad":
        return dict.fromkeys(own, f"recipe is {config.recipe}: this is for gad")
    ignored = dict.fromkeys(_OTHERS, "recipe is gad, which has settings of its own for this")
    ignored |= _ignored_by_stage(config.gad)
    rollout = config.rollout
    if rollout.engine == "transformers":
        reason = "rollout.engine is transformers: answers are written in the training's own processes"
        ignored |= dict.fromkeys(("rollout.tensor_parallel", "rollout.memory_share", "rollout.url"), reason)
    else:
        ignored |= dict.fromkeys(("rollout.batching", "rollout.batch_size"), "rollout.engine is vllm")
        if rollout.url is not None:
            keys = ("rollout.tensor_parallel", "rollout.memory_share")
            ignored |= dict.fromkeys(keys, "rollout.url is set: that server has settings of its own")
    return ignored


def _ignored_by_stage(gad: GadConfig) -> dict[str, str]:
    """What of one stage contradicts itself. Settings of other stages are welcome: one file serves them all."""
    ignored: dict[str, str] = {}
    for name in ("seqkd", "warmup", "adversarial"):
        if getattr(gad, f"{name}_steps") is not None:
            ignored[f"gad.{name}_epochs"] = f"gad.{name}_steps is set"
    if gad.stage != "adversarial":
        ignored["gad.warmup_run"] = f"gad.stage is {gad.stage}"
    elif gad.discriminator is not None:
        ignored["gad.discriminator"] = f"gad.stage is {gad.stage}: the discriminator is the warm-up's"
    return ignored
