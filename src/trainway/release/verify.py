"""An exported directory against the checkpoint it was made from: every tensor, the logits, the text, the endings."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import xxhash
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainway.checkpoint.adapter import ADAPTER_STEM, is_adapter, is_adapter_tensor, saved_name
from trainway.checkpoint.pieces import WHOLE, open_tensors
from trainway.checkpoint.weights import load_model, read_model_state
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.files import read_json
from trainway.models.base import meta_model
from trainway.models.base_files import CONFIG, weight_names
from trainway.models.base_import import quiet_transformers
from trainway.models.load import allocate
from trainway.release.bundle import Merge, adapter_base
from trainway.release.endings import stored_ends, turn_end

if TYPE_CHECKING:
    from trainway.models.base import BaseModel

TOLERANCE = 1e-4
"""Of logits in fp32, relative to the largest one where that is above 1: sums in another order, nothing more."""
GREEDY_TOKENS = 64
_TEXT = "def area(width, height):\n    return width * height  # 12,345.67 — Grüße, 世界!"
_SPREAD = 24
"""Tokens of the prompt from all over the vocabulary."""


@dataclass(frozen=True)
class Verification:
    """What was compared, and how far it was apart."""

    lines: tuple[str, ...]
    max_difference: float
    """Of the logits."""


@dataclass(frozen=True)
class _Expected:
    """What the checkpoint says, as Trainway's own loader gives it, in fp32."""

    prompt: torch.Tensor  # [1, T]
    logits: torch.Tensor  # [T, V], or the scores [1] of a discriminator
    text: tuple[int, ...]
    """The likeliest continuation."""
    tensors: dict[str, set[str]]
    """By name in memory: the hashes of what may be stored, the exact value and the one rounded to the base's type."""
    rounding: float
    """How far rounding a merged model moved its logits."""


def verify_export(source: Path, out: Path, merge: Merge | None) -> Verification:
    """Load what `out` holds as others do, and compare it with the model directory `source` of a checkpoint.

    Raises:
        DataError: names each tensor that is lost, foreign or changed, and every other difference.
    """
    base = merge.base if merge else adapter_base(source) if is_adapter(source) else None
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True) if _speaks(out) else None
    lines: list[str] = []
    if is_adapter(out):
        lines.append(_check_adapter_files(source, out))
    with quiet_transformers():
        expected = _expect(source, base, merge, tokenizer)
        model, landed = _load_as_others_do(out, base, expected)
        lines.append(landed)
        found = _logits(model, expected.prompt)
        difference = _largest_difference(found, expected.logits)
        scale = max(1.0, float(expected.logits.abs().max()))
        if not difference <= TOLERANCE * scale:  # also when it is no number
            raise _differs(
                f"the largest difference of its logits is {difference:.3g}, {TOLERANCE * scale:.3g} is allowed"
            )
        kind = "logits" if expected.text else "scores"
        lines.append(
            f"{kind} of {expected.prompt.shape[1]} tokens: equal to {difference:.1e} (allowed {TOLERANCE * scale:.1e})"
        )
        if expected.rounding:
            lines.append(
                f"rounding the merged weights to {_dtype(out)} moved them by {expected.rounding:.1e}"
            )
        if expected.text:
            lines.append(_check_text(model, expected, scale))
        if tokenizer is not None:
            lines += _check_tokenizer(source, out, tokenizer)
            if not is_adapter(out) and expected.text:
                lines += _check_end(model, out, tokenizer)
    return Verification(tuple(lines), difference)


def check_possible(directory: Path) -> None:
    """Raise ConfigError or EnvironmentFault where the model in `directory` cannot be loaded for a comparison."""
    kind = read_json(directory / CONFIG).get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"a {kind} cannot be verified",
            "it needs Python code of its own, which is not run here",
            "leave --verify out, and try it where you trust that code",
        )
    with open_tensors(
        [directory / name for name in weight_names(directory)[0]] or _parts(directory)
    ) as stored:
        needed = 4 * sum(torch.Size(shape).numel() for shape in stored.shapes.values())
    free = psutil.virtual_memory().available
    if needed * 1.2 > free:
        raise EnvironmentFault(
            f"verifying takes {needed * 1.2 / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free",
            "the model is loaded in fp32, twice in turn",
            "use a machine with more memory, or leave --verify out",
        )


# ---- what is expected


