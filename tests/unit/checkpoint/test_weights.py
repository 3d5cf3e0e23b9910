"""Weights and optimiser state come back bit for bit, and misfits are named."""

import errno
import json
import resource

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from trainway.checkpoint import optimizer_state
from trainway.checkpoint.pieces import (
    METADATA,
    Part,
    Piece,
    open_tensors,
    part_files,
    read_tensors,
    write_pieces,
    write_tensors,
)
from trainway.checkpoint.weights import (
    assemble,
    is_in_pieces,
    load_model,
    model_pieces,
    read_model_state,
    write_model,
)
from trainway.errors import DataError


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "tie_word_embeddings": True, **changes}
    return LlamaForCausalLM(LlamaConfig(**sizes))


def same(left, right):
    return all(torch.equal(left.state_dict()[name], right.state_dict()[name]) for name in left.state_dict())


def write_optimizer(optimizers, model, directory):
    directory.mkdir(exist_ok=True)
    optimizer_state.write_optimizer(
        optimizer_state.optimizer_slots(optimizers, model_pieces(model)), directory
    )


def read_optimizer(optimizers, model, directory):
    optimizer_state.read_optimizer(optimizers, model_pieces(model), directory)


# ---- model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_size", ["5GB", "8KB"])
def test_model_round_trip(tmp_path, tied, max_shard_size, capfd):
    model = tiny(tie_word_embeddings=tied)
    write_model(model, tmp_path / "model", max_shard_size=max_shard_size)
    assert capfd.readouterr().err == ""
    assert (tmp_path / "model" / "model.safetensors.index.json").exists() == (max_shard_size == "8KB")
    assert ("lm_head.weight" in read_model_state(tmp_path / "model")) is not tied

    other = tiny(seed=1, tie_word_embeddings=tied)
    load_model(other, tmp_path / "model")
    assert same(model, other)
    assert same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True))


def test_dtype_and_no_local_paths(tmp_path):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    )
    tokenizer.save_pretrained(tmp_path / "origin")
    tiny().save_pretrained(tmp_path / "origin")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "origin", dtype=torch.bfloat16)
    write_model(model, tmp_path / "model", AutoTokenizer.from_pretrained(tmp_path / "origin"))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("b")["input_ids"] == [1]
    for file in (tmp_path / "model").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_misfits_are_named(tmp_path):
    write_model(tiny(), tmp_path)
    with pytest.raises(DataError, match="do not fit") as caught:
        load_model(tiny(num_hidden_layers=3), tmp_path)
    assert "model.layers.2." in caught.value.why and "is missing" in caught.value.why
    with pytest.raises(DataError) as caught:
        load_model(tiny(num_hidden_layers=1), tmp_path)
    assert "model.layers.1." in caught.value.why and "is unexpected" in caught.value.why
    with pytest.raises(DataError) as caught:
        load_model(tiny(vocab_size=65), tmp_path)
    assert "model.embed_tokens.weight has shape [64, 16], the model [65, 16]" in caught.value.why


