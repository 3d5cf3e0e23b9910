"""Built models: deterministic weights, the published shapes, plain transformers files, readable errors."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from trainway.config.schema import ModelConfig
from trainway.errors import ConfigError
from trainway.models.load import build_model

TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48, "max_seq_len": 64}


def test_weights_follow_from_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b, c = (build_model(ModelConfig(**TINY), 64, seed=s).state_dict() for s in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_initial_scales():
    config = ModelConfig(hidden_size=256, num_layers=8, tie_embeddings=False, architecture="qwen3")
    weights = build_model(config, 512, seed=0).state_dict()
    for name, weight in weights.items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            expected = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert weight.std().item() == pytest.approx(expected, rel=0.03)
            assert weight.dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_ties(tied):
    model = build_model(ModelConfig(**TINY, tie_embeddings=tied), 64, seed=0)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_saved_model_is_plain_transformers(architecture, tmp_path):
    model = build_model(
        ModelConfig(**TINY, architecture=architecture), 64, seed=0, bos_id=1, eos_id=2, pad_id=3
    )
    model.save_pretrained(tmp_path)
    assert "trainway" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id, loaded.config.pad_token_id) == (1, 2, 3)


def test_rotary_table_is_restored_after_meta():
    model = build_model(ModelConfig(**TINY), 64, seed=0)
    plain = LlamaForCausalLM(model.config)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    "wrong", [{"hidden_size": 30}, {"num_kv_heads": 3}, {"head_dim": 7}, {"hidden_size": 36, "num_heads": 4}]
)
def test_impossible_shapes_are_config_errors(wrong):
    with pytest.raises(ConfigError) as error:
        build_model(ModelConfig(**(TINY | wrong)), 64, seed=0, device="meta")
    assert error.value.why and error.value.fix