def _expect(
    source: Path, base: BaseModel | None, merge: Merge | None, tokenizer: PreTrainedTokenizerBase | None
) -> _Expected:
    model = _own(source, base, merge)
    prompt = _prompt(model, tokenizer)
    logits = _logits(model, prompt)
    rounding = 0.0
    if merge:
        from trainway.models.merge import merge_adapters

        text = _greedy(model, prompt)
        merge_adapters(model)
        merged = _logits(model, prompt)
        apart, scale = _largest_difference(merged, logits), max(1.0, float(logits.abs().max()))
        if not apart <= TOLERANCE * scale:
            raise _differs(f"merging moved its logits by {apart:.3g}, {TOLERANCE * scale:.3g} is allowed")
        if merge.base.dtype != torch.float32:
            _round(model, merge.base.dtype)
            logits = _logits(model, prompt)
            rounding, text = _largest_difference(logits, merged), _greedy(model, prompt)
    else:
        text = _greedy(model, prompt)
    tensors = {} if is_adapter(source) and not merge else _hashes(model.state_dict().items())
    return _Expected(prompt, logits, text, tensors, rounding)


def _own(source: Path, base: BaseModel | None, merge: Merge | None) -> PreTrainedModel:
    """The model of a checkpoint as Trainway loads it, strict about every name."""
    if base is not None:
        from trainway.models.merge import load_adapted

        model = load_adapted(source, base, torch.float32, merge.weights if merge else None)
        if _classifies(model):
            model.config.pad_token_id = None  # one row is scored: nothing is padded
        return model
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    model = meta_model(config, torch.float32)
    allocate(model, model, device="cpu")
    load_model(model, source)
    return model.eval()


def _prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> torch.Tensor:
    """A fixed text, then tokens from all over the vocabulary: [1, T]."""
    words = model.get_input_embeddings().weight.shape[0]
    ids = tokenizer(_TEXT, add_special_tokens=False)["input_ids"] if tokenizer else []
    spread = [(index * 2_654_435_761) % words for index in range(1, _SPREAD + 1)]  # Knuth's multiplier
    room = (getattr(model.config, "max_position_embeddings", None) or 2048) // 2
    return torch.tensor([(ids[: 2 * _SPREAD] + spread)[:room]])


@torch.no_grad()
def _logits(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=prompt, attention_mask=torch.ones_like(prompt)).logits[0]
    return logits.float()


@torch.no_grad()
def _greedy(model: Any, prompt: torch.Tensor) -> tuple[int, ...]:
    """The likeliest tokens after the prompt, past any end; none of a discriminator."""
    if _classifies(model):
        return ()
    room = (getattr(model.config, "max_position_embeddings", None) or 2**31) - prompt.shape[1]
    count = min(GREEDY_TOKENS, room)
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=0,
    )
    return tuple(output[0, prompt.shape[1] :].tolist())


