"""A discriminator leaves a run as a reward model: whole, as an adapter or merged, transformers scores as training did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from tests.base_models import save, tiny_model, tiny_tokenizer
from tests.discriminator_worker import packed
from trainway.checkpoint.adapter import saved_pieces
from trainway.checkpoint.pieces import Part, Piece
from trainway.checkpoint.store import CheckpointStore
from trainway.checkpoint.weights import model_pieces, write_model
from trainway.config.schema import LoraConfig
from trainway.errors import ConfigError
from trainway.models.attention import use_packed_attention
from trainway.models.base import BaseWeights, build_base, find_base
from trainway.models.discriminator import (
    DiscriminatorLoss,
    DiscriminatorWeights,
    adapt_discriminator,
    build_discriminator,
    scoring_tokenizer,
)
from trainway.models.load import allocate
from trainway.models.lora import AdaptedWeights
from trainway.release.bundle import export, model_directory

TEXTS = ("AB?C", "ABBA@I", "HE;;</s>=A</s>", "A</s>", "FACE?DEAF</s>", "FACE?DEAF", "lim", "lim</s>")
"""Some end with the end token and some are cut; the tokens are those of one character each."""
SIDES = ("left", "right")
LORA = LoraConfig(enabled=True, r=4, alpha=8.0, target_modules=("all-linear",), modules_to_save=("lm_head",))


def make_run(
    root: Path,
    family: str,
    *,
    lora: LoraConfig | None = None,
    dtype: torch.dtype = torch.float32,
    ranks: int = 1,
) -> tuple[Path, Tensor]:
    """A run with a student and a discriminator in its checkpoint, and what the discriminator scores `TEXTS` with."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    save(tiny_model(family, dtype=dtype), root / "base")
    base = find_base(str(root / "base"), cache=root / "cache")
    tokenizer_to_save = scoring_tokenizer(tokenizer)
    model = build_discriminator(base, dtype=dtype, pad_id=tokenizer_to_save.pad_token_id)
    weights: Any = DiscriminatorWeights(BaseWeights(base), seed=3, std=0.5)
    if lora is not None:
        adapt_discriminator(model, lora, str(root / "base"))
        weights = AdaptedWeights(weights, seed=3)
    use_packed_attention(model)
    allocate(model, model, device="cpu")
    weights(model_pieces(model).items())
    stir(model)

    def write(temp: Path) -> None:
        for index in range(ranks):
            part, pieces = Part(index, ranks), saved_pieces(model, model_pieces(model))
            place = temp / "discriminator" / "model"
            write_model(model, place, tokenizer_to_save, weights=cut(pieces, part), part=part)
        student = build_base(base, dtype=torch.float32)
        allocate(student, student, device="cpu")
        BaseWeights(base)(model_pieces(student).items())
        write_model(student, temp / "model", tokenizer)

    CheckpointStore(root / "run" / "checkpoints", keep_last=1).save(3, write, best=True)
    (root / "run" / "config.yaml").write_text(json.dumps({"data": {"store_dir": str(root / "cache")}}))
    with torch.no_grad():
        scores = DiscriminatorLoss(model)(
            *packed([torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS])
        )
    return root / "run", scores


def stir(model: PreTrainedModel) -> None:
    """Give every trained tensor values as if it had been trained: no B is zero any more."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def cut(pieces: dict[str, Piece], part: Part) -> dict[str, Piece]:
    """Rows for each rank, as FSDP has them."""
    if part.count == 1:
        return pieces
    found = {}
    for name, piece in pieces.items():
        rows = -(-piece.shape[0] // part.count)
        start = min(part.index * rows, piece.shape[0])
        found[name] = Piece.rows(piece.tensor[start : start + rows], piece.shape, start)
    return found


def scored(model: Any, directory: Path, side: str) -> Tensor:
    """What plain transformers says, by the tokenizer in `directory`, of all texts in one padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side=side)
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        found: Tensor = model.eval()(**batch).logits[:, 0]
    return found


def whole(directory: Path) -> Any:
    model, told = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    return model


@pytest.mark.parametrize(("family", "ranks"), [("llama", 1), ("qwen2", 2), ("qwen3_moe", 2)])
def test_transformers_scores_as_training_did(tmp_path: Path, family: str, ranks: int) -> None:
    run, expected = make_run(tmp_path, family, ranks=ranks)
    out = export(run, tmp_path / "out", part="discriminator")
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    assert json.loads((out / "config.json").read_text())["architectures"][0].endswith(
        "ForSequenceClassification"
    )
    # the names of the family's files: of a mixture's experts each has its own
    assert any(".experts.0." in name for name in load_file(out / "model.safetensors")) == (
        family == "qwen3_moe"
    )
    for side in SIDES:
        torch.testing.assert_close(scored(whole(out), out, side), expected, rtol=0, atol=1e-5)
    assert len(expected.unique()) == len(TEXTS)
    assert model_directory(run / "checkpoints" / "step-3" / "discriminator").parent.name == "discriminator"


def test_padding_with_the_end_token_would_read_the_score_too_early(tmp_path: Path) -> None:
    """What the tokenizer of a reward model is for."""
    run, expected = make_run(tmp_path, "llama")
    out = export(run, tmp_path / "out", part="discriminator")
    model, tokenizer = whole(out), AutoTokenizer.from_pretrained(out)
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(out)
    model.config.pad_token_id = tokenizer.eos_token_id
    wrong = (scored(model, out, "right") - expected).abs() > 1e-3
    assert wrong.tolist() == [text.endswith("</s>") for text in TEXTS]


@pytest.mark.parametrize("ranks", [1, 2])
def test_peft_scores_as_training_did(tmp_path: Path, ranks: int) -> None:
    run, expected = make_run(tmp_path, "llama", lora=LORA, ranks=ranks)
    out = export(run, tmp_path / "out", part="discriminator")
    names = load_file(out / "adapter_model.safetensors").keys()
    assert "base_model.model.score.weight" in names and not any("lm_head" in name for name in names)
    loaders: tuple[Callable[[], Any], ...] = (
        lambda: peft.AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=1),
        lambda: peft.PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1), out
        ),
    )
    for load in loaders:
        model = load()
        assert isinstance(model, peft.PeftModelForSequenceClassification)
        model.config.pad_token_id = AutoTokenizer.from_pretrained(out).pad_token_id
        for side in SIDES:
            torch.testing.assert_close(scored(model, out, side), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_one_needs_no_peft(tmp_path: Path, dtype: torch.dtype) -> None:
    run, expected = make_run(tmp_path, "llama", lora=LORA, dtype=dtype)
    out = export(run, tmp_path / "out", part="discriminator", merge=True)
    assert not list(out.glob("adapter*"))
    stored = load_file(out / "model.safetensors")
    assert stored.pop("score.weight").dtype == torch.float32
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    tolerance = 1e-5 if dtype == torch.float32 else 0.2
    for side in SIDES:
        torch.testing.assert_close(scored(whole(out), out, side), expected, rtol=0, atol=tolerance)


def test_the_student_is_exported_as_ever(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, "llama")
    out = export(run, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_run_without_one_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=1)
    store.save(1, lambda temp: write_model(tiny_model("llama"), temp / "model", tiny_tokenizer()), best=True)
    with pytest.raises(ConfigError) as caught:
        export(tmp_path / "run", tmp_path / "out", part="discriminator")
    assert caught.value.what == f"{tmp_path / 'run' / 'checkpoints' / 'step-1'} holds no discriminator"
    assert not (tmp_path / "out").exists()
