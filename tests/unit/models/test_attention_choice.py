"""Which attention a model gets, and whether its documents stay apart: tried on more than thirty small architectures."""

import copy
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

import trainway.models.attention as attention
from tests.unit.models.architectures import SPECS, VOCAB, config_of, tiny_model
from trainway.errors import ConfigError, EnvironmentFault
from trainway.losses import IGNORE_INDEX
from trainway.models import attention_choice
from trainway.models.attention_choice import use_attention
from trainway.models.causal_lm import CausalLMLoss
from trainway.models.tiny import packing_fault

BOUNDARIES = (0, 7, 18, 24, 33, 48)
OURS = (
    "llama llama-biased qwen2 qwen2-window qwen2_moe qwen3 qwen3_moe mistral mixtral gemma gemma2 gemma3_text phi phi3 "
    "gpt2 gpt_neox olmo2 olmo3 granite cohere cohere2 starcoder2 smollm3 deepseek_v3 gpt_oss"
).split()
SDPA = ["stablelm", "glm4"]
APART_NEVER = ["falcon", "falcon-alibi", "bloom", "opt", "mpt", "mamba", "jamba", "qwen3_next"]


def _batch():
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(2, VOCAB, (2, 2, 24), generator=generator)
    labels[0, 3:9] = IGNORE_INDEX
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(BOUNDARIES)]).view(2, 24)
    return ids, labels, positions


def _each_alone(model, ids, labels):
    """Summed loss over the documents, each alone in plain transformers; gradients are left in the model."""
    total = 0.0
    for start, stop in pairwise(BOUNDARIES):
        document, targets = ids.flatten()[None, start:stop], labels.flatten()[start:stop]
        logits = model(input_ids=document, use_cache=False).logits[0]
        loss = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX)
        loss.backward()
        total += loss.item()
    return total


def _assert_gradients_equal(ours, theirs):
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None or not a.grad.any(), name
            continue
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm() + 1e-5, name


def test_every_architecture_is_in_one_list_and_every_known_one_is_tested():
    assert sorted([*OURS, *SDPA, *APART_NEVER]) == sorted(SPECS)
    assert {SPECS[name][0] for name in OURS} == attention_choice._KNOWN


@pytest.mark.parametrize("name", OURS + SDPA)
def test_packed_equals_each_document_alone(name):
    plain = tiny_model(name)
    model = copy.deepcopy(plain)
    assert use_attention(model, "auto", packed=True, device="cpu") == ("packed" if name in OURS else "sdpa")
    module = CausalLMLoss(model, chunk_tokens=11)
    ids, labels, positions = _batch()
    loss = module(ids, labels, positions, BOUNDARIES)
    loss.backward()
    assert loss.item() == pytest.approx(_each_alone(plain, ids, labels), rel=1e-5)
    _assert_gradients_equal(model, plain)


@pytest.mark.parametrize("name", APART_NEVER)
def test_packing_is_refused_where_documents_would_mix(name):
    model = tiny_model(name)
    with pytest.raises(ConfigError) as error:
        use_attention(model, "auto", packed=True, device="cpu")
    kind = model.config.model_type
    assert error.value.what == f"{kind} cannot keep packed documents apart under model.attention=auto"
    assert error.value.why.startswith(
        "in a small copy of it, documents that share a row change each other's losses"
    )
    assert error.value.fix == "set data.packing=none: one conversation a row"


@pytest.mark.parametrize("name", [*APART_NEVER, *SDPA, "gpt_oss", "gemma2", "mistral", "deepseek_v3"])
def test_padded_rows_equal_each_row_alone(name):
    """boundaries None: rows padded on their right need no mask, in any architecture."""
    plain = tiny_model(name)
    model = copy.deepcopy(plain)
    use_attention(model, "auto", packed=False, device="cpu")
    ids, labels, _ = _batch()
    lengths = (24, 17)
    labels[1, 17:] = IGNORE_INDEX
    ids[1, 17:] = 0
    positions = torch.arange(24).expand(2, 24)
    targets = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    loss = CausalLMLoss(model, chunk_tokens=11)(ids, labels, positions, None, targets)
    loss.backward()
    expected = 0.0
    for row, length in enumerate(lengths):
        logits = plain(input_ids=ids[row : row + 1, :length], use_cache=False).logits[0]
        alone = F.cross_entropy(logits, labels[row, :length], reduction="sum", ignore_index=IGNORE_INDEX)
        alone.backward()
        expected += alone.item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    _assert_gradients_equal(model, plain)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "gemma3_text", "gpt_oss"])
