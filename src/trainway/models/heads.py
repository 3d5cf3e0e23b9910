"""How a model's last hidden states become logits, and the losses of those whose head is known by its module alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trainway.errors import ConfigError
from trainway.losses import IGNORE_INDEX, PLAIN, LogitForm


def linear_head(model: PreTrainedModel) -> tuple[nn.Linear, LogitForm] | None:
    """The head of a model whose logits are form(hidden @ weight.T + bias); None for any that is not known to be so.

    Known are classes of transformers, by name, as long as their head is a bare linear layer: an adapter on it, say,
    makes it another.
    """
    cls = type(model)
    form = _FORMS.get(cls.__name__) if cls.__module__.startswith("transformers.models.") else None
    head = model.get_output_embeddings()
    if form is None or type(head) is not nn.Linear:
        return None
    return head, form(model.config)


def own_head_loss(
    model: PreTrainedModel, hidden: Tensor, labels: Tensor, chunk_tokens: int, z_loss: float = 0.0
) -> Tensor:
    """What `losses.linear_cross_entropy` returns, through whatever the model itself does to hidden states [N, H].

    Each chunk of logits is computed again in the backward pass, so that one at a time is alive.
    """
    if hidden.device.type == "cpu":  # elsewhere the count of targets would have to come back from the device
        kept = (labels != IGNORE_INDEX).nonzero()[:, 0]
        hidden, labels = hidden.index_select(0, kept), labels.index_select(0, kept)
    sums = [
        checkpoint(partial(_chunk_loss, model, z_loss=z_loss), rows, part, use_reentrant=False)
        for rows, part in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
    ]  # at least one, if empty: every engine wants every parameter used
    total = torch.stack(sums).sum(0)
    return total if z_loss else total.sum()


def own_log_probs(
    model: PreTrainedModel, hidden: Tensor, labels: Tensor, chunk_tokens: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What `losses.linear_log_probs` returns, through whatever the model itself does to hidden states [N, H].

    Each chunk of logits is computed again in the backward pass, so that one at a time is alive.
    """
    chunks = [
        checkpoint(partial(_chunk_log_probs, model, temperature=temperature), rows, part, use_reentrant=False)
        for rows, part in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
    ]  # at least one, if empty
    log_probs, entropy = zip(*chunks, strict=True)
    return torch.cat(log_probs), torch.cat(entropy)


def own_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [N, V] of hidden states [N, H] by the model's own forward, with these in place of its body's result.

    Raises ConfigError for a model that does not ask its body for them.
    """
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    with _body_that_returns(model, hidden[None]) as stub:
        logits: Tensor = model(input_ids=ids, use_cache=False, return_dict=True).logits
    if not stub.was_called:
        raise ConfigError(
            f"{type(model).__name__} cannot be trained: its logits cannot be had of hidden states alone",
            f"its forward goes round its own {model.base_model_prefix}",
            "start from a model of another architecture",
        )
    return logits[0]


def _chunk_loss(model: PreTrainedModel, hidden: Tensor, labels: Tensor, *, z_loss: float) -> Tensor:
    logits = own_logits(model, hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    if not z_loss:
        return nll[None]
    log_z = logits.logsumexp(-1).masked_fill(labels == IGNORE_INDEX, 0.0)
    return torch.stack([nll, z_loss * log_z.square().sum()])


def _chunk_log_probs(
    model: PreTrainedModel, hidden: Tensor, labels: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = own_logits(model, hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    nll = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)
    with torch.no_grad():
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1).masked_fill_(labels == IGNORE_INDEX, 0.0)
    return -nll, entropy


@contextmanager
def _body_that_returns(model: PreTrainedModel, hidden: Tensor) -> Iterator[_Stub]:
    name = model.base_model_prefix
    body = model._modules[name]
    stub = _Stub(body, hidden)
    model._modules[name] = stub
    try:
        yield stub
    finally:
        model._modules[name] = body


class _Stub(nn.Module):
    """Stands in for a body: answers with the output of one, of which all but the hidden states are None."""

    def __init__(self, body: nn.Module | None, hidden: Tensor) -> None:
        super().__init__()
        self.__dict__["body"] = body  # but no child: its weights are not used here
        self.hidden, self.was_called = hidden, False

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        self.was_called = True
        return _Output(self.hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["body"], name)  # some heads read a factor there


class _Output:
    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        assert index == 0, "of a body's output the head needs the hidden states alone"
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _plain(config: Any) -> LogitForm:
    return PLAIN


def _softcapped(config: Any) -> LogitForm:
    return LogitForm(softcap=config.final_logit_softcapping)


def _multiplied(config: Any) -> LogitForm:
    return LogitForm(scale=config.logit_scale)


def _divided(config: Any) -> LogitForm:
    return LogitForm(scale=1 / config.logits_scaling)


_FORMS: dict[str, Callable[[Any], LogitForm]] = {
    "CohereForCausalLM": _multiplied,
    "Cohere2ForCausalLM": _multiplied,
    "DeepseekV3ForCausalLM": _plain,
    "GPT2LMHeadModel": _plain,
    "GPTNeoXForCausalLM": _plain,
    "GemmaForCausalLM": _plain,
    "Gemma2ForCausalLM": _softcapped,
    "Gemma3ForCausalLM": _softcapped,
    "GptOssForCausalLM": _plain,
    "GraniteForCausalLM": _divided,
    "LlamaForCausalLM": _plain,
    "MistralForCausalLM": _plain,
    "MixtralForCausalLM": _plain,
    "OPTForCausalLM": _plain,
    "Olmo2ForCausalLM": _plain,
    "Olmo3ForCausalLM": _plain,
    "PhiForCausalLM": _plain,
    "Phi3ForCausalLM": _plain,
    "Qwen2ForCausalLM": _plain,
    "Qwen2MoeForCausalLM": _plain,
    "Qwen3ForCausalLM": _plain,
    "Qwen3MoeForCausalLM": _plain,
    "SmolLM3ForCausalLM": _plain,
    "StableLmForCausalLM": _plain,
    "Starcoder2ForCausalLM": _plain,
}
"""Classes of transformers whose head is linear up to this form; tests hold each against its own logits."""
