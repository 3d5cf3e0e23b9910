"""What must hold between settings: contradictions, and settings that another one makes pointless."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from trainway.config.mixes import mix_problems
from trainway.config.schema import RunConfig
from trainway.errors import ConfigError
from trainway.planning.geometry import decay_overlap


def broken_rules(
    config: RunConfig, origins: Mapping[str, str], explicit: Collection[str]
) -> list[ConfigError]:
    """Every rule between settings that `config` breaks. `explicit`: keys that the user set for this run."""
    problems = [*_lengths(config, origins), *_shapes(config, origins), *_engine(config, origins)]
    problems += mix_problems(config.data, origins["data.train"])
    for key, reason in ignored_settings(config).items():
        if key in explicit:
            problems.append(
                ConfigError(
                    f"{origins[key]}: {key} would have no effect",
                    reason,
                    f"take {key} out, or change the other",
                )
            )
    return problems


def ignored_settings(config: RunConfig) -> dict[str, str]:
    """Settings that this run does not read, and why."""
    ignored: dict[str, str] = {}

    def ignore(reason: str, *keys: str) -> None:
        ignored.update(dict.fromkeys(keys, reason))

    if config.optim.name != "muon":
        ignore(
            f"optim.name is {config.optim.name}",
            "optim.muon_lr",
            "optim.muon_momentum",
            "optim.muon_weight_decay",
        )
    if config.schedule.name == "constant":
        ignore("schedule.name is constant", "schedule.min_lr_ratio")
    if config.schedule.name != "wsd":
        ignore(f"schedule.name is {config.schedule.name}", "schedule.decay_ratio", "schedule.decay_shape")
    if config.tokenizer.path is not None:
        ignore(
            "tokenizer.path is set, so no tokenizer is trained",
            "tokenizer.vocab_size",
            "tokenizer.special_tokens",
            "tokenizer.sample_mib",
        )
    if config.data.validation:
        ignore("data.validation is set, so nothing is held out of the training documents", "data.val_ratio")
    if config.eval.prompts:
        ignore("eval.prompts is set, so no openings of documents are continued", "eval.num_samples")
    elif config.eval.num_samples == 0:
        ignore(
            "there are no eval.prompts and eval.num_samples is 0, so no samples are made",
            "eval.max_new_tokens",
            "eval.temperature",
        )
    if config.train.on_nonfinite == "stop" and config.train.spike_factor == 0:
        ignore("no step is ever left out (on_nonfinite stop, spike_factor 0)", "train.max_skipped_steps")
    if config.engine.name == "single":
        ignore("engine.name is single: one process has no collective operations", "engine.timeout_s")
    if config.engine.name != "fsdp":
        ignore(
            f"engine.name is {config.engine.name}",
            "engine.sharding",
            "engine.shard_ranks",
            "engine.reshard_after_forward",
            "engine.cpu_offload",
        )
    elif config.engine.sharding == "full":
        ignore("engine.sharding is full: one group of all ranks", "engine.shard_ranks")
    return ignored


def _lengths(config: RunConfig, origins: Mapping[str, str]) -> list[ConfigError]:
    problems: list[ConfigError] = []
    train, schedule, model = config.train, config.schedule, config.model
    if train.total_steps is None and train.epochs is None:
        problems.append(
            ConfigError(
                "the length of the run is not set",
                "neither train.total_steps nor train.epochs is given",
                "add e.g. train.total_steps=1000",
            )
        )
    if train.total_steps is not None and schedule.warmup_steps >= train.total_steps:
        problems.append(
            ConfigError(
                f"{origins['schedule.warmup_steps']}: schedule.warmup_steps is {schedule.warmup_steps}",
                f"the run has only {train.total_steps} steps ({origins['train.total_steps']})",
                "warm up for fewer steps, or train for more",
            )
        )
    elif train.total_steps is not None and (overlap := decay_overlap(schedule, train.total_steps)):
        where = origins["schedule.decay_ratio"]
        problems.append(ConfigError(f"{where}: {overlap.what}", overlap.why, overlap.fix))
    if train.seq_len > model.max_seq_len:
        problems.append(
            ConfigError(
                f"{origins['train.seq_len']}: train.seq_len is {train.seq_len}",
                f"the model accepts at most model.max_seq_len = {model.max_seq_len} ({origins['model.max_seq_len']})",
                f"set model.max_seq_len={train.seq_len}, or use shorter rows",
            )
        )
    return problems


def _shapes(config: RunConfig, origins: Mapping[str, str]) -> list[ConfigError]:
    problems: list[ConfigError] = []
    model = config.model
    if model.head_dim is None and model.hidden_size % model.num_heads:
        below = model.hidden_size - model.hidden_size % model.num_heads
        problems.append(
            ConfigError(
                f"{origins['model.hidden_size']}: model.hidden_size {model.hidden_size} is not divisible by "
                f"model.num_heads {model.num_heads}",
                "the width of a head is their quotient when model.head_dim is empty",
                f"use {below or model.num_heads} or {below + model.num_heads}, or set model.head_dim",
            )
        )
    width = model.head_dim or model.hidden_size // model.num_heads
    if width % 2:
        problems.append(
            ConfigError(
                f"{origins['model.head_dim']}: the width of a head is {width}",
                "rotary embeddings turn pairs of values, so it must be even",
                "choose another model.head_dim, or another number of heads",
            )
        )
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        fitting = [n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0]
        problems.append(
            ConfigError(
                f"{origins['model.num_kv_heads']}: model.num_kv_heads is {model.num_kv_heads}",
                f"model.num_heads {model.num_heads} must be a multiple of it",
                f"use one of {', '.join(map(str, fitting))}",
            )
        )
    return problems


def _engine(config: RunConfig, origins: Mapping[str, str]) -> list[ConfigError]:
    nproc = config.engine.nproc
    if config.engine.name == "single" and nproc != "auto" and nproc > 1:
        return [
            ConfigError(
                f"{origins['engine.nproc']}: engine.nproc is {nproc}",
                f"engine.name is single ({origins['engine.name']}): one process",
                "use engine.name=ddp, or engine.nproc=1",
            )
        ]
    return []