def test_the_trial_needs_no_weights(name):
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config_of(name))
    state = torch.get_rng_state()
    assert use_attention(model, "auto", packed=True, device="cpu") == "packed"
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("feature", ["sliding_window", "softcap", "s_aux", "scaling", "boundaries"])
def test_the_trial_fails_when_a_feature_is_ignored(feature, monkeypatch):
    name = {"sliding_window": "mistral", "softcap": "gemma2", "s_aux": "gpt_oss", "scaling": "granite"}.get(
        feature, "llama"
    )
    right = attention.attend_segments

    def ignoring(query, key, value, segments, scale, window=None, softcap=None, sinks=None):
        scale = None if feature == "scaling" else scale
        window = None if feature == "sliding_window" else window
        softcap = None if feature == "softcap" else softcap
        sinks = None if feature == "s_aux" else sinks
        if feature == "boundaries":
            segments = attention.Segments((0, 24, 48))
        return right(query, key, value, segments, scale, window, softcap, sinks)

    model = tiny_model(name)
    assert packing_fault(model, attention.PACKED_ATTENTION) is None
    monkeypatch.setattr(attention, "attend_segments", ignoring)
    assert "change each other's" in packing_fault(model, attention.PACKED_ATTENTION)


def test_transformers_own_attention_is_tried_too():
    for name, implementation in (("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager")):
        model = tiny_model(name)
        assert use_attention(model, implementation, packed=True, device="cpu") == implementation
        assert model.config._attn_implementation == implementation
    with pytest.raises(
        ConfigError, match=r"gpt_oss cannot keep packed documents apart under model.attention=eager"
    ):
        use_attention(tiny_model("gpt_oss"), "eager", packed=True, device="cpu")
    assert use_attention(tiny_model("gpt_oss"), "eager", packed=False, device="cpu") == "eager"


@pytest.mark.parametrize(
    ("name", "wanted", "device", "what", "why"),
    [
        ("gpt_oss", "sdpa", "cpu", "sdpa does not work for gpt_oss", "transformers has no such attention"),
        ("gpt_oss", "flex_attention", "cuda", "flex_attention does not work for gpt_oss", "no proven gradients"),
        ("gpt_oss", "flash_attention_2", "cuda", "flash_attention_2 does not work for gpt_oss", "no proven gradients"),
        ("gemma2", "sdpa", "cpu", "sdpa does not work for gemma2", "it caps its attention scores"),
        ("llama", "flex_attention", "cpu", "flex_attention does not work on a CPU", "no backward pass on CPUs"),
        ("llama", "flash_attention_2", "cpu", "flash_attention_2 does not work on a CPU", "needs a GPU"),
        ("stablelm", "packed", "cpu", "packed does not work for stablelm", "does not hand the documents' boundaries"),
        ("mamba", "packed", "cpu", "packed does not work for mamba", "cannot be tried"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(name, wanted, device, what, why):
    with pytest.raises(ConfigError) as error:
        use_attention(tiny_model(name), wanted, packed=False, device=device)
    assert error.value.what == f"model.attention={what}" and why in error.value.why and error.value.fix


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr("trainway.models.attention_choice.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault) as error:
        use_attention(tiny_model("llama"), "flash_attention_2", packed=True, device="cuda")
    assert "pip install flash-attn" in error.value.fix


def test_attention_dropout():
    """auto leaves it to transformers; ours is refused, when it is chosen and again when it runs."""
    model = tiny_model("gpt2", attn_pdrop=0.1)
    assert use_attention(model, "auto", packed=True, device="cpu") == "sdpa"
    with pytest.raises(ConfigError, match=r"model.attention=packed does not work for llama"):
        use_attention(tiny_model("llama", attention_dropout=0.1), "packed", packed=True, device="cpu")
    model = tiny_model("llama", attention_dropout=0.1)
    attention.use_packed_attention(model)
    with pytest.raises(ConfigError, match=r"LlamaAttention has an attention dropout of 0\.1"):
        CausalLMLoss(model.train())(*_batch(), BOUNDARIES)


def test_unknown_arguments_are_refused():
    query = torch.randn(1, 2, 4, 8)
    segments = attention.Segments((0, 4))

    def call(module=None, **kwargs):
        module = module or torch.nn.Identity()
        return attention.packed_attention_forward(module, query, query, query, None, segments, **kwargs)

    call(position_ids=torch.arange(4), head_mask=None, output_attentions=False)
    for name in ("head_mask", "position_bias", "alibi"):
        with pytest.raises(ConfigError, match=f"what packed attention does not know: {name}"):
            call(**{name: torch.ones(1)})
    with pytest.raises(ConfigError, match="Identity is not causal"):
        call(is_causal=False)
    bidirectional = torch.nn.Identity()
    bidirectional.is_causal = False
    with pytest.raises(ConfigError, match="Identity is not causal"):
        call(bidirectional)


def test_flash_attention_is_told_the_boundaries(monkeypatch):
    model = tiny_model("llama")
    told = {}
    monkeypatch.setattr(
        model.model.layers[0].self_attn,
        "forward",
        lambda hidden_states, **kwargs: told.update(kwargs) or 1 / 0,
    )
    monkeypatch.setattr(
        attention.Segments, "cu_seqlens", property(lambda self: torch.tensor(self.boundaries))
    )
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ZeroDivisionError):
        CausalLMLoss(model)(*_batch(), BOUNDARIES)
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == list(BOUNDARIES)
    assert told["max_length_q"] == told["max_length_k"] == 15
    assert told["attention_mask"] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "qwen3_moe"])
def test_flex_attention_keeps_documents_apart_on_a_gpu(name):
    assert use_attention(tiny_model(name), "flex_attention", packed=True, device="cuda") == "flex_attention"
