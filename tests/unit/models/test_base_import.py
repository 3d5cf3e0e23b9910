"""Weights that are quantised, or laid out otherwise than in memory: imported once, exactly, and found again."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Transpose, WeightConverter

from tests.base_models import save, tiny_model
from tests.unit.models.test_base import assert_same, built
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.models import base_import
from trainway.models.base import find_base
from trainway.models.base_files import read_directory

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks [..., N / 32, 16] and scales [..., N / 32] uint8 of a weight [..., N], and what they stand for.

    OCP Microscaling Formats 1.0: 32 numbers of 4 bits (E2M1), two to a byte and the first in the low half, share a
    power of two.
    """
    groups = weight.unflatten(-1, (-1, 32))
    exponent = (
        torch.floor(torch.log2(groups.abs().amax(-1, keepdim=True))) - 2
    )  # so that the largest is 4 to 8
    codes = (groups / 2**exponent).unsqueeze(-1).sub(FP4).abs().argmin(-1)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return (
        blocks.to(torch.uint8),
        (exponent.squeeze(-1) + 127).to(torch.uint8),
        (FP4[codes] * 2**exponent).flatten(-2),
    )


@pytest.fixture
def mxfp4(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A gpt-oss whose experts are stored as its publisher does, and every weight as it should be in memory."""
    model = tiny_model("gpt_oss", dtype=torch.bfloat16, hidden_size=64, intermediate_size=32)
    directory = save(model, tmp_path / "oss")
    stored = load_file(directory / "model.safetensors")
    expected = dict(stored)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        # in files the inputs come last
        blocks, scales, values = to_mxfp4(stored.pop(name).float().transpose(1, 2))
        stored |= {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales.contiguous()}
        assert (values - expected[name].float().transpose(1, 2)).abs().max() < 0.2
        expected[name] = values.transpose(1, 2).bfloat16()
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    change_config(
        directory, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    )
    return directory, expected


def change_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))


def test_mxfp4_is_dequantised_exactly(mxfp4: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    directory, expected = mxfp4
    base = find_base(str(directory), cache=tmp_path / "cache")
    assert base.notes[0].startswith("MXFP4 weights dequantised, bf16: 0.0 -> 0.0 GB, in ")
    assert base.directory.parent == tmp_path / "cache" / "models" and base.dtype == torch.bfloat16
    assert not hasattr(base.config, "quantization_config")
    state = built(base, torch.bfloat16).state_dict()
    assert state.keys() == expected.keys()
    for name in expected:
        assert torch.equal(state[name], expected[name]), name
    # plain transformers loads the import as it is, and fp32 holds the same numbers
    plain = AutoModelForCausalLM.from_pretrained(
        base.directory, dtype=torch.float32, experts_implementation="eager"
    )
    assert_same(built(base), plain)


def test_block_scaled_fp8_is_dequantised(tmp_path: Path) -> None:
    directory = save(
        tiny_model("llama", tie_word_embeddings=False, hidden_size=128, intermediate_size=128),
        tmp_path / "fp8",
    )
    stored = load_file(directory / "model.safetensors")
    expected = dict(stored)
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        rows, columns = stored[name].shape
        scale = torch.full((-(-rows // 64), columns // 64), 0.25)
        stored[name] = (stored[name] / 0.25).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        expected[name] = stored[name].float() * 0.25
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [64, 64], "activation_scheme": "dynamic"}
    change_config(directory, quantization_config=settings)
    base = find_base(str(directory), cache=tmp_path / "cache")
    assert base.notes[0].startswith("FP8 weights dequantised, fp32")
    state = built(base).state_dict()
    for name in expected:
        assert torch.equal(state[name], expected[name]), name


def test_an_import_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save(tiny_model("qwen3_moe"), tmp_path / "model")
    shutil.copytree(directory, tmp_path / "copy")
    first = find_base(str(directory), cache=tmp_path / "cache")
    monkeypatch.setattr(base_import, "_write_import", lambda *arguments: pytest.fail("it is made again"))
    again = find_base(str(directory), cache=tmp_path / "cache")
    assert (again.directory, again.identity, again.notes) == (first.directory, first.identity, first.notes)
    # the same content elsewhere is the same model
    assert find_base(str(tmp_path / "copy"), cache=tmp_path / "cache").directory == first.directory


def test_other_weights_are_another_import(tmp_path: Path) -> None:
    directory = save(tiny_model("qwen3_moe"), tmp_path / "model")
    first = find_base(str(directory), cache=tmp_path / "cache")
    stored = load_file(directory / "model.safetensors")
    save_file(
        {name: tensor * 2 for name, tensor in stored.items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    second = find_base(str(directory), cache=tmp_path / "cache")
    assert first.identity != second.identity and first.directory != second.directory
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(built(second).state_dict()[name], 2 * built(first).state_dict()[name])


def _find(directory: str, cache: Path, queue: Any) -> None:
    base = find_base(directory, cache=cache)
    queue.put(str(base.directory))


def test_processes_that_start_together_make_one_import(tmp_path: Path) -> None:
    directory = save(tiny_model("mixtral"), tmp_path / "model")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    started = [
        context.Process(target=_find, args=(str(directory), tmp_path / "cache", queue)) for _ in range(3)
    ]
    for process in started:
        process.start()
    found = {queue.get(timeout=120) for _ in started}
    for process in started:
        process.join(timeout=60)
    assert len(found) == 1
    imports = [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]
    assert [str(path) for path in imports] == sorted(found)


def test_a_failed_import_leaves_nothing(tmp_path: Path) -> None:
    directory = save(tiny_model("qwen3_moe"), tmp_path / "model")
    stored = load_file(directory / "model.safetensors")
    gone = "model.layers.1.mlp.experts.2.up_proj.weight"
    del stored[gone]
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="do not fit its config") as error:
        find_base(str(directory), cache=tmp_path / "cache")
    assert error.value.why == f"{gone} is missing"
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_quantisation_that_cannot_be_undone(method: str, tmp_path: Path) -> None:
    directory = save(tiny_model("llama"), tmp_path / "model")
    change_config(directory, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ConfigError) as error:
        find_base(str(directory), cache=tmp_path / "cache")
    assert error.value.what == f"the weights of {directory} are quantised ({method})"
    assert error.value.fix == "name the model that it was quantised from"


def test_too_little_disk_or_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save(tiny_model("mixtral"), tmp_path / "model")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(base_import.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(EnvironmentFault, match="no room to import"):
            find_base(str(directory), cache=tmp_path / "cache")
    memory = base_import.psutil.virtual_memory()
    monkeypatch.setattr(base_import.psutil, "virtual_memory", lambda: memory._replace(available=1000))
    with pytest.raises(EnvironmentFault, match="too little memory to import"):
        find_base(str(directory), cache=tmp_path / "cache")


def test_what_a_killed_import_left_is_removed(tmp_path: Path) -> None:
    directory = save(tiny_model("mixtral"), tmp_path / "model")
    first = find_base(str(directory), cache=tmp_path / "cache")
    left = first.directory.with_name(f"{first.directory.name}.tmp-12345678")
    os.rename(first.directory, left)
    assert find_base(str(directory), cache=tmp_path / "cache").directory == first.directory
    assert not left.exists()


def test_names_of_older_files_need_no_import(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    directory = save(model, tmp_path / "model")
    stored = load_file(directory / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    renamed["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # a mask that old files hold
    assert "wte.weight" in renamed
    save_file(renamed, directory / "model.safetensors", {"format": "pt"})
    base = find_base(str(directory), cache=tmp_path / "cache")
    assert base.directory == directory and base.notes == ()
    assert_same(built(base), AutoModelForCausalLM.from_pretrained(directory))


def test_a_conversion_within_name_and_shape_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save(tiny_model("llama"), tmp_path / "model")
    assert find_base(str(directory), cache=tmp_path / "cache").directory == directory
    turned = WeightConverter(
        source_patterns=r"self_attn.q_proj.weight",
        target_patterns=r"self_attn.q_proj.weight",
        operations=[Transpose()],
    )
    monkeypatch.setattr(base_import, "_conversions", lambda model: [turned])
    files = read_directory(directory, "model", needs_tokenizer=False)
    layout = base_import.compare(tiny_model("llama"), files.tensors)
    assert layout.converted == tuple(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3))
    assert not layout.is_plain
