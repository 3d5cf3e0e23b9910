"""Losses as pure functions: sums over target tokens, never means, and never the logits of a whole batch at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
"""Label of a position that has no target."""

CPU_CHUNK_LOGITS = 2**22
"""Logits that a CPU holds at a time, 16 MiB: the allocator keeps such a block instead of returning its pages."""


class LogitForm(NamedTuple):
    """What a model does to the products of its head before they are logits: softcap * tanh(scale * x / softcap)."""

    scale: float = 1.0
    softcap: float | None = None
    """Gemma 2, arXiv 2408.00118, section 2; None for scale * x."""


PLAIN = LogitForm()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_tokens: int,
    z_loss: float = 0.0,
    *,
    bias: Tensor | None = None,
    form: LogitForm = PLAIN,
) -> Tensor:
    """Sum of the negative log-likelihoods (nats) of `labels` under the logits form(hidden @ weight.T + bias); 0-d fp32.

    With z_loss: that sum, and z_loss times the sum over targets of logsumexp(logits)^2 (Chowdhery et al. 2022, PaLM,
    arXiv 2204.02311, section 5); [2] fp32. The gradient is that of their sum, so go backward from `.sum()`.

    hidden [N, H], weight [V, H], bias [V], labels [N] with `IGNORE_INDEX` where there is no target. At most `chunk_tokens` rows
    of logits are alive at a time. Gradients are made in the forward pass while a chunk's probabilities are at hand,
    so that nothing is kept or computed twice (Hsu et al. 2024, Liger Kernel, section 3.2). Under autocast the GEMMs
    run in its type; softmax, sums and the head's gradient are fp32. fp64 stays fp64.
    """
    if hidden.device.type == "cpu":  # elsewhere the count of targets would have to come back from the device
        targets = labels != IGNORE_INDEX
        if not bool(targets.all()):
            kept = targets.nonzero()[:, 0]
            hidden, labels = hidden.index_select(0, kept), labels.index_select(0, kept)
    needs = _needs_gradient(hidden, weight, bias)
    sums: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, chunk_tokens, z_loss, form, needs)
    return sums if z_loss else sums.sum()  # not sums[0]: FSDP2 warns of views


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_tokens: int,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    form: LogitForm = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Log-probability (nats) of each label under softmax(form(hidden @ weight.T + bias) / temperature), and the entropy
    (nats) of each such distribution, which has no gradient; [N] fp32 each.

    Both are 0 where the label is `IGNORE_INDEX`. hidden [N, H], weight [V, H], bias [V], labels [N]. At most
    `chunk_tokens` rows of logits are alive at a time: the backward pass makes each chunk again, since only there is it
    known what gradient comes to each token. Types as in `linear_cross_entropy`; the division by the temperature is fp32.
    """
    needs = _needs_gradient(hidden, weight, bias)
    log_probs, entropy = _LinearLogProbs.apply(
        hidden, weight, bias, labels, chunk_tokens, temperature, form, needs
    )
    return log_probs, entropy


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_tokens: int,
        z_loss: float,
        form: LogitForm,
        needs: tuple[bool, ...],
    ) -> Tensor:
        x, w, stat_type = _gemm_operands(hidden, weight)
        sums = x.new_zeros(2 if z_loss else 1, dtype=stat_type)
        gradients = _HeadGradients(x, weight, needs, stat_type)
        # inside the Function autocast is still on and would undo the choice of types
        with torch.autocast(x.device.type, enabled=False):
            buffer = _logit_buffer(x, w, chunk_tokens)
            for start, part in _chunks(labels, buffer.shape[0]):
                rows = x[start : start + part.shape[0]]  # [n, H]
                logits, slope = _logits(rows, w, bias, form, buffer)
                log_probs, nll, log_z = _log_probs(logits, stat_type, part, bool(z_loss))
                sums[0] += nll.sum()
                if log_z is not None:
                    sums[1] += z_loss * log_z.square().sum()
                if not any(needs):
                    continue
                pull = None if log_z is None else 2 * z_loss * log_z
                d_logits = _product_gradient(_logit_gradient(log_probs, part, pull), slope, form)
                gradients.add(start, rows, w, d_logits)
        ctx.save_for_backward(*gradients.finished(hidden.dtype, weight, bias))
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        grad_loss = grad_sums[0]
        # only where looking does not wait for the device
        if grad_sums.numel() == 2 and grad_sums.device.type == "cpu":
            assert bool((grad_sums == grad_loss).all()), "the gradient is that of the sum of both losses"
        gradients = (None if kept is None else kept * grad_loss.to(kept.dtype) for kept in ctx.saved_tensors)
        return (*gradients, None, None, None, None, None)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_tokens: int,
        temperature: float,
        form: LogitForm,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor]:
        x, w, stat_type = _gemm_operands(hidden, weight)
        picked, entropy = (x.new_empty(len(x), dtype=stat_type) for _ in range(2))
        with torch.autocast(x.device.type, enabled=False):
            buffer = _logit_buffer(x, w, chunk_tokens)
            spare = torch.empty_like(buffer, dtype=stat_type) if x.device.type == "cpu" else None
            for start, part in _chunks(labels, buffer.shape[0]):
                own = slice(start, start + part.shape[0])
                logits, _ = _logits(x[own], w, bias, form, buffer)
                log_probs, nll, _ = _log_probs(logits, stat_type, part, temperature=temperature)
                picked[own] = -nll
                entropy[own] = _entropy(log_probs, spare)
        ctx.mark_non_differentiable(entropy)
        if any(needs):
            # the weight itself: what the GEMM took it to would be a copy, and an engine that has let go of a parameter
            # in between fills that one again
            ctx.save_for_backward(x, weight, bias, labels)
        ctx.settings = hidden.dtype, stat_type, chunk_tokens, temperature, form, needs
        return picked, entropy.masked_fill_(labels == IGNORE_INDEX, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, no_grad_of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, labels = ctx.saved_tensors
        hidden_type, stat_type, chunk_tokens, temperature, form, needs = ctx.settings
        w = weight.to(x.dtype)
        gradients = _HeadGradients(x, weight, needs, stat_type)
        pull = -(grad / temperature).masked_fill_(labels == IGNORE_INDEX, 0.0)[:, None]
        with torch.autocast(x.device.type, enabled=False):
            buffer = _logit_buffer(x, w, chunk_tokens)
            for start, part in _chunks(labels, buffer.shape[0]):
                own = slice(start, start + part.shape[0])
                logits, slope = _logits(x[own], w, bias, form, buffer)
                log_probs, _, _ = _log_probs(logits, stat_type, part, temperature=temperature)
                d_logits = _logit_gradient(log_probs, part).mul_(pull[own])
                gradients.add(start, x[own], w, _product_gradient(d_logits, slope, form))
        return (*gradients.finished(hidden_type, weight, bias), None, None, None, None, None)


class _HeadGradients:
    """Gradients of a linear head's hidden states, weight and bias, chunk by chunk; None where not needed."""

    def __init__(self, x: Tensor, weight: Tensor, needs: tuple[bool, ...], stat_type: torch.dtype) -> None:
        self.hidden = torch.empty_like(x) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=stat_type) if needs[1] else None
        self.bias = x.new_zeros(len(weight), dtype=stat_type) if needs[2] else None

    def add(self, start: int, rows: Tensor, w: Tensor, d_products: Tensor) -> None:
        """Of the chunk `rows` [n, H], which begins at `start`; w is the weight in the type of the GEMMs."""
        d_products = d_products.to(rows.dtype)
        if self.hidden is not None:
            torch.mm(d_products, w, out=self.hidden[start : start + rows.shape[0]])
        if self.weight is not None and self.weight.dtype == d_products.dtype:
            self.weight.addmm_(d_products.t(), rows)
        elif self.weight is not None:
            self.weight += d_products.t() @ rows
        if self.bias is not None:
            self.bias += d_products.sum(0, dtype=self.bias.dtype)

    def finished(
        self, hidden_type: torch.dtype, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three, each in the type of what it is the gradient of."""
        return (
            None if self.hidden is None else self.hidden.to(hidden_type),
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


def _needs_gradient(*inputs: Tensor | None) -> tuple[bool, ...]:
    # a Function's own forward runs without grad mode, so this is settled before
    grads = torch.is_grad_enabled()
    return tuple(grads and x is not None and x.requires_grad for x in inputs)


def _gemm_operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both operands in the type of the GEMMs, and the type of the sums."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return hidden.to(dtype), weight.to(dtype), torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(labels: Tensor, chunk_tokens: int) -> list[tuple[int, Tensor]]:
    return [
        (start, labels[start : start + chunk_tokens]) for start in range(0, labels.shape[0], chunk_tokens)
    ]


def _logit_buffer(rows: Tensor, weight: Tensor, chunk_tokens: int) -> Tensor:
    """Room for one chunk of logits, used again and again: fresh pages cost a CPU as much as the GEMM itself."""
    if rows.device.type == "cpu":
        chunk_tokens = max(1, min(chunk_tokens, CPU_CHUNK_LOGITS // weight.shape[0]))
    return rows.new_empty(min(chunk_tokens, max(1, rows.shape[0])), weight.shape[0])


def _logits(
    rows: Tensor, weight: Tensor, bias: Tensor | None, form: LogitForm, buffer: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Logits [n, V], written over `buffer`, and the slope of the softcap at each if there is one."""
    logits = torch.mm(rows, weight.t(), out=buffer[: rows.shape[0]])
    if bias is not None:
        logits += bias.to(logits.dtype)
    if form.scale != 1.0:
        logits *= form.scale
    if form.softcap is None:
        return logits, None
    slope = 1.0 - logits.div_(form.softcap).tanh_().square()
    return logits.mul_(form.softcap), slope


def _log_probs(
    logits: Tensor,
    stat_type: torch.dtype,
    labels: Tensor,
    with_log_z: bool = False,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities [n, V], the loss of each row [n] and, if wanted, logsumexp of its logits [n]; the last two are
    0 for an ignored row. May write over the logits."""
    if temperature != 1.0:
        logits = logits.to(stat_type).div_(temperature)
    ignored = labels == IGNORE_INDEX
    targets = labels.masked_fill(ignored, 0)[:, None]
    # log_softmax may write over the logits; one of each row, kept, gives the normaliser back: logit - log-probability
    kept = logits.gather(1, targets)[:, 0].to(stat_type) if with_log_z else None
    if logits.device.type == "cpu" and logits.dtype == stat_type:
        # CPU's kernel finishes a row before it writes it, so it can work in place
        log_probs = torch.log_softmax(logits, -1, out=logits)
    else:
        log_probs = torch.log_softmax(logits, -1, dtype=stat_type)
    picked = log_probs.gather(1, targets)[:, 0]
    log_z = None if kept is None else (kept - picked).masked_fill(ignored, 0.0)
    return log_probs, -picked.masked_fill(ignored, 0.0), log_z


def _entropy(log_probs: Tensor, spare: Tensor | None) -> Tensor:
    """Nats of each row, [n] of [n, V]; writes over `log_probs`, and over `spare`, which has its type and as many rows."""
    if spare is None:
        probs = log_probs.exp_()
        return torch.special.entr(probs, out=probs).sum(-1)
    # a CPU's entr takes seven times as long, half of what the GEMM does
    probs = torch.exp(log_probs, out=spare[: len(log_probs)])
    return -probs.mul_(log_probs.clamp_(min=-1e4)).sum(-1)  # of an impossible token 0, and not 0 * -inf


def _logit_gradient(log_probs: Tensor, labels: Tensor, pull: Tensor | None = None) -> Tensor:
    """softmax * (1 + pull) - one-hot, in place, `pull` [n] 0 where empty; rows of ignored labels are 0."""
    ignored = labels == IGNORE_INDEX
    probs = log_probs.exp_()
    if pull is not None:
        probs.mul_(1.0 + pull[:, None])
    targets = labels.masked_fill(ignored, 0)[:, None]
    probs.scatter_add_(1, targets, probs.new_full((), -1.0).expand(targets.shape))
    if log_probs.device.type == "cpu":
        return probs  # linear_cross_entropy has left the ignored rows out already
    return probs.masked_fill_(ignored[:, None], 0.0)


def _product_gradient(d_logits: Tensor, slope: Tensor | None, form: LogitForm) -> Tensor:
    """The gradient of the head's products from that of the logits, in place."""
    if slope is not None:
        d_logits.mul_(slope)
    return d_logits if form.scale == 1.0 else d_logits.mul_(form.scale)
