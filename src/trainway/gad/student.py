"""The student as the module that engines wrap: cross-entropy, log-probabilities and policy loss by one forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainway.gad.losses import policy_loss
from trainway.losses import linear_log_probs
from trainway.models.causal_lm import CausalLMLoss
from trainway.models.heads import linear_head, own_log_probs


class LogProbs(NamedTuple):
    """Wanted: the log-probability of each target, and the entropy of the distribution it is one of."""

    temperature: float


class Policy(NamedTuple):
    """Wanted: the policy loss; see `losses.policy_loss` for its parts. All tensors are [N], one for each target."""

    temperature: float
    advantages: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    clip_range: float
    dual_clip: float | None
    kl_coef: float


class StudentLoss(CausalLMLoss):
    """A causal language model with all that GAD asks of it, each a forward of the same wrapped module."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        boundaries: tuple[int, ...] | None = None,
        targets: Tensor | None = None,
        objective: Policy | LogProbs | None = None,
    ) -> Any:
        """What `objective` wants of the N targets, the rest as in `CausalLMLoss.forward`.

        None: the summed cross-entropy. LogProbs: log-probabilities and entropies at its temperature, [N] fp32 each, in
        the order of `targets`. Policy: the summed loss, 0-d, and without gradient the `PolicyStats` as one tensor, [6].
        The last two need `targets`, and have no z-loss. Of no targets at all a loss is 0 and every parameter's gradient
        too: ranks that share weights go forward and backward together.
        """
        if objective is None:
            return super().forward(input_ids, labels, position_ids, boundaries, targets)
        assert targets is not None, "what belongs to each target is in the order of `targets`"
        hidden = self.hidden(input_ids, position_ids, boundaries).flatten(0, 1).index_select(0, targets)
        log_probs, entropy = self._log_probs(
            hidden, labels.flatten().index_select(0, targets), objective.temperature
        )
        if isinstance(objective, LogProbs):
            return log_probs, entropy
        loss, stats = policy_loss(
            log_probs,
            objective.advantages,
            objective.old_logp,
            objective.ref_logp,
            clip_range=objective.clip_range,
            kl_coef=objective.kl_coef,
            dual_clip=objective.dual_clip,
            entropy=entropy,
        )
        return loss, torch.stack(stats)

    def _log_probs(self, hidden: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        linear = linear_head(self.model)
        if linear is None:
            return own_log_probs(self.model, hidden, labels, self.chunk_tokens, temperature)
        head, form = linear
        return linear_log_probs(
            hidden, head.weight, labels, self.chunk_tokens, temperature=temperature, bias=head.bias, form=form
        )
