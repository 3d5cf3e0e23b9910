"""Material for fine-tuning: tiny random models of several families in Hugging Face's format, and conversations."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = ("what is", "tell me about", "where do I find", "how large is", "who saw", "please explain")
THINGS = ("the sea", "a mountain", "my old bicycle", "this tree", "the north wind", "a quiet river", "bread")
ANSWERS = ("It is", "Nobody knows", "I would say that it is", "You will find it", "People say it was")


def conversations(path: Path, rows: int = 120, seed: int = 3) -> Path:
    """Chats of one to four exchanges, of very different lengths, some with a system prompt."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for i in range(rows):
            turns = [{"role": "system", "content": "Answer kindly."}] if i % 5 == 0 else []
            for _ in range(rng.choice((1, 1, 2, 4))):
                turns.append({"role": "user", "content": f"{rng.choice(QUESTIONS)} {rng.choice(THINGS)}?"})
                words = " ".join(rng.choice(THINGS) for _ in range(rng.randrange(1, 12)))
                turns.append({"role": "assistant", "content": f"{rng.choice(ANSWERS)} {words}."})
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 ids with ChatML's tokens; as in many models, padding is the end of a turn."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([*QUESTIONS, *THINGS, *ANSWERS, "system user assistant"], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.chat_template = CHATML
    return made


def llama(**changes: Any) -> PreTrainedModel:
    """A Llama of two layers of 32."""
    torch.manual_seed(5)
    shape = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.08,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}, eos_token_id=2, pad_token_id=2))


def gpt_oss(**changes: Any) -> PreTrainedModel:
    """A gpt-oss of two layers, one with a window of 16 tokens, and four experts of which two work."""
    torch.manual_seed(6)
    shape = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,
    }
    config = GptOssConfig(
        **{**shape, **changes}, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    )
    config.eos_token_id = config.pad_token_id = 2
    model = GptOssForCausalLM(config)
    with torch.no_grad():  # untrained sinks are all alike, and would prove little
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.linspace(-1.0, 1.0, len(parameter)))
    return model


FAMILIES = {"llama": llama, "gpt_oss": gpt_oss}


def base_model(directory: Path, family: str = "llama") -> Path:
    """A model directory with a tokenizer, as one would download it."""
    if not directory.exists():
        FAMILIES[family]().save_pretrained(directory)
        tokenizer().save_pretrained(directory)
    return directory


def tiny_sft(base: Path, chats: Path, store_dir: Path, run_dir: Path, **sections: Any) -> dict[str, Any]:
    """A config whose run takes seconds."""
    config: dict[str, Any] = {
        "recipe": "sft",
        "run_dir": str(run_dir),
        "model": {"path": str(base)},
        "data": {"train": [str(chats)], "val_ratio": 0.1, "store_dir": str(store_dir)},
        "train": {
            "total_steps": 20,
            "seq_len": 96,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "num_threads": 1,
        },
        "optim": {"lr": 3e-3, "weight_decay": 0.01},
        "schedule": {"name": "linear", "warmup_steps": 4},
        "checkpoint": {"save_every": 10},
        "eval": {"every": 10, "max_new_tokens": 8, "num_samples": 1},
    }
    for name, values in sections.items():
        config[name] = {**config.get(name, {}), **values}
    return config


LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]}
EXPERT_LORA = {"r": 2, "alpha": 4, "target_modules": ["q_proj", "o_proj"],
               "target_parameters": ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]}  # fmt: skip
