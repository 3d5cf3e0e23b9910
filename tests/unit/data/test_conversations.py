"""Preparing conversations: the right targets in the right split, every row that is left out named by its line."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xxhash

from trainway.config.schema import (
    DataConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)
from trainway.data.convert import convert
from trainway.data.loader import IGNORE_INDEX, Loader, validation_batches
from trainway.data.prepare import PreparedData, merge_parts, prepare
from trainway.data.records import parse_record
from trainway.data.store import LEFT_OUT, QUARANTINE, TokenSplit, TokenStore
from trainway.data.tokenizer import load_tokenizer, train_tokenizer
from trainway.errors import ConfigError, DataError

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS: list[dict[str, Any]] = [
    {"prompt": f"What is {i} times {i}?", "completion": f"{i} times {i} is {i * i}. " * (i % 5 + 1)}
    for i in range(200)
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("conversations") / "bundle"
    config = TokenizerConfig(vocab_size=400, special_tokens=("<|im_start|>", "<|im_end|>"))
    tokenizer = train_tokenizer([json.dumps(row) for row in ROWS], config, path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def write_rows(path: Path, rows: list[Any]) -> Path:
    """JSON lines; a string is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def settings(bundle: Path, seq_len: int = 128, **data: Any) -> RunConfig:
    data = {"train": ("rows.jsonl",), "val_ratio": 0.1, **data}
    return RunConfig(
        recipe="sft",
        model=ModelConfig(path=str(bundle)),
        data=DataConfig(**data),
        train=TrainConfig(seq_len=seq_len, total_steps=1),
    )


def conversations(prepared: PreparedData, name: Any = "train") -> list[tuple[str, str]]:
    """(whole text, text of its targets) of every row of a split."""
    return decoded(TokenStore.open(prepared.store_dir).split(name), prepared)


def decoded(split: TokenSplit, prepared: PreparedData) -> list[tuple[str, str]]:
    tokenizer = load_tokenizer(prepared.tokenizer_dir)
    starts = [*split.document_starts(0, split.num_tokens).tolist(), split.num_tokens]
    found = []
    for start, stop in itertools.pairwise(starts):
        tokens, mask = split.tokens(start, stop), split.mask(start, stop)
        found.append((tokenizer.decode(tokens.tolist()), tokenizer.decode(tokens[mask == 1].tolist())))
    return found


def rendered(row: dict[str, Any]) -> tuple[str, str]:
    asked = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    return f"{asked}{row['completion']}<|im_end|>\n", f"{row['completion']}<|im_end|>"


def held_out(row: dict[str, Any]) -> bool:
    return xxhash.xxh3_64_intdigest(parse_record(row).content_key(), 42) < 0.1 * 2**64


def content(prepared: PreparedData) -> dict[str, bytes]:
    files = sorted(path for path in prepared.store_dir.rglob("*") if path.is_file())
    return {path.relative_to(prepared.store_dir).as_posix(): path.read_bytes() for path in files}


