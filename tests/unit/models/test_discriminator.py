"""The discriminator: its body is the base's, its head a seed's, and its scores are fp32 and read by length."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, ModernBertDecoderConfig, PreTrainedModel

from tests.base_models import FAMILIES, save, tiny_model, tiny_tokenizer
from tests.discriminator_worker import packed, padded, sequences
from trainway.checkpoint.pieces import Piece
from trainway.checkpoint.weights import model_pieces, write_model
from trainway.config.schema import LoraConfig
from trainway.errors import ConfigError
from trainway.models.base import BaseModel, BaseWeights, build_base, find_base
from trainway.models.blocks import blocks
from trainway.models.causal_lm import CausalLMLoss
from trainway.models.census import model_census
from trainway.models.discriminator import (
    DiscriminatorLoss,
    DiscriminatorWeights,
    adapt_discriminator,
    build_discriminator,
    scoring_tokenizer,
    use_discriminator_attention,
)
from trainway.models.load import allocate
from trainway.models.lora import AdaptedWeights

WITHOUT = ("granite", "cohere")
"""Families that transformers has no sequence classifier for."""
OFTEN = ("llama", "qwen2", "gpt2", "gpt_neox", "gemma3_text", "qwen3_moe", "gpt_oss")


def stored(family: str, root: Path) -> BaseModel:
    if not (root / family).exists():
        save(tiny_model(family), root / family)
    return find_base(str(root / family), cache=root / "cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return stored("llama", tmp_path_factory.mktemp("base"))


def filled(
    base: BaseModel, dtype: torch.dtype = torch.float32, lora: LoraConfig | None = None
) -> PreTrainedModel:
    """A discriminator with its first weights, on the CPU."""
    model = build_discriminator(base, dtype=dtype)
    weights: BaseWeights | DiscriminatorWeights | AdaptedWeights
    weights = DiscriminatorWeights(BaseWeights(base), seed=3, std=0.5)
    if lora is not None:
        adapt_discriminator(model, lora, base.source)
        weights = AdaptedWeights(weights, seed=3)
    use_discriminator_attention(model, base, "auto", packed=True, device="cpu")
    allocate(model, model, device="cpu")
    weights(model_pieces(model).items())
    return model


def alone(model: PreTrainedModel) -> torch.Tensor:
    """What transformers' own class scores each sequence with, one by one."""
    with torch.no_grad():
        return torch.cat([model(sequence[None]).logits[0] for sequence in sequences(0)])


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in OFTEN else [pytest.mark.slow])
        for family in FAMILIES
        if family not in WITHOUT
    ],
)
def test_it_is_the_base_with_a_scalar_head(family: str, tmp_path: Path) -> None:
    base = stored(family, tmp_path)
    causal, model = build_base(base, dtype=torch.float32), filled(base)
    ours, theirs = (dict(m.named_parameters()) for m in (model, causal))
    on_meta = build_discriminator(base, dtype=torch.float32, pad_id=7)
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    assert on_meta.config.pad_token_id == 7
    # so that the row of a padding token learns as it does in the student
    assert on_meta.get_input_embeddings().padding_idx == causal.get_input_embeddings().padding_idx != 7
    body = {name for name in theirs if name.startswith(f"{causal.base_model_prefix}.")}
    assert ours.keys() == body | {"score.weight"}
    assert ours["score.weight"].shape == (1, model.config.hidden_size)
    reference = dict(tiny_model(family).state_dict())
    assert all(torch.equal(ours[name], reference[name]) for name in body)
    assert all(
        torch.equal(buffer, reference[name]) for name, buffer in model.named_buffers() if name in reference
    )
    assert len(blocks(model)) == 3
    assert model_census(model).total == sum(parameter.numel() for parameter in model.parameters())

    write_model(model, tmp_path / "written")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "written").eval()
    expected = alone(plain)
    with torch.no_grad():
        scores = [DiscriminatorLoss(model)(*make(sequences(0))) for make in (packed, padded)]
    assert scores[0].std() > 0.1
    for found in scores:
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", WITHOUT)
def test_a_family_without_a_classifier_is_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build_discriminator(stored(family, tmp_path), dtype=torch.float32)
    assert caught.value.what == f"{tmp_path / family}: a {family} cannot be a discriminator"
    assert caught.value.why == "transformers has no sequence classifier for it"
    assert "gad.discriminator" in caught.value.fix