def test_a_damaged_index_is_refused(tmp_path):
    write_model(tiny(), tmp_path, max_shard_size="8KB")
    index = tmp_path / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    index.write_text(json.dumps({**fields, "weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(DataError, match="malformed"):
        read_model_state(tmp_path)
    fields["weight_map"]["model.ghost"] = "model-00001-of-00004.safetensors"
    index.write_text(json.dumps(fields))
    with pytest.raises(DataError, match="does not match its index"):
        read_model_state(tmp_path)
    index.write_text("{")
    with pytest.raises(DataError):
        read_model_state(tmp_path)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(DataError, match="missing"):
        read_model_state(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"garbage")
    with pytest.raises(DataError, match="cannot be read"):
        read_tensors(tmp_path / "x.safetensors")


def test_tensors_that_share_memory_and_odd_layouts(tmp_path):
    base = torch.randn(4, 6)
    tensors = {
        "a": base,
        "b": base,
        "c": base.t(),
        "d": base[1:3],
        "e": torch.tensor(3.0),
        "f": torch.empty(0),
    }
    write_tensors(tmp_path / "sub" / "t.safetensors", tensors)
    back = read_tensors(tmp_path / "sub" / "t.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_disk_that_fails_raises_oserror(tmp_path):
    # the disk takes no file above 4 KiB: Python ignores the signal, and the write fails with EFBIG
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError) as tensors:
            write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(10_000)})
        with pytest.raises(OSError) as model:
            write_model(tiny(), tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tensors.value.errno == model.value.errno == errno.EFBIG


# ---- optimiser


class Averager(torch.optim.Optimizer):
    """Keeps state of several kinds: a transposed tensor, a 64-bit one, int, float, bool, str, None."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"sum": torch.zeros_like(p.t()).t(), "count": torch.zeros((), dtype=torch.int64)}
                    state |= {"calls": 0, "decay": 1.0, "warm": True, "mode": "mean", "extra": None}
                state["sum"].add_(p.grad)
                state["count"] += 1
                state["calls"] += 1
                state["decay"] *= 0.9
                p.sub_(state["sum"] / state["count"], alpha=group["lr"] * state["decay"] / state["calls"])


def adamw(parameters):
    return [torch.optim.AdamW(parameters, lr=1e-2, fused=True)]


def sgd(parameters):
    return [torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True)]


def averager(parameters):
    return [Averager(parameters)]


def mixed(parameters):
    matrices = [p for p in parameters if p.ndim == 2]
    return [Averager(matrices), *adamw([p for p in parameters if p.ndim != 2])]


def train(model, optimizers, first, last):
    for step in range(first, last):
        torch.manual_seed(step)
        ids = torch.randint(0, 64, (2, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("make", [adamw, sgd, averager, mixed])
def test_five_steps_and_five_more_equal_ten(tmp_path, make):
    straight = tiny()
    train(straight, make(list(straight.parameters())), 0, 10)

    first = tiny()
    optimizers = make(list(first.parameters()))
    train(first, optimizers, 0, 5)
    write_model(first, tmp_path / "model")
    write_optimizer(optimizers, first, tmp_path)

    second = tiny(seed=9)
    load_model(second, tmp_path / "model")
    fresh = make(list(second.parameters()))
    read_optimizer(fresh, second, tmp_path)
    for old, new in zip(optimizers, fresh, strict=True):
        for left, right in zip(old.state.values(), new.state.values(), strict=True):
            assert {k: type(v) for k, v in left.items()} == {k: type(v) for k, v in right.items()}
            assert all(v.dtype == right[k].dtype for k, v in left.items() if isinstance(v, torch.Tensor))
    train(second, fresh, 5, 10)
    assert same(straight, second)


def test_state_survives_regrouping(tmp_path):
    model = tiny()
    optimizers = adamw(list(model.parameters()))
    train(model, optimizers, 0, 2)
    write_optimizer(optimizers, model, tmp_path)
    parameters = list(model.parameters())[::-1]
    regrouped = torch.optim.AdamW(
        [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 5.0}], fused=True
    )
    read_optimizer([regrouped], model, tmp_path)
    for parameter in parameters:
        for key, value in optimizers[0].state[parameter].items():
            assert torch.equal(value, regrouped.state[parameter][key])
    assert regrouped.param_groups[1]["lr"] == 5.0


def test_step_counts_are_kept_as_tensors(tmp_path):
    model = tiny()
    optimizers = adamw(list(model.parameters()))
    train(model, optimizers, 0, 1)
    write_optimizer(optimizers, model, tmp_path)
    with safe_open(str(tmp_path / "optimizer.safetensors"), "pt") as file:
        step = file.get_tensor("AdamW/model.norm.weight/step")
    assert step.dtype == torch.float32 and step.shape == () and step.item() == 1.0


def test_a_parameter_without_state_stays_without(tmp_path):
    model = tiny()
    model.model.norm.weight.requires_grad_(False)
    optimizers = sgd(list(model.parameters()))
    train(model, optimizers, 0, 1)
    write_optimizer(optimizers, model, tmp_path)
    fresh = sgd(list(model.parameters()))
    read_optimizer(fresh, model, tmp_path)
    assert model.model.norm.weight not in fresh[0].state
    assert len(fresh[0].state) == len(list(model.parameters())) - 1


def test_optimiser_misfits_are_named(tmp_path):
    model = tiny()
    write_optimizer(adamw(list(model.parameters())), model, tmp_path)
    deeper = tiny(num_hidden_layers=3)
    with pytest.raises(DataError, match="does not fit") as caught:
        read_optimizer(adamw(list(deeper.parameters())), deeper, tmp_path)
    assert "AdamW/model.layers.2." in caught.value.why
    wider = tiny(vocab_size=65)
    with pytest.raises(DataError, match="does not fit") as caught:
        read_optimizer(adamw(list(wider.parameters())), wider, tmp_path)
    assert "AdamW/model.embed_tokens.weight has shape [64, 16]" in caught.value.why
    with pytest.raises(DataError, match="does not fit"):
        read_optimizer(sgd(list(model.parameters())), model, tmp_path)


def test_incomplete_optimiser_state(tmp_path):
    path = tmp_path / "optimizer.safetensors"
    model = tiny()
    optimizers = adamw(list(model.parameters()))
    train(model, optimizers, 0, 1)
    write_optimizer(optimizers, model, tmp_path)
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    tensors = read_tensors(path)
    tensors.pop("AdamW/model.norm.weight/exp_avg")
    write_tensors(path, {**tensors, "AdamW/model.norm.weight/ghost": torch.ones(1)}, metadata)
    fresh = adamw(list(model.parameters()))
    with pytest.raises(DataError, match="incomplete") as caught:
        read_optimizer(fresh, model, tmp_path)
    assert "exp_avg is missing" in caught.value.why and "ghost is unexpected" in caught.value.why
    assert not fresh[0].state
    write_tensors(path, tensors)
    with pytest.raises(DataError, match="no optimiser state"):
        read_optimizer(fresh, model, tmp_path)


def test_state_that_cannot_be_saved_is_an_error(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = Averager([weight])
    optimizer.state[weight] = {"history": [1, 2]}
    with pytest.raises(TypeError, match="history"):
        optimizer_state.optimizer_slots([optimizer], {"w": Piece.whole(weight)})


# ---- pieces


def cut(pieces, count):
    """Rows of whole pieces as `count` ranks hold them, cut as torch.chunk does."""
    for rank in range(count):
        held = {}
        for name, piece in pieces.items():
            chunk = -(-piece.shape[0] // count)
            start = min(rank * chunk, piece.shape[0])
            held[name] = Piece.rows(piece.tensor.detach()[start : start + chunk].clone(), piece.shape, start)
        yield Part(rank, count), held


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_model_in_pieces_is_read_on_any_number_of_ranks_and_assembled(tmp_path, count, tied):
    model = tiny(vocab_size=61, num_hidden_layers=1, tie_word_embeddings=tied)
    for part, held in cut(model_pieces(model), count):
        write_model(model, tmp_path / "parts", weights=held, part=part)
    assert is_in_pieces(tmp_path / "parts")
    whole = tiny(seed=1, vocab_size=61, num_hidden_layers=1, tie_word_embeddings=tied)
    load_model(whole, tmp_path / "parts")
    assert same(model, whole)
    for other in (1, 2, 4):
        for _, held in cut(model_pieces(tiny(seed=2, vocab_size=61, num_hidden_layers=1)), other):
            empty = (
                tiny(seed=2, vocab_size=61, num_hidden_layers=1, tie_word_embeddings=True) if tied else None
            )
            if empty is not None:
                load_model(empty, tmp_path / "parts", held)
                for name, piece in held.items():
                    stop = piece.start + piece.tensor.numel()
                    elements = model.get_parameter(name).flatten()[piece.start : stop]
                    assert torch.equal(piece.tensor.flatten(), elements), name
    for size in ("5GB", "4KB"):
        out = tmp_path / size
        out.mkdir()
        (out / "config.json").write_bytes((tmp_path / "parts" / "config.json").read_bytes())
        assemble(tmp_path / "parts", out, max_shard_size=size)
        assert (out / "model.safetensors.index.json").exists() == (size == "4KB")
        assert same(model, AutoModelForCausalLM.from_pretrained(out, local_files_only=True))


def test_the_same_pieces_are_the_same_bytes(tmp_path):
    pieces = {"b": Piece.rows(torch.arange(6.0).view(2, 3), (4, 3), 2), "a": Piece.whole(torch.ones(2))}
    for name in ("x", "y"):
        write_pieces(tmp_path / f"{name}.safetensors", pieces, {"layout": {"k": [1]}, "other": 2})
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_missing_and_overlapping_pieces_are_named(tmp_path):
    part = [tmp_path / Part(i, 2).file_name("model") for i in range(2)]
    write_pieces(part[0], {"a": Piece(torch.ones(2, 3), (4, 3), 0)})
    with pytest.raises(DataError, match="no complete set of parts"):
        part_files(tmp_path, "model")
    for rows, start in ((torch.ones(1, 3), 3), (torch.ones(3, 3), 1), (torch.ones(1, 3), 2)):
        write_pieces(part[1], {"a": Piece.rows(rows, (4, 3), start)})
        with pytest.raises(DataError, match="a is incomplete"), open_tensors(part_files(tmp_path, "model")):
            pass
    write_pieces(part[1], {"a": Piece.rows(torch.ones(2, 4), (4, 4), 2)})
    with pytest.raises(DataError, match="shape"), open_tensors(part_files(tmp_path, "model")):
        pass
    write_tensors(part[1], {"a": torch.ones(2, 3)}, {METADATA: "[1]"})
    with pytest.raises(DataError, match="malformed"), open_tensors(part_files(tmp_path, "model")):
        pass
    write_pieces(part[1], {"a": Piece.rows(torch.full((2, 3), 2.0), (4, 3), 2)})
    with open_tensors(part_files(tmp_path, "model")) as stored:
        assert stored.read("a", 1, 2).tolist() == [[1.0] * 3, [2.0] * 3]
        assert stored.read("a").shape == (4, 3) and stored.read("a", 4, 0).shape == (0, 3)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (3, 2)])
def test_optimiser_state_moves_between_numbers_of_ranks(tmp_path, before, after):
    def optimizers(held):
        tensors = [torch.nn.Parameter(piece.tensor) for piece in held.values()]
        named = {
            name: Piece(p, piece.shape, piece.start)
            for (name, piece), p in zip(held.items(), tensors, strict=True)
        }
        return [torch.optim.AdamW(tensors, fused=True)], named

    torch.manual_seed(0)
    whole = {"w": Piece.whole(torch.randn(7, 3)), "v": Piece.whole(torch.randn(2))}
    gradients = {name: torch.randn(piece.shape) for name, piece in whole.items()}

    def trained(count):
        for part, held in cut(whole, count):
            made, named = optimizers(held)
            for name, piece in named.items():
                part_of = piece.like(torch.empty_like(piece.tensor))
                part_of.copy_from(gradients[name])
                piece.tensor.grad = part_of.tensor
            made[0].step()
            yield part, made, named

    for part, made, named in trained(before):
        optimizer_state.write_optimizer(optimizer_state.optimizer_slots(made, named), tmp_path, part)
    for (_, expected, there), (_, held) in zip(trained(after), cut(whole, after), strict=True):
        found, named = optimizers(held)
        optimizer_state.read_optimizer(found, named, tmp_path)
        for name in whole:
            left, right = expected[0].state[there[name].tensor], found[0].state[named[name].tensor]
            assert left.keys() == right.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(left[key], right[key]) for key in left)
