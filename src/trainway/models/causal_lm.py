"""The module that engines wrap: a causal language model together with its summed next-token loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from trainway.losses import linear_cross_entropy
from trainway.models.body import last_hidden
from trainway.models.heads import linear_head, own_head_loss


class CausalLMLoss(nn.Module):
    """A model and its loss as one module, so that DDP and FSDP2 see every parameter used within one forward.

    The loss is that of the next tokens alone: of a mixture of experts it holds no auxiliary loss of the router, which
    transformers adds only with `output_router_logits`.
    """

    def __init__(self, model: PreTrainedModel, chunk_tokens: int = 1024, z_loss: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.z_loss = z_loss

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        boundaries: tuple[int, ...] | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Sum of the targets' negative log-likelihoods, 0-d fp32; the full logits are never made.

        With z_loss, in training mode: that sum and the weighted z-loss, [2] fp32, for a backward pass from their sum.

        input_ids, labels, position_ids [B, T]; labels[b, t] is the token that position t is to predict (already
        shifted), `IGNORE_INDEX` for none. boundaries: see `attention.use_packed_attention`; None for whole rows, which
        may be padded on their right. targets: int64, the flattened positions that have a label, where few do: only
        they reach the head.
        """
        hidden = self.hidden(input_ids, position_ids, boundaries).flatten(0, 1)  # [B * T, H]
        labels = labels.flatten()
        if targets is not None:
            hidden, labels = hidden.index_select(0, targets), labels.index_select(0, targets)
        z_loss = self.z_loss if self.training else 0.0
        linear = linear_head(self.model)
        if linear is None:
            return own_head_loss(self.model, hidden, labels, self.chunk_tokens, z_loss)
        head, form = linear
        return linear_cross_entropy(
            hidden, head.weight, labels, self.chunk_tokens, z_loss, bias=head.bias, form=form
        )

    def hidden(
        self, input_ids: Tensor, position_ids: Tensor | None, boundaries: tuple[int, ...] | None
    ) -> Tensor:
        """The body's normalised last hidden states, [B, T, H]."""
        return last_hidden(self.model, input_ids, position_ids, boundaries)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, as a method that engines can prepare the weights for."""
        return self.model.generate(*args, **kwargs)

    @property
    def head(self) -> Tensor:
        """Weights of the output head, [V, H]; the input embedding itself where the two are tied."""
        return self.model.get_output_embeddings().weight