def test_a_classifier_of_more_than_a_linear_head_is_refused(tmp_path: Path) -> None:
    config = ModernBertDecoderConfig(num_hidden_layers=1, layer_types=["full_attention"])
    base = BaseModel(tmp_path, config, "org/base", None, "", (), {}, (), torch.float32)
    with pytest.raises(ConfigError) as caught:
        build_discriminator(base, dtype=torch.float32)
    assert caught.value.why.startswith("that of transformers has head.dense.weight, ")


def test_the_head_is_a_function_of_the_seed_and_its_shape(base: BaseModel) -> None:
    model = build_discriminator(base, dtype=torch.float32)
    weights = DiscriminatorWeights.of(BaseWeights(base), model, seed=7)
    assert weights.std == base.config.initializer_range == 0.02
    whole = torch.empty(1, 32)
    weights([("score.weight", Piece.whole(whole))])
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(whole, 0.02 * torch.randn(1, 32, generator=generator))
    # as FSDP cuts it, rank 1 holding no row, and as DeepSpeed does
    row, none, interval = torch.empty(1, 32), torch.empty(0, 32), torch.empty(11)
    weights([("score.weight", Piece.rows(row, (1, 32), 0))])
    weights([("score.weight", Piece.rows(none, (1, 32), 1))])
    weights([("score.weight", Piece(interval, (1, 32), 5))])
    assert torch.equal(row, whole)
    assert torch.equal(interval, whole[0, 5:16])
    weights = DiscriminatorWeights.of(BaseWeights(base), model, seed=8)
    weights([("score.weight", Piece.whole(row))])
    assert not torch.equal(row, whole)


