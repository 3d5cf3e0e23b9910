"""A model to start from: found, built on the meta device, and filled, it is what from_pretrained loads; bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.base_models import FAMILIES, save, tiny_model
from trainway.checkpoint.pieces import Piece
from trainway.checkpoint.weights import model_pieces
from trainway.errors import ConfigError, DataError
from trainway.models.base import BaseModel, BaseWeights, build_base, experts_on, find_base
from trainway.models.blocks import blocks
from trainway.models.load import allocate

IDS = torch.arange(3, 63).view(2, 30)


def built(base: BaseModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = build_base(base, dtype=dtype)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    allocate(model, model, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    BaseWeights(base)(model_pieces(model).items())
    return model


def assert_same(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    for name in expected:
        assert state[name].dtype == expected[name].dtype, name
        assert torch.equal(state[name], expected[name]), name
    buffers, expected = dict(ours.named_buffers()), dict(theirs.named_buffers())
    assert buffers.keys() == expected.keys()
    for name in expected:
        assert buffers[name].dtype == expected[name].dtype, name
        assert torch.equal(buffers[name], expected[name]), name
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_family_is_what_from_pretrained_loads(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = save(tiny_model(family), tmp_path / "model")
    base = find_base(str(directory), cache=tmp_path / "cache")
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager")
    assert_same(built(base, dtype), theirs)
    assert (base.directory == directory) == (not base.notes)
    assert base.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_in_every_family(family: str) -> None:
    model = tiny_model(family)
    found = blocks(model)
    assert isinstance(found, nn.ModuleList) and len(found) == 3
    name = next(name for name, module in model.named_modules() if module is found)
    assert name in ("model.layers", "transformer.h", "gpt_neox.layers")


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_each_rank_reads_its_own_elements(ranks: int, tmp_path: Path) -> None:
    model = tiny_model("llama")
    base = find_base(str(save(model, tmp_path / "model")), cache=tmp_path / "cache")
    whole = dict(model.named_parameters())
    for name, parameter in whole.items():
        found, flat = [], []
        for rank in range(ranks):
            chunk = -(-len(parameter) // ranks)
            start = min(rank * chunk, len(parameter))
            part = torch.full_like(parameter[start : start + chunk], torch.nan, dtype=torch.float64)
            found.append(Piece.rows(part, tuple(parameter.shape), start))
            size = -(-parameter.numel() // ranks)  # as zero3 cuts: anywhere
            begin = min(rank * size, parameter.numel())
            values = torch.full((min(size, parameter.numel() - begin),), torch.nan, dtype=torch.bfloat16)
            flat.append(Piece(values, tuple(parameter.shape), begin))
        BaseWeights(base)((name, piece) for piece in (*found, *flat))
        assert torch.equal(torch.cat([piece.tensor for piece in found]), parameter.detach().double())
        together = torch.cat([piece.tensor for piece in flat])
        assert torch.equal(together, parameter.detach().flatten().bfloat16())


def test_one_of_tied_weights_is_enough_and_two_must_agree(tmp_path: Path) -> None:
    model = tiny_model("llama")  # tied
    directory = save(model, tmp_path / "model")
    file = directory / "model.safetensors"
    stored = load_file(file)
    embedding = stored.pop("model.embed_tokens.weight")
    save_file(stored | {"lm_head.weight": embedding}, file)
    base = find_base(str(directory), cache=tmp_path / "cache")
    assert base.names["model.embed_tokens.weight"] == "lm_head.weight"
    ours = built(base)
    assert_same(ours, model)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    both = stored | {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding.clone()}
    save_file(both, file)
    assert_same(built(find_base(str(directory), cache=tmp_path / "cache")), model)
    both["lm_head.weight"] = embedding + torch.eye(80, 32) * 1e-3
    save_file(both, file)
    with pytest.raises(ConfigError, match="differ, and config") as error:
        find_base(str(directory), cache=tmp_path / "cache")
    assert "tie_word_embeddings" in error.value.fix
    save_file(stored, file)
    with pytest.raises(DataError, match="do not fit its config") as error:
        find_base(str(directory), cache=tmp_path / "cache")
    assert error.value.why == "model.embed_tokens.weight is missing"


def test_the_identity_follows_content_alone(tmp_path: Path) -> None:
    directory = save(tiny_model("llama"), tmp_path / "model")
    first = find_base(str(directory), cache=tmp_path / "cache").identity
    shutil.copytree(directory, tmp_path / "copy")
    assert find_base(str(tmp_path / "copy"), cache=tmp_path / "other").identity == first
    (directory / "README.md").write_text("read me")
    assert find_base(str(directory), cache=tmp_path / "cache").identity == first
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert find_base(str(directory), cache=tmp_path / "cache").identity != first


def test_generation_settings_are_kept(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [2, 7]
    base = find_base(str(save(model, tmp_path / "model")), cache=tmp_path / "cache")
    assert build_base(base, dtype=torch.float32).generation_config.eos_token_id == [2, 7]


def test_tensors_of_no_use_are_named(tmp_path: Path) -> None:
    directory = save(tiny_model("llama"), tmp_path / "model")
    stored = load_file(directory / "model.safetensors")
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of old files
    save_file(stored, directory / "model.safetensors")
    assert find_base(str(directory), cache=tmp_path / "cache").notes == ()
    stored["score.weight"] = torch.ones(1, 32)
    save_file(stored, directory / "model.safetensors")
    notes = find_base(str(directory), cache=tmp_path / "cache").notes
    assert notes == ("1 tensor in the files of no use to LlamaForCausalLM: score.weight",)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_in_grouped_products_give_the_same_gradients(family: str) -> None:
    models = [tiny_model(family), tiny_model(family)]
    models[1].set_experts_implementation("grouped_mm")
    for model in models:
        torch.nn.functional.cross_entropy(model(IDS).logits.flatten(0, 1), IDS.flatten()).backward()
    grads = [{name: p.grad for name, p in model.named_parameters()} for model in models]
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_on_a_gpu_give_the_gradients_of_the_cpu(family: str) -> None:
    reference = tiny_model(family)
    on_gpu = tiny_model(family)
    on_gpu.set_experts_implementation(experts_on(torch.device("cuda")))
    on_gpu.cuda()
    assert on_gpu.config._experts_implementation == "grouped_mm"
    for model, ids in ((reference, IDS), (on_gpu, IDS.cuda())):
        torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten()).backward()
    for (name, one), other in zip(reference.named_parameters(), on_gpu.parameters(), strict=True):
        torch.testing.assert_close(other.grad.cpu(), one.grad, rtol=2e-3, atol=1e-5, msg=name)