def listed(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_is_stored_on_its_side_with_its_targets(tmp_path: Path, bundle: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    prepared = prepare(settings(bundle), root=tmp_path)
    for name, side in (("train", False), ("val", True)):
        assert conversations(prepared, name) == [rendered(row) for row in ROWS if held_out(row) == side]
        stream = TokenStore.open(prepared.store_dir).split(name)  # type: ignore[arg-type]
        mask = stream.mask(0, stream.num_tokens)
        assert prepared.manifest.splits[name]["trained"] == int(mask.sum())
        assert not mask[stream.document_starts(0, stream.num_tokens)].any()
    assert 10 < sum(map(held_out, ROWS)) < 35
    assert prepared.manifest.conversations == {
        "max_tokens": 128, "too_long": 0, "truncated": 0, "turns_left_out": 0, "cut": 0,
    }  # fmt: skip
    assert load_tokenizer(prepared.tokenizer_dir).chat_template == TEMPLATE
    assert not (prepared.store_dir / LEFT_OUT).exists()


def test_what_nothing_predicts_is_no_target(tmp_path: Path, bundle: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": row["completion"]} for row in ROWS])
    prepared = prepare(settings(bundle), root=tmp_path)
    train = prepared.manifest.splits["train"]
    assert train["trained"] == train["tokens"] - train["documents"]
    stream = TokenStore.open(prepared.store_dir).split("train")
    assert not stream.mask(0, stream.num_tokens)[stream.document_starts(0, stream.num_tokens)].any()


def test_the_batches_teach_the_answers(tmp_path: Path, bundle: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    for packing in ("documents", "none"):
        config = settings(bundle, packing=packing)
        prepared = prepare(config, root=tmp_path)
        store, tokenizer = TokenStore.open(prepared.store_dir), load_tokenizer(prepared.tokenizer_dir)
        loader = Loader(
            store.streams(), seq_len=128, global_batch_size=1, micro_batch_size=1, seed=1, packing=packing,
            shuffle=False,
        )  # fmt: skip
        assert prepared.rows_per_epoch(128) == loader.rows_per_epoch == prepared.to_json()["rows"]
        taught = "".join(
            tokenizer.decode(batch.labels[batch.labels != IGNORE_INDEX].tolist())
            for step in range(1, loader.rows_per_epoch + 1)
            for batch in loader.step(step).micro_batches
        )
        answers = [rendered(row)[1] for row in ROWS if not held_out(row)]
        assert sorted(taught.split("<|im_end|>")) == sorted("".join(answers).split("<|im_end|>"))
        batches = list(
            validation_batches(store.split("val"), seq_len=128, micro_batch_size=4, packing=packing)
        )
        assert sum(batch.num_targets for batch in batches) == store.manifest.splits["val"]["trained"]
        assert all(int(batch.input_ids.max()) < 400 for batch in batches)
        full = prepared.manifest.splits["train"]["tokens"] / (loader.rows_per_epoch * 128)
        if packing == "documents":
            assert full > 0.9
            assert f"packed into {loader.rows_per_epoch} rows of 128, {full:.1%} full" in prepared.summary
        else:
            assert loader.rows_per_epoch == len(answers)
            assert "packed" not in prepared.summary


def test_the_same_store_twice_and_from_every_format(tmp_path: Path, bundle: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    first = prepare(settings(bundle), root=tmp_path)
    again = prepare(settings(bundle), root=tmp_path)
    assert (first.cached, again.cached) == (False, True)
    assert (again.store_dir, again.summary, again.rows) == (first.store_dir, first.summary, first.rows)
    other = prepare(settings(bundle, store_dir="elsewhere"), root=tmp_path)
    assert (other.store_dir.name, content(other)) == (first.store_dir.name, content(first))
    # another place and name of the same content is found; packing and shuffling do not count
    (tmp_path / "rows.jsonl").rename(tmp_path / "renamed.jsonl")
    moved = settings(bundle, train=("renamed.jsonl",), packing="none", shuffle=False)
    assert prepare(moved, root=tmp_path).cached
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "renamed.jsonl").read_bytes()))
    for name in ("rows.csv", "rows.parquet"):
        convert(tmp_path / "renamed.jsonl", tmp_path / name)
    for name in ("rows.jsonl.gz", "rows.csv", "rows.parquet"):
        found = prepare(settings(bundle, train=(name,)), root=tmp_path)
        assert found.store_dir != first.store_dir
        for file in ("train-00000.bin", "train-00000.mask", "val-00000.bin", "val-00000.mask"):
            assert content(found)[file] == content(first)[file]


def test_what_changes_the_store_changes_its_name(tmp_path: Path, bundle: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS[:60])
    write_rows(tmp_path / "other.jsonl", ROWS[60:90])
    (tmp_path / "mine.jinja").write_text(TEMPLATE.replace("im_end|>\n", "im_end|>"))
    variants = [
        settings(bundle),
        settings(bundle, seq_len=127),
        settings(bundle, val_ratio=0.2),
        settings(bundle, validation=("other.jsonl",)),
        settings(bundle, train=("rows.jsonl", "other.jsonl")),
        settings(bundle, train_on="all"),
        settings(bundle, train_on="completion"),
        settings(bundle, over_length="drop"),
        settings(bundle, on_bad_record="quarantine"),
        settings(bundle, dedup=True),
        settings(bundle, chat_template=str(tmp_path / "mine.jinja")),
        settings(bundle).model_copy(update={"seed": 43}),
    ]
    prepared = [prepare(config, root=tmp_path) for config in variants]
    assert len({found.store_dir.name for found in prepared}) == len(variants)
    assert load_tokenizer(prepared[10].tokenizer_dir).chat_template == (tmp_path / "mine.jinja").read_text()


def test_malformed_rows_are_all_named_in_one_pass(tmp_path: Path, bundle: Path) -> None:
    rows: list[Any] = list(ROWS[:30])
    rows[4] = '{"prompt": "no end'
    rows[9] = {"prompt": "What?"}
    rows[17] = {"messages": [{"role": "user", "content": "Hi"}, {"role": "robot", "content": "Hi"}]}
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as caught:
        prepare(settings(bundle), root=tmp_path)
    path = tmp_path / "rows.jsonl"
    assert caught.value.what == "3 malformed records in the data"
    assert [line.split(": ")[0] for line in caught.value.why.splitlines()] == [
        f"{path}:5", f"{path}:10", f"{path}:18",
    ]  # fmt: skip
    assert "field 'completion': missing; the row has 'prompt'" in caught.value.why
    assert "field 'messages[1].role': is 'robot'" in caught.value.why
    everything = listed(tmp_path / "cache" / "bad-records.jsonl")
    assert [(entry["source"], entry["line"], entry["field"]) for entry in everything] == [
        (str(path), 5, ""), (str(path), 10, "completion"), (str(path), 18, "messages[1].role"),
    ]  # fmt: skip
    assert [found.name for found in (tmp_path / "cache").iterdir() if found.is_dir()] == [".sources"]

    prepared = prepare(settings(bundle, on_bad_record="quarantine"), root=tmp_path)
    assert prepared.manifest.quarantined == 3
    assert "; 3 malformed rows set aside" in prepared.summary
    assert listed(prepared.store_dir / QUARANTINE) == everything
    splits = prepared.manifest.splits
    assert splits["train"]["documents"] + splits["val"]["documents"] == 27


def test_rows_that_the_template_refuses_are_malformed_rows(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "strict.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompts here') }}{% endif %}"
        + TEMPLATE
    )
    system = {"messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"},
                           {"role": "assistant", "content": "Hello"}]}  # fmt: skip
    # in file order, whoever found them
    write_rows(tmp_path / "rows.jsonl", [ROWS[0], system, "nothing", *ROWS[1:20], system])
    with pytest.raises(DataError) as caught:
        prepare(settings(bundle, chat_template=str(tmp_path / "strict.jinja")), root=tmp_path)
    path = tmp_path / "rows.jsonl"
    lines = caught.value.why.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:2", f"{path}:3", f"{path}:23"]
    assert "no system prompts here" in lines[0]