def _round(model: PreTrainedModel, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if not (_classifies(model) and name.startswith("score.")):  # a head of a discriminator stays exact
            parameter.data = parameter.data.to(dtype).float()


def _hashes(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, set[str]]:
    return {name: {_hash(tensor)} for name, tensor in tensors}


def _hash(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(tensor.detach().float().contiguous().numpy().data)


# ---- what is found


def _check_adapter_files(source: Path, out: Path) -> str:
    """Every tensor of the checkpoint's adapter is in the exported file as it was."""
    before = read_model_state(source)
    with open_tensors([out / WHOLE.file_name(ADAPTER_STEM)]) as stored:
        after = {name: stored.read(name) for name in stored.shapes}
    problems = [f"{name} is missing" for name in before.keys() - after.keys()]
    problems += [f"{name} is not of the checkpoint" for name in after.keys() - before.keys()]
    problems += [
        f"{name} has changed"
        for name in before.keys() & after.keys()
        if not torch.equal(before[name], after[name])
    ]
    _refuse(problems)
    return f"adapter: all {len(before)} tensors are those of the checkpoint, bit for bit"


def _load_as_others_do(out: Path, base: BaseModel | None, expected: _Expected) -> tuple[PreTrainedModel, str]:
    """The exported model by plain transformers, and peft where it is an adapter, in fp32; every tensor compared."""
    if is_adapter(out):
        assert base is not None
        return _load_by_peft(out, base)
    model, told = _auto(out).from_pretrained(
        out, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    problems = [f"{name} is missing" for name in told["missing_keys"]]
    problems += [f"{name} is of no use" for name in told["unexpected_keys"]]
    problems += [f"{key[0]} has another shape" for key in told["mismatched_keys"]]
    found = _hashes(model.state_dict().items())
    problems += [f"{name} is missing" for name in expected.tensors.keys() - found.keys()]
    problems += [
        f"{name} is not as it was trained"
        for name, hashes in expected.tensors.items()
        if name in found and not hashes & found[name]
    ]
    _refuse(problems)
    return model.eval(), f"transformers loads it: all {len(found)} tensors are those of the checkpoint"


def _load_by_peft(out: Path, base: BaseModel) -> tuple[PreTrainedModel, str]:
    import peft

    kind = peft.PeftConfig.from_pretrained(str(out)).task_type
    labels = {"num_labels": 1} if kind == "SEQ_CLS" else {}
    auto = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    plain = auto.from_pretrained(base.directory, dtype=torch.float32, local_files_only=True, **labels)
    if labels:
        plain.config.pad_token_id = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft warns of is compared below
        model = peft.PeftModel.from_pretrained(plain, str(out))
    held = {
        saved_name(name.removeprefix("base_model.model.")): parameter
        for name, parameter in model.named_parameters()
        if is_adapter_tensor(name) or ".modules_to_save." in name
    }
    stored = read_model_state(out)
    problems = [f"peft does not load {name}" for name in stored.keys() - held.keys()]
    problems += [f"peft makes up {name}" for name in held.keys() - stored.keys()]
    problems += [
        f"peft changes {name}"
        for name in stored.keys() & held.keys()
        if not torch.equal(held[name].float(), stored[name].float())
    ]
    _refuse(problems)
    return model.eval(), f"peft loads it on {base.source}: all {len(stored)} tensors land"


def _check_text(model: Any, expected: _Expected, scale: float) -> str:
    text = _greedy(model, expected.prompt)
    if text == expected.text:
        return f"greedy text of {len(text)} tokens: equal"
    at = next(index for index, pair in enumerate(zip(text, expected.text, strict=True)) if pair[0] != pair[1])
    before = torch.cat([expected.prompt, torch.tensor([text[:at]], dtype=torch.long)], dim=1)
    last = _logits(model, before)[-1]
    margin = float((last[text[at]] - last[expected.text[at]]).abs())
    if not margin <= 2 * TOLERANCE * scale:
        raise _differs(f"its greedy text is another from token {at + 1} on")
    return f"greedy text: equal up to token {at + 1}, where two tokens are equally likely to {margin:.1e}"


def _check_tokenizer(source: Path, out: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokenizer is the checkpoint's, but for the start of a text, and so is the chat template."""
    before = AutoTokenizer.from_pretrained(source, local_files_only=True)
    probes = (_TEXT, "\n\n a\tb  c\r\n", "".join(map(str, tokenizer.all_special_tokens)))
    problems = [
        f"the tokenizer reads {text!r:.40} otherwise"
        for text in probes
        if before(text, add_special_tokens=False)["input_ids"]
        != tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    if before.chat_template != tokenizer.chat_template:
        problems.append("the chat template has changed")
    if before.get_vocab() != tokenizer.get_vocab():
        problems.append("the vocabulary has changed")
    _refuse(problems)
    template = "with its chat template" if tokenizer.chat_template else "without a chat template"
    return [f"tokenizer: {len(before):,} tokens, {template}"]


def _check_end(model: Any, out: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Plain `generate` stops at the token that ends a turn, or a document."""
    end = turn_end(tokenizer)
    end = tokenizer.eos_token_id if end is None else end
    if end is None:
        return []
    if end not in stored_ends(out):
        raise _differs(
            f"{tokenizer.convert_ids_to_tokens(end)!r} ends an answer, and generation goes on there"
        )
    prompt = torch.tensor([[end]])
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=4,
        prefix_allowed_tokens_fn=lambda row, ids: [end],  # as if the model said so
    )
    if output.shape[1] != 2:
        raise _differs(f"generation does not stop at {tokenizer.convert_ids_to_tokens(end)!r}")
    return [f"generation stops at {tokenizer.convert_ids_to_tokens(end)!r}"]


# ---- differences


def _largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.shape != other.shape:
        raise _differs(f"its logits are {list(one.shape)}, the checkpoint's {list(other.shape)}")
    return float((one - other).abs().max())


def _refuse(problems: list[str]) -> None:
    if problems:
        rest = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise _differs("; ".join(sorted(problems)[:8]) + rest)


def _differs(why: str) -> DataError:
    return DataError(
        "what was exported is not what was trained",
        why,
        "nothing was left behind; export again with the pinned versions, or from another checkpoint",
    )


def _auto(out: Path) -> Any:
    names = read_json(out / CONFIG).get("architectures") or [""]
    return (
        AutoModelForSequenceClassification
        if names[0].endswith("ForSequenceClassification")
        else AutoModelForCausalLM
    )


def _classifies(model: Any) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def _dtype(out: Path) -> str:
    return str(read_json(out / CONFIG).get("dtype"))


def _speaks(out: Path) -> bool:
    return (out / "tokenizer_config.json").exists()


def _parts(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))
