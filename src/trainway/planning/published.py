"""Shapes of published models, so that a plan of them needs no download (no torch)."""

from __future__ import annotations

from typing import Any

from trainway.planning.shapes import ModelShape, read_shape


def _dense(
    model_type: str,
    vocab: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    positions: int,
    **more: Any,
) -> dict[str, Any]:
    """A dense model by its numbers; `more`: further keys of its config.json."""
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        **more,
    }


_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_WHOLE: dict[str, Any] = {"use_sliding_window": False}
_QWEN3: dict[str, Any] = {"head_dim": 128, "attention_bias": False, "use_sliding_window": False}
_GEMMA3: dict[str, Any] = {**_TIED, "head_dim": 256, "sliding_window": 512, "attention_bias": False}
_GRANITE: dict[str, Any] = {**_TIED, "attention_bias": False, "mlp_bias": False}

PUBLISHED: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _dense("llama", 32000, 4096, 11008, 32, 32, 32, 4096),
    "meta-llama/Llama-2-13b-hf": _dense("llama", 32000, 5120, 13824, 40, 40, 40, 4096),
    "meta-llama/Llama-3.1-8B-Instruct": _dense("llama", 128256, 4096, 14336, 32, 32, 8, 131072),
    "meta-llama/Llama-3.1-70B-Instruct": _dense("llama", 128256, 8192, 28672, 80, 64, 8, 131072),
    "meta-llama/Llama-3.2-1B-Instruct": _dense("llama", 128256, 2048, 8192, 16, 32, 8, 131072, head_dim=64, **_TIED),
    "meta-llama/Llama-3.2-3B-Instruct": _dense("llama", 128256, 3072, 8192, 28, 24, 8, 131072, head_dim=128, **_TIED),
    "Qwen/Qwen2.5-0.5B-Instruct": _dense("qwen2", 151936, 896, 4864, 24, 14, 2, 32768, **_TIED, **_WHOLE),
    "Qwen/Qwen2.5-1.5B-Instruct": _dense("qwen2", 151936, 1536, 8960, 28, 12, 2, 32768, **_TIED, **_WHOLE),
    "Qwen/Qwen2.5-32B-Instruct": _dense("qwen2", 152064, 5120, 27648, 64, 40, 8, 32768, **_WHOLE),
    "Qwen/Qwen2.5-72B-Instruct": _dense("qwen2", 152064, 8192, 29568, 80, 64, 8, 32768, **_WHOLE),
    "Qwen/Qwen3-0.6B": _dense("qwen3", 151936, 1024, 3072, 28, 16, 8, 40960, **_QWEN3, **_TIED),
    "Qwen/Qwen3-1.7B": _dense("qwen3", 151936, 2048, 6144, 28, 16, 8, 40960, **_QWEN3, **_TIED),
    "Qwen/Qwen3-4B": _dense("qwen3", 151936, 2560, 9728, 36, 32, 8, 40960, **_QWEN3, **_TIED),
    "Qwen/Qwen3-8B": _dense("qwen3", 151936, 4096, 12288, 36, 32, 8, 40960, **_QWEN3),
    "Qwen/Qwen3-14B": _dense("qwen3", 151936, 5120, 17408, 40, 40, 8, 40960, **_QWEN3),
    "Qwen/Qwen3-32B": _dense("qwen3", 151936, 5120, 25600, 64, 64, 8, 40960, **_QWEN3),
    "Qwen/Qwen3-30B-A3B": _dense(
        "qwen3_moe", 151936, 2048, 6144, 48, 32, 4, 40960, **_QWEN3, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": _dense("mistral", 32768, 4096, 14336, 32, 32, 8, 32768, sliding_window=None),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _dense(
        "mixtral", 32000, 4096, 14336, 32, 32, 8, 32768, num_local_experts=8, num_experts_per_tok=2, sliding_window=None
    ),
    "google/gemma-2-2b-it": _dense(
        "gemma2", 256000, 2304, 9216, 26, 8, 4, 8192, **_TIED, head_dim=256, sliding_window=4096,
        layer_types=["sliding_attention", "full_attention"] * 13,
    ),
    "google/gemma-2-9b-it": _dense(
        "gemma2", 256000, 3584, 14336, 42, 16, 8, 8192, **_TIED, head_dim=256, sliding_window=4096,
        layer_types=["sliding_attention", "full_attention"] * 21,
    ),
    "google/gemma-3-1b-it": _dense(
        "gemma3_text", 262144, 1152, 6912, 26, 4, 1, 32768, **_GEMMA3,
        layer_types=[*(["sliding_attention"] * 5 + ["full_attention"]) * 4, *["sliding_attention"] * 2],
    ),
    "microsoft/Phi-3-mini-4k-instruct": _dense("phi3", 32064, 3072, 8192, 32, 32, 32, 4096, sliding_window=2047),
    "microsoft/phi-4": _dense("phi3", 100352, 5120, 17920, 40, 40, 10, 16384, sliding_window=None),
    "allenai/OLMo-2-1124-7B-Instruct": _dense("olmo2", 100352, 4096, 11008, 32, 32, 32, 4096),
    "allenai/OLMo-2-1124-13B-Instruct": _dense("olmo2", 100352, 5120, 13824, 40, 40, 40, 4096),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _dense("llama", 49152, 960, 2560, 32, 15, 5, 8192, **_TIED),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _dense("llama", 49152, 2048, 8192, 24, 32, 32, 8192, **_TIED),
    "HuggingFaceTB/SmolLM3-3B": _dense("smollm3", 128256, 2048, 11008, 36, 16, 4, 65536, **_TIED, **_WHOLE),
    "ibm-granite/granite-3.3-2b-instruct": _dense("granite", 49159, 2048, 8192, 40, 32, 8, 131072, **_GRANITE),
    "ibm-granite/granite-3.3-8b-instruct": _dense("granite", 49159, 4096, 12800, 40, 32, 8, 131072, **_GRANITE),
    "zai-org/GLM-4-9B-0414": _dense("glm4", 151552, 4096, 13696, 40, 32, 2, 32768, head_dim=128, attention_bias=True),
    "bigcode/starcoder2-3b": _dense("starcoder2", 49152, 3072, 12288, 30, 24, 2, 16384, **_TIED, use_bias=True,
                                    sliding_window=4096),
    "bigcode/starcoder2-7b": _dense("starcoder2", 49152, 4608, 18432, 32, 36, 4, 16384, **_TIED, use_bias=True,
                                    sliding_window=4096),
    "openai-community/gpt2": {
        "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
    },
    "openai/gpt-oss-20b": {
        "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "attention_bias": True, "tie_word_embeddings": False,
        "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
    },
    "openai/gpt-oss-120b": {
        "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 128, "num_experts_per_tok": 4, "attention_bias": True, "tie_word_embeddings": False,
        "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 18,
        "max_position_embeddings": 131072,
    },
    "Qwen/Qwen2.5-3B-Instruct": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "use_sliding_window": False, "max_position_embeddings": 32768,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "tie_word_embeddings": False, "use_sliding_window": False, "max_position_embeddings": 32768,
    },
    "Qwen/Qwen2.5-14B-Instruct": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 13824,
        "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
        "tie_word_embeddings": False, "use_sliding_window": False, "max_position_embeddings": 32768,
    },
    "Qwen/Qwen3-235B-A22B-Instruct-2507": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False,
        "tie_word_embeddings": False, "use_sliding_window": False, "max_position_embeddings": 262144,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
}  # fmt: skip
"""What a config.json says, by Hub id, as far as the shape goes."""


def published_shape(name: str) -> ModelShape | None:
    """The shape of a model on the Hub; None for one that is not listed here."""
    return read_shape(PUBLISHED[name]) if name in PUBLISHED else None