def long_row(turns: int) -> dict[str, Any]:
    talk = [("user", "Tell me more about squares."), ("assistant", "A square has four sides.")] * turns
    return {"messages": [{"role": role, "content": text} for role, text in talk]}


def test_rows_too_long_are_listed(tmp_path: Path, bundle: Path) -> None:
    endless = {"prompt": "Count.", "completion": "one two three " * 200}
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS[:10], endless, *ROWS[10:20], long_row(40)])
    small = {"seq_len": 200}
    prepared = prepare(settings(bundle, **small), root=tmp_path)
    facts = prepared.manifest.conversations
    assert facts is not None
    assert (facts["too_long"], facts["truncated"]) == (1, 1)
    first, second = listed(prepared.store_dir / LEFT_OUT)
    assert (first["source"], first["line"], first["reason"]) == (str(path), 11, "too long")
    assert "200 are allowed" in first["why"]
    assert (second["source"], second["line"], second["reason"]) == (str(path), 22, "truncated")
    assert second["turns_left_out"] == facts["turns_left_out"] > 10
    assert second["tokens"] <= 200
    kept = [text for name in ("train", "val") for text, _ in conversations(prepared, name)]
    assert sum("Tell me more" in text for text in kept) == 1
    assert not any("one two" in text for text in kept)
    turns = facts["turns_left_out"]
    assert f"; 1 too long, left out; 1 truncated ({turns} turns left out, 0 cut)" in prepared.summary

    dropped = prepare(settings(bundle, over_length="drop", **small), root=tmp_path)
    assert dropped.manifest.conversations is not None
    assert dropped.manifest.conversations["too_long"] == 2
    assert [entry["line"] for entry in listed(dropped.store_dir / LEFT_OUT)] == [11, 22]

    with pytest.raises(DataError) as caught:
        prepare(settings(bundle, over_length="error", **small), root=tmp_path)
    assert caught.value.what == "2 rows are longer than train.seq_len 200"
    assert [line.rsplit(": ", 1)[0] for line in caught.value.why.splitlines()] == [f"{path}:11", f"{path}:22"]
    listing = tmp_path / "cache" / "left-out.jsonl"
    assert f"({listing} lists all)" in caught.value.fix
    assert [entry["line"] for entry in listed(listing)] == [11, 22]


