"""A GGUF file for llama.cpp, of the families that were proved: the `gguf` package writes it, transformers reads it back."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from trainway.checkpoint.adapter import is_adapter
from trainway.checkpoint.pieces import open_tensors
from trainway.data.tokenizer import SPLIT_PATTERN
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.files import read_json
from trainway.models.base_files import CONFIG, weight_names
from trainway.models.base_import import quiet_transformers
from trainway.release.endings import turn_end

if TYPE_CHECKING:
    from trainway.release.bundle import Merge

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
FAMILIES = ("llama", "qwen2", "qwen3")
"""By transformers' names: of each a model was written, read back and compared."""
TOLERANCE: dict[str, float] = {"f32": 1e-5, "f16": 0.02, "bf16": 0.1, "q8_0": 0.15}
"""Of the logits read back: the root mean square of their differences, relative to theirs."""
_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)
_PROBE = "def area(width, height):\n    return width * height  # Grüße, 世界!"
_DIGITS = " 12,345.67"


def check_family(source: Path, merge: Merge | None) -> None:
    """Raise ConfigError or EnvironmentFault for what cannot be written, before anything is."""
    if find_spec("gguf") is None:
        raise EnvironmentFault(
            "--gguf needs the package gguf", "it is not installed", "pip install 'trainway[gguf]'"
        )
    if is_adapter(source) and merge is None:
        raise ConfigError(
            "--gguf writes a whole model, and this is an adapter",
            "llama.cpp's own converter makes adapters, of the base that it knows",
            "add --merge",
        )
    config = read_json((merge.base.directory if merge else source) / CONFIG)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"--gguf knows {', '.join(FAMILIES)}, and this is a {family}",
            "what was not read back and compared is not written",
            "convert the exported directory with llama.cpp's convert_hf_to_gguf.py",
        )
    rope = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type", "default")
    unknown = [f"rope_type {rope}"] if rope != "default" else []
    unknown += [
        f"{name} {config[name]}"
        for name in ("use_sliding_window", "mlp_bias", *(["attention_bias"] if family != "qwen2" else []))
        if config.get(name)
    ]
    if unknown:
        raise ConfigError(
            f"--gguf does not know a {family} with {' and '.join(unknown)}",
            "what was not read back and compared is not written",
            "convert the exported directory with llama.cpp's convert_hf_to_gguf.py",
        )
    _split_name(source)