def test_eight_rewards_stay_eight_under_autocast(base: BaseModel) -> None:
    """Near 12 the numbers of bf16 are 0.0625 apart: rewards that differ by 0.05 would fall together."""
    model = filled(base)
    module, batch = DiscriminatorLoss(model), packed(sequences(0)[:8])
    wanted = 12 + 0.05 * torch.arange(8.0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = CausalLMLoss.hidden(module, *batch[:3])[0, batch[3]].float()  # type: ignore[arg-type]
        model.score.weight.copy_(torch.linalg.lstsq(hidden.double(), wanted.double()[:, None]).solution.T)
        scores = module(*batch)
        collapsed = model.score(hidden)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-3)
    assert len(collapsed.unique()) < 8


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_scores_are_read_by_length_wherever_a_sequence_stands(base: BaseModel, rows: str) -> None:
    """The filling is the end token, and other texts hold it too."""
    module = DiscriminatorLoss(filled(base))
    make = {"packed": packed, "padded": padded}[rows]
    everyone = sequences(1)
    with torch.no_grad():
        first = module(*make(everyone))
        again = module(*make([everyone[0], *reversed(everyone)]))
        short = torch.cat([module(*make([sequence])) for sequence in everyone])
    torch.testing.assert_close(first, alone_of(module, everyone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first, short, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again[1:].flip(0), first, rtol=1e-5, atol=1e-5)
    assert again[0] == pytest.approx(first[0].item(), rel=1e-5)


def alone_of(module: DiscriminatorLoss, everyone: list[torch.Tensor]) -> torch.Tensor:
    weight = module.model.score.weight[0]
    body = module.model.get_submodule("model")
    with torch.no_grad():
        return torch.stack([body(sequence[None]).last_hidden_state[0, -1] @ weight for sequence in everyone])


@pytest.mark.parametrize("make", [packed, padded])
def test_identical_texts_have_one_score_and_a_loss_of_ln_2(base: BaseModel, make: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    text, other = (
        torch.tensor(tokenizer(t)["input_ids"]) for t in ("what?it is so.</s>", "why?because.</s>")
    )
    assert text[-1] == other[-1] == tokenizer.pad_token_id
    module = DiscriminatorLoss(filled(base))
    with torch.no_grad():
        teacher, student = (module(*make([text, other, text])) for _ in range(2))
        moved = module(*make([other, text, text, other, text]))
    assert torch.equal(teacher, student)
    assert F.softplus(student - teacher).mean() == torch.tensor(math.log(2))
    assert (teacher[0] - teacher[1]).abs() > 0.1
    # elsewhere in a row matrix products may round otherwise
    apart = moved[[1, 0, 2]] - teacher
    assert apart.abs().max() < 3e-6
    assert F.softplus(apart).mean().item() == pytest.approx(math.log(2), abs=1e-6)


def test_coefficients_give_the_gradient_of_any_loss_of_scores(base: BaseModel) -> None:
    module = DiscriminatorLoss(filled(base))
    everyone = sequences(2)
    scores = module(*packed(everyone))
    F.softplus(scores[1::2] - scores[::2]).mean().backward()
    whole = [parameter.grad.clone() for parameter in module.parameters()]  # type: ignore[union-attr]
    module.zero_grad()
    share = (scores[1::2] - scores[::2]).sigmoid().detach() / 5
    coefficients = torch.stack([-share, share], 1).flatten()
    sums = [
        module(*make(everyone[part]), coefficients[part])
        for make, part in ((packed, slice(0, 3)), (padded, slice(3, 8)), (packed, slice(8, 10)))
    ]
    assert all(part.shape == () for part in sums)
    torch.testing.assert_close(sum(sums), (coefficients * scores).sum().detach(), rtol=1e-5, atol=1e-5)
    for part in sums:
        part.backward()
    for grad, parameter in zip(whole, module.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "batch", [packed([]), padded([]), (*packed(sequences(0))[:3], torch.tensor([]).long())]
)
def test_without_a_sequence_every_parameter_has_a_gradient_of_zero(base: BaseModel, batch: Any) -> None:
    module = DiscriminatorLoss(filled(base))
    loss = module(*batch, torch.zeros(0))
    loss.backward()
    assert loss.shape == () and loss.item() == 0
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    assert module(*batch).shape == (0,)


def test_adapters_go_into_the_body_and_the_head_is_trained_whole(base: BaseModel) -> None:
    lora = LoraConfig(
        enabled=True, r=4, target_modules=("q_proj", "down_proj"), modules_to_save=("lm_head", "model.norm")
    )
    model = filled(base, torch.bfloat16, lora)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    kinds = {re.sub(r"^model\.layers\.\d\.", "", name) for name in trained}
    assert kinds == {
        "self_attn.q_proj.lora_A.default.weight", "self_attn.q_proj.lora_B.default.weight",
        "mlp.down_proj.lora_A.default.weight", "mlp.down_proj.lora_B.default.weight",
        "score.modules_to_save.default.weight", "model.norm.modules_to_save.default.weight",
    }  # fmt: skip
    assert len(trained) == 3 * 4 + 2
    config = model.peft_config["default"]
    assert config.task_type == "SEQ_CLS" and config.modules_to_save == ["model.norm", "score"]
    # it begins as the plain one: B is zero, and the head the seed's
    plain = filled(base, torch.bfloat16)
    assert plain.score.weight.dtype == torch.float32
    assert torch.equal(model.score.weight, plain.score.weight)
    with torch.no_grad():
        scores = [DiscriminatorLoss(m)(*packed(sequences(0))) for m in (model, plain)]
    torch.testing.assert_close(*scores, rtol=0, atol=0.05)
    # and every adapter learns
    DiscriminatorLoss(model)(*packed(sequences(0)), torch.ones(10)).backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) != (".lora_A." in name), name


def test_it_gets_the_attention_of_its_causal_model(base: BaseModel, tmp_path: Path) -> None:
    model = build_discriminator(base, dtype=torch.float32)
    assert use_discriminator_attention(model, base, "auto", packed=True, device="cpu") == "packed"
    assert model.config._attn_implementation == "trainway_packed"
    model = build_discriminator(base, dtype=torch.float32)
    assert use_discriminator_attention(model, base, "eager", packed=False, device="cpu") == "eager"
    assert model.get_submodule("model").config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("pad", "ends", "expected"),
    [
        ("<pad>", (), "<pad>"),  # fit as it is
        ("</s>", (), "<pad>"),  # by its usual name
        ("</s>", (0,), "<s>"),  # answers end with <pad>, never with what begins a text
        ("</s>", (0, 1), None),
    ],
)
def test_no_text_ends_with_the_padding_of_a_scoring_tokenizer(
    pad: str, ends: tuple[int, ...], expected: str | None, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = pad
    scoring_tokenizer(tokenizer, ends).save_pretrained(tmp_path)
    found = type(tokenizer).from_pretrained(tmp_path)
    assert found.pad_token == expected
    assert tokenizer.pad_token == pad
    assert found("hello</s>")["input_ids"] == tokenizer("hello</s>")["input_ids"]


def test_a_reserved_token_pads_where_there_is_no_other() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|reserved_special_token_0|>"]}
    )
    tokenizer.pad_token = tokenizer.eos_token
    assert scoring_tokenizer(tokenizer, [0]).pad_token == "<|reserved_special_token_0|>"