def test_an_altered_mask_is_found(tmp_path: Path, bundle: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    prepared = prepare(settings(bundle), root=tmp_path)
    mask = prepared.store_dir / "train-00000.mask"
    data = bytearray(mask.read_bytes())
    data[100] ^= 1
    mask.write_bytes(data)
    with pytest.raises(DataError, match=r"train-00000\.mask: altered since the token store was written"):
        prepare(settings(bundle), root=tmp_path)
    mask.unlink()
    with pytest.raises(DataError, match=r"train-00000\.mask: missing from the token store"):
        prepare(settings(bundle), root=tmp_path)


def test_a_mix_of_sources_and_duplicates(tmp_path: Path, bundle: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS[:100])
    # the same conversation in another shape is a duplicate too
    turns = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in ROWS[:20]
    ]
    write_rows(tmp_path / "b.jsonl", [*turns, *ROWS[100:150]])
    mix = (SourceConfig(path="a.jsonl", weight=1), SourceConfig(path="b.jsonl", weight=3, name="bee"))
    prepared = prepare(settings(bundle, train=mix, dedup=True), root=tmp_path)
    assert prepared.manifest.duplicates == sum(not held_out(row) for row in ROWS[:20])
    store = TokenStore.open(prepared.store_dir)
    first, second = store.streams()
    assert decoded(first, prepared) == [rendered(row) for row in ROWS[:100] if not held_out(row)]
    assert decoded(second, prepared) == [rendered(row) for row in ROWS[100:150] if not held_out(row)]
    assert prepared.mix is not None
    assert prepared.mix.names == ("a.jsonl", "bee")
    assert prepared.rows == sum(prepared.mix.rows) == prepared.rows_per_epoch(128)
    loader = Loader(
        store.streams(), mix=prepared.mix, seq_len=128, global_batch_size=4, micro_batch_size=2, seed=1,
        packing="documents", shuffle=True,
    )  # fmt: skip
    assert loader.rows_per_epoch == prepared.rows
    # another weighting is the same store
    heavier = (mix[0].model_copy(update={"weight": 9.0}), mix[1])
    assert prepare(settings(bundle, train=heavier, dedup=True), root=tmp_path).cached