def write_gguf(directory: Path, path: Path, kind: GgufType, *, verify: bool = True) -> str:
    """Write the exported model in `directory` as `path`, and return a line about it.

    Matrices are stored as `kind`, vectors in fp32. A matrix whose rows are no multiple of 32 is stored in fp16 where
    q8_0 was asked for.

    Raises:
        ConfigError: a tokenizer that llama.cpp would read otherwise.
        DataError: what was read back differs.
    """
    import gguf

    config = read_json(directory / CONFIG)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    writer = gguf.GGUFWriter(str(path), config["model_type"], use_temp_file=True)
    _add_shape(writer, config, path.stem, kind)
    _add_tokenizer(writer, directory, tokenizer, config["vocab_size"])
    _add_tensors(writer, directory, config, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size = f"{path.name}: {path.stat().st_size / 1e6:,.1f} MB"
    return f"{size}; {_verified(directory, path, kind, tokenizer)}" if verify else size


# ---- what the model is


def _add_shape(writer: Any, config: dict[str, Any], name: str, kind: GgufType) -> None:
    import gguf

    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer.add_name(name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(getattr(gguf.LlamaFileType, types[kind]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tensors(writer: Any, directory: Path, config: dict[str, Any], kind: GgufType) -> None:
    import gguf
    from gguf.quants import quantize

    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[config["model_type"]]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, tensor in _stored(directory):
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise DataError(
                f"GGUF has no place for {name}", "the package gguf does not know it", "export without --gguf"
            )
        if config["model_type"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads"]
            if "k_proj" in name:
                heads = config.get("num_key_value_heads") or heads
            tensor = _interleaved(tensor, heads)
        values = tensor.float().numpy()
        stored = kind if values.ndim > 1 else "f32"
        if stored == "q8_0" and values.shape[-1] % 32:
            stored = "f16"
        if stored in ("f32", "f16"):
            writer.add_tensor(target, values.astype(np.float32 if stored == "f32" else np.float16))
            continue
        raw = gguf.GGMLQuantizationType[stored.upper()]
        writer.add_tensor(target, quantize(values, raw), raw_dtype=raw)


def _stored(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    config = read_json(directory / CONFIG)
    with open_tensors([directory / name for name in weight_names(directory)[0]]) as stored:
        for name in sorted(stored.shapes):
            if not (name == "lm_head.weight" and config.get("tie_word_embeddings")):
                yield name, stored.read(name)


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection [heads * d, in] in the order of llama.cpp's rotation: pairs side by side, not half by half."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


# ---- its tokenizer


def _add_tokenizer(writer: Any, directory: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    import gguf

    content = read_json(directory / "tokenizer.json")
    added = {token["id"]: token for token in content["added_tokens"]}
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for index in range(max(vocab_size, max(names) + 1)):
        kind = gguf.TokenType.NORMAL
        if index in added:
            kind = gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED
        elif index not in names:  # a row of the embedding that no token has
            kind = gguf.TokenType.UNUSED
        tokens.append(names.get(index, f"[PAD{index}]"))
        types.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(directory))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = content["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    for name, one in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        if one is not None:
            getattr(writer, f"add_{name}_token_id")(one)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    end = turn_end(tokenizer)
    if end is not None and end != tokenizer.eos_token_id:
        writer.add_eot_token_id(end)
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(bool(first) and first == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _split_name(directory: Path) -> str:
    """llama.cpp's name of how the tokenizer cuts text before its merges. Raises ConfigError for a way that has none."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    content = read_json(directory / "tokenizer.json")
    model = content.get("model") or {}
    cut = content.get("pre_tokenizer") or {}
    steps: list[dict[str, Any]] = cut["pretokenizers"] if cut.get("type") == "Sequence" else [cut]
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    usable = model.get("type") == "BPE" and kinds[-1] == "ByteLevel" and not last.get("add_prefix_space")
    if usable and kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        if pattern == SPLIT_PATTERN:
            # the same cut; only the first takes whole words past the merges
            return "llama-bpe" if model.get("ignore_merges") else "smaug-bpe"
        if pattern == PRETOKENIZE_REGEX:
            return "qwen2"
    if usable and kinds == ["ByteLevel"] and last.get("use_regex", True):
        return "gpt-2"
    if usable and kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    raise ConfigError(
        "--gguf does not know how this tokenizer cuts text",
        f"it is a {model.get('type')} behind {json.dumps(kinds)}, with a pattern of its own",
        "convert the exported directory with llama.cpp's convert_hf_to_gguf.py",
    )


# ---- whether it is right


@torch.no_grad()
def _verified(directory: Path, path: Path, kind: GgufType, tokenizer: PreTrainedTokenizerBase) -> str:
    from transformers import GgufConfig

    # alone, or transformers mixes the file's tokenizer with the one beside it
    with quiet_transformers(), tempfile.TemporaryDirectory() as alone:
        (Path(alone) / path.name).symlink_to(path.resolve())
        exported = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
        words = exported.get_input_embeddings().weight.shape[0]
        ids = torch.tensor([[(index * 2_654_435_761) % words for index in range(1, 49)]])
        expected = exported.eval()(ids).logits
        config = exported.config  # transformers does not read the width of qwen3's heads from a file
        del exported
        how = {"gguf_file": path.name, "local_files_only": True}
        read = AutoModelForCausalLM.from_pretrained(
            alone,
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            **how,
        )
        found = read.eval()(ids).logits
        again = AutoTokenizer.from_pretrained(alone, **how)
        told = AutoConfig.from_pretrained(alone, **how)
    apart = float((found - expected).norm() / expected.norm())
    if not apart <= TOLERANCE[kind]:
        raise _unequal(f"its logits are {apart:.2g} apart, {TOLERANCE[kind]:g} is allowed")
    for name in _SHAPE:
        there, here = _setting(told, name), _setting(config, name)
        if not math.isclose(there, here, rel_tol=1e-6):
            raise _unequal(f"its {name} is {there:g} instead of {here:g}")
    # transformers' reader does not cut digits as smollm does; llama.cpp does
    probe = _PROBE if _split_name(directory) == "smollm" else _PROBE + _DIGITS
    for text in (probe, "".join(map(str, tokenizer.all_special_tokens))):
        if (
            again(text, add_special_tokens=False)["input_ids"]
            != (tokenizer(text, add_special_tokens=False)["input_ids"])
        ):
            raise _unequal(f"its tokenizer reads {text!r:.60} otherwise")
    if (again.eos_token_id, again.chat_template) != (tokenizer.eos_token_id, tokenizer.chat_template):
        raise _unequal("its end token or chat template is another")
    return f"read back, its logits are {apart:.1e} apart (allowed {TOLERANCE[kind]:g}), its tokens the same"


def _setting(config: Any, name: str) -> float:
    return float(config.rope_parameters[name] if name == "rope_theta" else getattr(config, name))


def _unequal(why: str) -> DataError:
    return DataError("the GGUF file is not the exported model", why, "export without --gguf, and report this")
