"""Small random models of many architectures, for the tests of attention, packing and heads."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 64
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 0,
    "eos_token_id": 1, "attention_dropout": 0.0,
}  # fmt: skip
_BOTH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 4,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip

SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True} | _BOTH),
    "qwen2_moe": ("qwen2_moe", _EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mixtral": ("mixtral", {"sliding_window": 5, "num_local_experts": 4}),
    "gemma": ("gemma", {"num_key_value_heads": 1}),
    "gemma2": ("gemma2", _BOTH | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 5}),
    "gemma3_text": ("gemma3_text", _BOTH | {"final_logit_softcapping": 3.0}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"sliding_window": 5}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
                      "embd_pdrop": 0.0, "hidden_size": None, "num_attention_heads": None, "num_hidden_layers": None,
                      "max_position_embeddings": None}),
    "gpt_neox": ("gpt_neox", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", _BOTH),
    "granite": ("granite", {"attention_multiplier": 0.2, "logits_scaling": 2.5, "residual_multiplier": 0.7,
                            "embedding_multiplier": 3.0}),
    "cohere": ("cohere", {"logit_scale": 0.4}),
    "cohere2": ("cohere2", _BOTH | {"logit_scale": 0.4}),
    "starcoder2": ("starcoder2", {"sliding_window": 5, "residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "deepseek_v3": ("deepseek_v3", _MLA),
    "gpt_oss": ("gpt_oss", _BOTH | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "stablelm": ("stablelm", {}),
    "glm4": ("glm4", {}),
    "falcon": ("falcon", {"head_dim": None, "num_key_value_heads": None}),
    "falcon-alibi": ("falcon", {"alibi": True, "head_dim": None, "num_key_value_heads": None}),
    "bloom": ("bloom", {"n_head": 4, "num_attention_heads": None, "n_layer": 2, "num_hidden_layers": None}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "hidden_size": None, "num_attention_heads": None,
                    "num_hidden_layers": None}),
    "mamba": ("mamba", {"intermediate_size": 64}),
    "jamba": ("jamba", {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "qwen3_next": ("qwen3_next", _EXPERTS | {"layer_types": ["linear_attention", "full_attention"],
                                             "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                                             "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                                             "shared_expert_intermediate_size": 16}),
}  # fmt: skip
"""Name to transformers' model type and what differs from the common sizes; None leaves a size out."""


def config_of(name: str, **settings: Any) -> Any:
    model_type, different = SPECS[name]
    values = {
        key: value for key, value in (_COMMON | different | settings).items() if value is not None or key == "pad_token_id"
    }  # fmt: skip
    return AutoConfig.for_model(model_type, **values)


def tiny_model(name: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """An fp32 model in eval mode whose scores and logits are large enough for caps, sinks and scales to show."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(name, **settings), attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                noise = 0.25 * torch.randn(parameter.shape)
                parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model.float().eval()
