"""What must hold between settings: contradictions, and settings that another one makes pointless."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from trainway.config.gad_rules import gad_problems, ignored_by_gad
from trainway.config.lora_rules import lora_problems
from trainway.config.mixes import mix_problems
from trainway.config.schema import LoraConfig, ModelConfig, RunConfig, WatchdogConfig
from trainway.errors import ConfigError
from trainway.planning.geometry import decay_overlap, warmup_steps

SHAPE = tuple(
    name
    for name in ModelConfig.model_fields
    if name not in ("path", "revision", "trust_remote_code", "attention")
)
"""Settings of `model` that describe a new one."""


def is_local(path: str) -> bool:
    """Whether a model's path is a directory by the way it is written: /a, ./a, ../a or ~/a."""
    return path.startswith(("/", "./", "../", "~")) or path in (".", "..")


def broken_rules(
    config: RunConfig, origins: Mapping[str, str], explicit: Collection[str]
) -> list[ConfigError]:
    """Every rule between settings that `config` breaks. `explicit`: keys that the user set for this run."""
    problems = [*_lengths(config, origins), *_engine(config, origins)]
    problems += _tuned_model(config, origins) if config.model.path else _shapes(config, origins)
    problems += [*_recipe(config, origins), *lora_problems(config, origins)]
    problems += [*gad_problems(config, origins), *_release(config, origins)]
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
    ignored = {**_ignored_by_recipe(config), **ignored_by_gad(config), **_ignored_by_engine(config)}

    def ignore(reason: str, *keys: str) -> None:
        ignored.update(dict.fromkeys(keys, reason))

    if config.optim.name != "muon":
        ignore(
            f"optim.name is {config.optim.name}",
            "optim.muon_lr",
            "optim.muon_momentum",
            "optim.muon_weight_decay",
        )
    if config.schedule.warmup_ratio is not None:
        ignore("schedule.warmup_ratio is set", "schedule.warmup_steps")
    if config.schedule.name == "constant":
        ignore("schedule.name is constant", "schedule.min_lr_ratio")
    if config.schedule.name != "wsd":
        ignore(f"schedule.name is {config.schedule.name}", "schedule.decay_ratio", "schedule.decay_shape")
    if config.tokenizer.path is not None or config.model.path is not None:
        given = (
            "tokenizer.path is set"
            if config.tokenizer.path
            else "model.path is set, and a tokenizer comes along"
        )
        ignore(
            f"{given}, so no tokenizer is trained",
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
    if not config.watchdog.enabled:
        names = (name for name in WatchdogConfig.model_fields if name != "enabled")
        ignore("watchdog.enabled is false", *(f"watchdog.{name}" for name in names))
    if config.train.on_nonfinite == "stop" and config.train.spike_factor == 0:
        ignore("no step is ever left out (on_nonfinite stop, spike_factor 0)", "train.max_skipped_steps")
    return ignored


def _ignored_by_recipe(config: RunConfig) -> dict[str, str]:
    ignored: dict[str, str] = {}
    if config.model.path is None:
        reason = "model.path is empty, so the model is a new one of this configuration's shape"
        ignored |= dict.fromkeys(("model.revision", "model.trust_remote_code", "model.attention"), reason)
    else:
        reason = "model.path is set: the shape is that of the model"
        ignored |= dict.fromkeys((f"model.{name}" for name in SHAPE), reason)
        if is_local(config.model.path):
            ignored["model.revision"] = "model.path is a directory, which has no revisions"
    if config.recipe == "pretrain":
        keys = ("data.chat_template", "data.train_on", "data.over_length")
        ignored |= dict.fromkeys(keys, "recipe is pretrain: it reads documents, not conversations")
    if not config.lora.enabled:
        names = (name for name in LoraConfig.model_fields if name != "enabled")
        ignored |= dict.fromkeys((f"lora.{name}" for name in names), "lora.enabled is false")
    return ignored


def _ignored_by_engine(config: RunConfig) -> dict[str, str]:
    ignored: dict[str, str] = {}
    engine = config.engine
    reason = f"engine.name is {engine.name}"
    if engine.name == "single":
        ignored["engine.timeout_s"] = "engine.name is single: one process has no collective operations"
    if engine.name not in ("zero2", "zero3"):
        ignored["engine.ds_config"] = f"{reason}, and this is for DeepSpeed: zero2 or zero3"
    if engine.name not in ("fsdp", "zero2", "zero3"):
        ignored["engine.cpu_offload"] = f"{reason}, which keeps the whole model on each device"
    if engine.name != "fsdp":
        keys = ("engine.sharding", "engine.shard_ranks", "engine.reshard_after_forward")
        ignored |= dict.fromkeys(keys, reason)
    elif engine.sharding == "full":
        ignored["engine.shard_ranks"] = "engine.sharding is full: one group of all ranks"
    return ignored


def _lengths(config: RunConfig, origins: Mapping[str, str]) -> list[ConfigError]:
    problems: list[ConfigError] = []
    train, schedule, model = config.train, config.schedule, config.model
    if config.recipe != "gad" and train.total_steps is None and train.epochs is None:
        problems.append(
            ConfigError(
                "the length of the run is not set",
                "neither train.total_steps nor train.epochs is given",
                "add e.g. train.total_steps=1000",
            )
        )
    if train.total_steps is not None and warmup_steps(schedule, train.total_steps) >= train.total_steps:
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
    if model.path is None and train.seq_len > model.max_seq_len:
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


def _recipe(config: RunConfig, origins: Mapping[str, str]) -> list[ConfigError]:
    problems: list[ConfigError] = []
    packing = origins["data.packing"]
    if config.recipe == "sft" and config.model.path is None:
        problems.append(
            ConfigError(
                f"{origins['recipe']}: recipe sft has no model to start from",
                "model.path is empty",
                "add e.g. model.path=Qwen/Qwen2.5-3B-Instruct, or a local directory",
            )
        )
    if config.recipe == "sft" and config.data.packing == "concat":
        problems.append(
            ConfigError(
                f"{packing}: data.packing is concat",
                "sft keeps conversations apart: attention must not cross from one into the next",
                "use data.packing=documents, or none for one conversation a row",
            )
        )
    if config.recipe == "pretrain" and config.data.packing == "none":
        problems.append(
            ConfigError(
                f"{packing}: data.packing is none",
                "pretrain fills every row: one document a row would be mostly padding",
                "use data.packing=documents, or recipe=sft for conversations",
            )
        )
    return problems


def _tuned_model(config: RunConfig, origins: Mapping[str, str]) -> list[ConfigError]:
    model = config.model
    assert model.path is not None
    if not model.trust_remote_code or is_local(model.path):
        return []
    if re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        return []
    return [
        ConfigError(
            f"{origins['model.trust_remote_code']}: model.trust_remote_code runs code that may change tomorrow",
            f"model.revision is {model.revision or 'empty'}, not a commit of 40 hex digits",
            "read the code of one commit, and set model.revision to it",
        )
    ]


def _release(config: RunConfig, origins: Mapping[str, str]) -> list[ConfigError]:
    release, problems = config.release, []
    if release.push_to_hub and release.repo is None:
        problems.append(
            ConfigError(
                f"{origins['release.push_to_hub']}: release.push_to_hub is on, and release.repo is empty",
                "the model goes to a repository of the Hub, and none is named",
                "set release.repo=OWNER/NAME, or take it out",
            )
        )
    if release.merge and not config.lora.enabled:
        problems.append(
            ConfigError(
                f"{origins['release.merge']}: release.merge is on without lora",
                "the whole model is trained, and there is no adapter to merge",
                "take it out",
            )
        )
    if release.merge and config.lora.quantize != "none":
        problems.append(
            ConfigError(
                f"{origins['release.merge']}: release.merge is on, and lora.quantize is {config.lora.quantize}",
                "into what such an adapter is merged has to be said by name, when it is known how well it does",
                "release the adapter, and merge it later: trainway export RUN --merge-into dequantized",
            )
        )
    if release.base is not None and config.model.path is None:
        problems.append(
            ConfigError(
                f"{origins['release.base']}: release.base is {release.base}, and model.path is empty",
                "the model is trained from scratch",
                "take it out",
            )
        )
    return problems


def _engine(config: RunConfig, origins: Mapping[str, str]) -> list[ConfigError]:
    engine = config.engine
    problems = _processes(config, origins)
    if config.optim.name == "muon" and engine.name in ("zero2", "zero3"):
        problems.append(
            ConfigError(
                f"{origins['optim.name']}: optim.name is muon",
                f"engine.name is {engine.name} ({origins['engine.name']}), which cuts matrices into flat pieces, "
                "and Muon needs whole ones",
                "use engine.name=fsdp, or optim.name=adamw",
            )
        )
    if config.train.precision == "fp16" and engine.name in ("zero2", "zero3"):
        problems.append(
            ConfigError(
                f"{origins['train.precision']}: train.precision is fp16",
                f"engine.name is {engine.name} ({origins['engine.name']}), which would keep the weights in fp16 too",
                "use train.precision=bf16 or fp32, or engine.name=fsdp",
            )
        )
    if config.train.compile and engine.name == "zero3":
        problems.append(
            ConfigError(
                f"{origins['train.compile']}: train.compile is true",
                f"engine.name is zero3 ({origins['engine.name']}), which gathers weights between compiled operations",
                "use train.compile=false, or engine.name=fsdp",
            )
        )
    offload = (engine.name, engine.cpu_offload)
    if offload in (("fsdp", "optimizer"), ("zero2", "all")):
        allowed = "all" if engine.name == "fsdp" else "optimizer"
        problems.append(
            ConfigError(
                f"{origins['engine.cpu_offload']}: engine.cpu_offload is {engine.cpu_offload}",
                f"engine.name is {engine.name} ({origins['engine.name']}), which offloads {allowed} or nothing",
                f"use engine.cpu_offload={allowed}, or engine.name=zero3",
            )
        )
    return problems


def _processes(config: RunConfig, origins: Mapping[str, str]) -> list[ConfigError]:
    engine, nproc = config.engine, config.engine.nproc
    where = f"{origins['engine.gpus']}: engine.gpus"
    named = ", ".join(map(str, engine.gpus))
    if len(set(engine.gpus)) < len(engine.gpus):
        return [ConfigError(f"{where} is {named}", "a GPU is named twice", "name each once")]
    if engine.name == "single" and nproc != "auto" and nproc > 1:
        return [
            ConfigError(
                f"{origins['engine.nproc']}: engine.nproc is {nproc}",
                f"engine.name is single ({origins['engine.name']}): one process",
                "use engine.name=ddp, or engine.nproc=1",
            )
        ]
    count = 1 if engine.name == "single" else nproc
    if engine.gpus and count != "auto" and count != len(engine.gpus):
        return [
            ConfigError(
                f"{where} names {len(engine.gpus)} ({named}), for {count} processes",
                "each process drives one GPU, "
                + (
                    f"and engine.name is single ({origins['engine.name']})"
                    if engine.name == "single"
                    else f"and engine.nproc is {nproc} ({origins['engine.nproc']})"
                ),
                "name as many GPUs as processes, or leave engine.nproc at auto",
            )
        ]
    return []
