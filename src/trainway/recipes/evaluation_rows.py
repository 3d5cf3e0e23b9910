"""How many rows go through a model at once without gradients: as many as memory has room for."""

from __future__ import annotations

import psutil
import torch
from transformers import PreTrainedModel

MOST_TOKENS = {"cpu": 8192, "cuda": 131072}
"""Tokens in a batch past which nothing gets faster."""
SHARE = 0.5
"""Of the free memory: the rest is for what this arithmetic does not see."""


def fitting_rows(model: PreTrainedModel, seq_len: int, chunk_tokens: int, device: torch.device) -> int:
    """Rows of `seq_len` tokens, at least 1; the model is on the device already.

    Without gradients one block's activations are alive at a time, in fp32 about 12 widths and 3 feed-forward widths
    (of a mixture: of the experts that a token goes through), beside a chunk of logits with its softmax.
    """
    config = model.config.get_text_config()
    width = int(getattr(config, "hidden_size", 0) or 1024)
    inner = int(getattr(config, "intermediate_size", 0) or 4 * width)
    experts = int(getattr(config, "num_experts_per_tok", 0) or 1)
    per_token = 4 * (12 * width + 3 * inner * experts)
    logits = 3 * 4 * chunk_tokens * int(config.vocab_size)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    tokens = min(MOST_TOKENS.get(device.type, 8192), int((free * SHARE - logits) / per_token))
    return max(1, tokens // seq_len)
