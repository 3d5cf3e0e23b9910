"""The tokenizer: lossless, deterministic, at home in transformers, and safe from special tokens in text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainway.config.schema import TokenizerConfig
from trainway.data.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    text_encoder,
    token_bytes,
    tokenizer_hash,
    train_tokenizer,
)
from trainway.errors import ConfigError, DataError, EnvironmentFault

TEXTS = [
    Path(__file__).read_text(),
    Path(json.__file__).read_text(),
    "Grüße, Welt! 你好 🎉\n\n    12345678",
] * 2
CONFIG = TokenizerConfig(vocab_size=600, special_tokens=("<|user|>",))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "bundle"
    train_tokenizer(TEXTS, CONFIG, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(bundle: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(bundle)


def test_training_is_deterministic_and_the_hash_survives_saving(bundle: Path, tmp_path: Path) -> None:
    again = train_tokenizer(iter(TEXTS), CONFIG, tmp_path / "again")
    other = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=601), tmp_path / "other")
    assert (bundle / "tokenizer.json").read_bytes() == (tmp_path / "again" / "tokenizer.json").read_bytes()
    hashes = {
        tokenizer_hash(each)
        for each in (
            again,
            load_tokenizer(bundle),
            load_tokenizer(bundle / "tokenizer.json"),
            AutoTokenizer.from_pretrained(bundle),
        )
    }
    assert len(hashes) == 1
    assert tokenizer_hash(other) not in hashes


def test_the_bundle_loads_in_transformers(bundle: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    loaded = AutoTokenizer.from_pretrained(bundle)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    assert loaded.convert_tokens_to_ids("<|user|>") == 3
    assert loaded.model_max_length > 10**9
    assert len(loaded) == 600
    text = "def f( x ) :\n\n\treturn 'a' , x !"
    assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_and_its_bytes_are_counted(bundle: Path, text: str) -> None:
    tokenizer = _cached(bundle)
    ids = text_encoder(tokenizer).encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())


_loaded: dict[Path, PreTrainedTokenizerFast] = {}


def _cached(bundle: Path) -> PreTrainedTokenizerFast:
    return _loaded.setdefault(bundle, load_tokenizer(bundle))


def test_special_tokens_in_text_stay_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "a<|eos|>b<|bos|><|pad|><|user|>c"
    ids = text_encoder(tokenizer).encode(text, add_special_tokens=False).ids
    assert min(ids) > 3
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|eos|>", add_special_tokens=False) == [
        1
    ]  # the tokenizer itself is left as it was


def test_token_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    counts = token_bytes(tokenizer)
    assert counts.dtype == np.int32
    assert counts.shape == (600,)
    assert counts[:4].tolist() == [0, 0, 0, 0]
    assert (counts[4:260] == 1).all()
    assert (counts[260:] >= 2).all()


def test_digits_stand_in_groups_of_three(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x 1234567")
    assert [piece for piece, _ in pieces] == ["x", "Ġ", "123", "456", "7"]


def test_progress_ends_complete(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    train_tokenizer(
        ["a b " * 10**6], CONFIG, tmp_path / "t", progress=lambda *call: seen.append(call), total=10
    )
    assert seen[-1] == (4_000_000, 4_000_000, "tokenizer: learning merges")


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path: Path) -> None:
    config = TokenizerConfig(vocab_size=258)
    with pytest.raises(
        ConfigError, match=r"vocab_size 258 is too small\n256 bytes and 3 special tokens need 259"
    ):
        train_tokenizer(["a"], config, tmp_path / "t")


def test_missing_and_corrupt_tokenizers(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((bundle / "tokenizer.json").read_bytes()[:-100])
    with pytest.raises(DataError, match=r"tokenizer\.json: not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(DataError, match="not a tokenizer of the tokenizers library"):
        load_tokenizer(tmp_path / "tokenizer.json")
    shutil.copytree(bundle, tmp_path / "b")
    (tmp_path / "b" / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer(tmp_path / "b")


def test_a_full_disk_is_told_apart_from_other_errors(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: PreTrainedTokenizerFast, out: Path) -> None:
        raise Exception("No space left on device (os error 28)")  # as the tokenizers library says it

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(EnvironmentFault, match="No space left on device"):
        save_tokenizer(tokenizer, tmp_path / "t")


def test_the_usual_names_are_found_in_a_bare_file(tmp_path: Path) -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "<s>": 1, "</s>": 2}, merges=[]))
    backend.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "u.json"))
    with pytest.raises(DataError, match="has no end-of-document token"):
        load_tokenizer(tmp_path / "u.json")
