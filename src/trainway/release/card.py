"""The model card of a release: what it is, from which model and data, how it was trained, how good it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from trainway.config.schema import RunConfig
from trainway.release.base_id import Base
from trainway.release.markdown import plain, table

LIBRARY = "trainway"
VAL_LOSS = "val/loss"
_DATASET = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class Facts:
    """All that a card is made of."""

    config: RunConfig
    provenance: Mapping[str, Any]
    """Of the run; what is missing there is left out of the card."""
    report: Mapping[str, Any]
    """The run's report; empty for a run that is not done."""
    step: int
    """Of the released checkpoint."""
    metrics: Mapping[str, float]
    """What was measured at that step, by the names of metrics.jsonl; empty where it was not evaluated."""
    base: Base
    repo: str
    tag: str
    licence: str | None
    is_adapter: bool
    """What is released is an adapter, and its base is elsewhere."""
    has_picture: bool
    run_name: str
    cost: float | None = None
    """Of the training, in dollars."""


def make_card(facts: Facts) -> str:
    """The card as Markdown with its front matter."""
    name = facts.repo.partition("/")[2]
    parts = [
        f"# {name}",
        _opening(facts),
        _use(facts),
        "## Training",
        _data(facts),
        table(("setting", "value"), _settings(facts)),
        "## Result",
        table(("figure", "value"), _figures(facts)),
    ]
    if facts.has_picture:
        parts.append("![training and validation loss over the steps](loss.png)")
    parts += ["## Origin", table(("what", "value"), _origin(facts))]
    return f"---\n{_front(facts)}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _front(facts: Facts) -> str:
    """What the Hub reads. Every value is one of ours or was checked for its form: none comes from data."""
    front: dict[str, Any] = {
        "library_name": "peft" if facts.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
    }
    if facts.licence is not None:
        front["license"] = facts.licence
    if facts.base.id is not None:
        front["base_model"] = facts.base.id
        front["base_model_relation"] = "adapter" if facts.is_adapter else "finetune"
    if datasets := _datasets(facts):
        front["datasets"] = datasets
    front["tags"] = [LIBRARY, facts.config.recipe] + ["lora"] * facts.config.lora.enabled
    if VAL_LOSS in facts.metrics:
        front["model-index"] = [{"name": facts.repo.partition("/")[2], "results": [_result(facts)]}]
    text: str = yaml.safe_dump(front, sort_keys=False, allow_unicode=False, width=110)
    return text


def _result(facts: Facts) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": "validation-split", "name": "validation split of the training data"},
        "metrics": [{"type": "loss", "name": "validation loss", "value": facts.metrics[VAL_LOSS]}],
    }


def _opening(facts: Facts) -> str:
    config, base = facts.config, facts.base
    what = {
        "pretrain": "A language model, pretrained on documents",
        "sft": "A language model, tuned on conversations",
        "gad": "A student model, tuned on a teacher's answers against a discriminator",
    }[config.recipe]
    how = " by LoRA" if config.lora.enabled else ""
    if base.id is not None:
        at = f" at commit `{base.commit}`" if base.commit else ""
        origin = f" It started from [{base.id}](https://huggingface.co/{base.id}){at}."
    elif config.model.path is None:
        origin = " It was trained from scratch."
    else:
        origin = " The model that it started from is not on the Hub, or not known by its name there."
    rest = " This is the adapter alone: it needs that model." if facts.is_adapter else ""
    described = f"\n\n{plain(config.description)}" if config.description else ""
    return f"{what}{how} with Trainway.{origin}{rest}{described}"


def _use(facts: Facts) -> str:
    if facts.is_adapter and facts.base.id is None:
        return ""
    kind, package = ("AutoPeftModelForCausalLM", "peft") if facts.is_adapter else ("AutoModelForCausalLM", "")
    lines = [
        *([f"from {package} import {kind}", "from transformers import AutoTokenizer"] if package else []),
        *([] if package else [f"from transformers import {kind}, AutoTokenizer"]),
        "",
        f'model = {kind}.from_pretrained("{facts.repo}", revision="{facts.tag}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.repo}", revision="{facts.tag}")',
    ]
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def _data(facts: Facts) -> str:
    data_hash = facts.provenance.get("data_hash")
    known = f" The prepared data has the hash `{data_hash}`." if _is_word(data_hash) else ""
    if datasets := _datasets(facts):
        links = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in datasets)
        return f"Datasets of the Hub: {links}.{known}"
    return f"The data are files of those who trained the model.{known}"


def _datasets(facts: Facts) -> list[str]:
    found = facts.provenance.get("datasets") or []
    return [name for name in found if isinstance(name, str) and _DATASET.fullmatch(name)]


def _settings(facts: Facts) -> list[tuple[str, object]]:
    config = facts.config
    rows: list[tuple[str, object]] = [
        ("recipe", config.recipe),
        ("sequence length", config.train.seq_len),
        ("global batch size", config.train.global_batch_size),
        ("precision", config.train.precision),
        ("optimiser", config.optim.name),
        ("peak learning rate", f"{config.optim.lr:g}"),
        ("schedule", config.schedule.name),
        ("weight decay", f"{config.optim.weight_decay:g}"),
        ("seed", config.seed),
    ]
    if config.lora.enabled:
        rows += [
            ("LoRA rank", config.lora.r),
            ("LoRA alpha", f"{config.lora.alpha:g}"),
            ("LoRA modules", ", ".join(config.lora.target_modules)),
        ]
    return [(name, value) for name, value in rows if value is not None]


def _figures(facts: Facts) -> list[tuple[str, object]]:
    report = facts.report
    rows: list[tuple[str, object]] = [("step of this checkpoint", f"{facts.step:,}")]
    measured = {
        VAL_LOSS: "validation loss (nats per token)",
        "val/ppl": "validation perplexity",
        "val/bpb": "validation bits per byte",
        "val/rouge_l": "ROUGE-L with the teacher's answers",
    }
    rows += [(text, f"{facts.metrics[key]:.4f}") for key, text in measured.items() if key in facts.metrics]
    names = {
        "steps": "steps of the run",
        "tokens": "tokens",
        "parameters": "parameters",
        "trainable_parameters": "trained parameters",
    }
    rows += [(text, f"{report[key]:,}") for key, text in names.items() if isinstance(report.get(key), int)]
    return rows


def _origin(facts: Facts) -> list[tuple[str, object]]:
    known, report = facts.provenance, facts.report
    versions, devices = known.get("versions") or {}, known.get("devices") or {}
    commit = ((known.get("git") or {}).get("project") or {}).get("commit")
    rows: list[tuple[str, object]] = [("run", facts.run_name), ("started", known.get("started"))]
    if devices.get("name") not in (None, "cpu"):
        rows.append(("hardware", f"{devices.get('count')} × {devices['name']}"))
    elif cpu := known.get("cpu"):
        rows.append(("hardware", f"{cpu.get('model')} ({cpu.get('cores')} cores)"))
    if isinstance(seconds := report.get("seconds"), (int, float)):
        rows.append(("hours of training", f"{seconds / 3600:.2f}"))
    if facts.cost is not None:
        rows.append(("cost of the training", f"${facts.cost:,.2f}"))
    rows += [(name, version) for name, version in versions.items() if version]
    rows += [("commit of the project", commit), ("hash of the settings", known.get("config_hash"))]
    if facts.base.id is None and facts.config.model.path is not None:
        rows.append(("base model", f"not named: {facts.base.reason}"))
    return [(name, value) for name, value in rows if value]


def _is_word(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9-]{1,128}", value) is not None
