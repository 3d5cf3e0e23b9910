"""What is trained can be saved, read back, and published: by the names of the model in memory, and by its family's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.base_models import FAMILIES, save, tiny_model
from tests.unit.models.test_base import IDS, assert_same
from trainway.checkpoint.pieces import Part, Piece
from trainway.checkpoint.weights import assemble, load_model, model_pieces, write_model
from trainway.models.base import build_base, find_base
from trainway.models.load import allocate
from trainway.models.published import publish_names


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    return found


def rows(piece: Piece, index: int) -> Piece:
    """One of two ranks' rows, as fsdp cuts them."""
    chunk = -(-piece.shape[0] // 2)
    start = min(index * chunk, piece.shape[0])
    return Piece.rows(piece.tensor[start : start + chunk], piece.shape, start)


def write(model: PreTrainedModel, directory: Path, ranks: int) -> Path:
    """As the ranks of a run do."""
    whole = model_pieces(model)
    if ranks == 1:
        write_model(model, directory, weights=whole)
        return directory
    for index in range(ranks):
        pieces = {name: rows(piece, index) for name, piece in whole.items()}
        write_model(model, directory, weights=pieces, part=Part(index, ranks))
    return directory


IN_PIECES = ("llama", "qwen3_moe", "gpt2", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize(
    ("family", "ranks"), [*((family, 1) for family in FAMILIES), *((family, 2) for family in IN_PIECES)]
)
def test_every_family_goes_round(family: str, ranks: int, tmp_path: Path) -> None:
    trained = tiny_model(family)
    saved = write(trained, tmp_path / "saved", ranks)
    # 1) a run reads it back 2) plain transformers loads what is exported 3) it is what the family publishes
    base = find_base(str(save(trained, tmp_path / "plain")), cache=tmp_path / "cache")
    again = build_base(base, dtype=torch.float32)
    allocate(again, again, device="cpu")
    for tensor in again.state_dict().values():
        tensor.fill_(float("nan"))
    load_model(again, saved)
    assert_same(again, trained)
    out = saved
    if ranks > 1:
        out = tmp_path / "out"
        write_model(trained, out, weights=model_pieces(trained))
        for path in out.glob("*.safetensors"):
            path.unlink()
        assemble(saved, out)
    in_memory = AutoModelForCausalLM.from_pretrained(out, experts_implementation="eager")
    with torch.no_grad():
        assert torch.equal(in_memory(IDS).logits, trained(IDS).logits)
    changed = publish_names(out, max_shard_size="40KB")
    assert changed == (family in ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_neox"))
    published, expected = tensors(out), tensors(tmp_path / "plain")
    assert published.keys() == expected.keys()
    assert all(torch.equal(published[name], expected[name]) for name in expected)
    assert not publish_names(out)
    with torch.no_grad():
        assert torch.equal(
            AutoModelForCausalLM.from_pretrained(out, experts_implementation="eager")(IDS).logits,
            trained(IDS).logits,
        )