def test_an_empty_side_is_refused(tmp_path: Path, bundle: Path) -> None:
    endless = {"prompt": "Count.", "completion": "one two three " * 200}
    write_rows(tmp_path / "rows.jsonl", [endless] * 3)
    with pytest.raises(DataError, match="there is no training document"):
        prepare(settings(bundle), root=tmp_path)
    write_rows(tmp_path / "rows.jsonl", ROWS[:5])
    with pytest.raises(DataError, match="there is no validation document") as caught:
        prepare(settings(bundle, val_ratio=1e-9), root=tmp_path)
    assert "text_unit" not in caught.value.fix
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"blank\.jsonl: holds no rows"):
        prepare(settings(bundle, train=("rows.jsonl", "blank.jsonl")), root=tmp_path)
    (tmp_path / "plain.txt").write_text("some text")
    with pytest.raises(DataError, match=r"plain\.txt: holds no rows"):
        prepare(settings(bundle, train=("plain.txt",)), root=tmp_path)


def test_the_tokenizer_is_the_model_s_own(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    config = settings(bundle)
    with pytest.raises(ConfigError, match="there is no tokenizer for the conversations"):
        prepare(config.model_copy(update={"model": ModelConfig()}), root=tmp_path)
    nowhere = config.model_copy(update={"model": ModelConfig(path="owner/model", revision="v1")})
    found = prepare(nowhere, root=tmp_path, tokenizer_dir=bundle)
    asked: list[Any] = []

    def find_base(path: str, **options: Any) -> Any:
        asked.append((path, options["revision"], options["cache"]))
        return SimpleNamespace(directory=bundle)

    monkeypatch.setattr("trainway.models.base.find_base", find_base)
    assert prepare(nowhere, root=tmp_path).store_dir == found.store_dir
    assert asked == [("owner/model", "v1", tmp_path / "cache")]
    named = nowhere.model_copy(update={"tokenizer": TokenizerConfig(path=str(bundle))})
    assert prepare(named, root=tmp_path).store_dir == found.store_dir
    assert prepare(config, root=tmp_path).store_dir == found.store_dir


def test_workers_make_the_same_store(tmp_path: Path, bundle: Path) -> None:
    for number in range(3):
        rows: list[Any] = [*ROWS[number * 60 : number * 60 + 60], long_row(40), {"prompt": "What?"}]
        write_rows(tmp_path / f"rows-{number}.jsonl", rows)
    config = settings(bundle, seq_len=200, train=("rows-*.jsonl",), on_bad_record="quarantine")
    for index in range(2):
        prepare(config, num_workers=2, worker_index=index, root=tmp_path)
    merged = merge_parts(config, 2, root=tmp_path)
    whole = prepare(
        config.model_copy(update={"data": config.data.model_copy(update={"store_dir": "other"})}),
        root=tmp_path,
    )
    assert content(merged) == content(whole)
    assert merged.summary == whole.summary
    assert merged.manifest.quarantined == 3
    assert len(listed(merged.store_dir / LEFT_OUT)) == 3


@pytest.mark.slow
def test_fifty_bad_rows_among_a_hundred_thousand(tmp_path: Path, bundle: Path) -> None:
    rng = np.random.default_rng(5)
    bad = sorted(rng.choice(100_000, 50, replace=False).tolist())
    rows: list[Any] = [{"prompt": f"Say {i}", "completion": f"{i}"} for i in range(100_000)]
    for index in bad:
        rows[index] = {"prompt": f"Say {index}", "completion": ""}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="50 malformed records in the data") as caught:
        prepare(settings(bundle), root=tmp_path)
    assert f"and {50 - 20} more" in caught.value.why
    found = listed(tmp_path / "cache" / "bad-records.jsonl")
    assert [(entry["source"], entry["line"], entry["field"]) for entry in found] == [
        (str(path), index + 1, "completion") for index in bad
    ]
