"""The module that engines wrap: a causal language model together with its summed next-token loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from trainway.losses import linear_cross_entropy


class CausalLMLoss(nn.Module):
    """A model and its loss as one module, so that DDP and FSDP2 see every parameter used within one forward."""

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
    ) -> Tensor:
        """Sum of the targets' negative log-likelihoods, 0-d fp32; the full logits are never made.

        With z_loss, in training mode: that sum and the weighted z-loss, [2] fp32, for a backward pass from their sum.

        input_ids, labels, position_ids [B, T]; labels[b, t] is the token that position t is to predict (already
        shifted), `IGNORE_INDEX` for none. boundaries: see `attention.use_packed_attention`; empty for whole rows.
        """
        if boundaries is None:
            rows, length = input_ids.shape
            boundaries = tuple(range(0, rows * length + 1, length))
        hidden = self.hidden(input_ids, position_ids, boundaries)  # [B, T, H]
        z_loss = self.z_loss if self.training else 0.0
        return linear_cross_entropy(
            hidden.flatten(0, 1), self.head, labels.flatten(), self.chunk_tokens, z_loss
        )

    def hidden(self, input_ids: Tensor, position_ids: Tensor | None, boundaries: tuple[int, ...]) -> Tensor:
        """The body's normalised last hidden states, [B, T, H]."""
        body = self.model.get_submodule(self.model.base_model_prefix)
        output = body(input_ids=input_ids, position_ids=position_ids, boundaries=boundaries, use_cache=False)
        return output.last_hidden_state

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, as a method that engines can prepare the weights for."""
        return self.model.generate(*args, **kwargs)

    @property
    def head(self) -> Tensor:
        """Weights of the output head, [V, H]; the input embedding itself where the two are tied."""
        return self.model.get_output_embeddings().weight
