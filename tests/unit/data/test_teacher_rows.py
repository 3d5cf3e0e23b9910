"""A teacher's rows on their way into training: the same store from any number of workers, the same rows on every rank."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainway.config.mixes import train_sources
from trainway.config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig, TokenizerConfig
from trainway.data.convert import convert
from trainway.data.mix import mix_rows
from trainway.data.prepare import PreparedData, merge_parts, prepare
from trainway.data.store import LEFT_OUT, QUARANTINE, TokenSplit, TokenStore
from trainway.data.teacher import end_of_turn, end_tokens, own_template
from trainway.data.teacher_rows import TeacherBatch, TeacherLoader, TeacherRow, validation_rows
from trainway.data.tokenizer import load_tokenizer, train_tokenizer
from trainway.errors import DataError

EOS, END = 1, 7
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS: list[dict[str, Any]] = [
    {
        "content": [{"role": "user", "content": f"What is {i} times {i}?"}],
        "teacher_response": f"{i} times {i} is {i * i}. " * (i % 5 + 1),
    }
    for i in range(90)
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "bundle"
    config = TokenizerConfig(vocab_size=400, special_tokens=("<|im_start|>", "<|im_end|>"))
    tokenizer = train_tokenizer([json.dumps(row) for row in ROWS], config, path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def config(bundle: Path, **data: Any) -> RunConfig:
    data = {"train": ("rows.jsonl",), "val_ratio": 0.1, **data}
    return RunConfig(recipe="gad", model=ModelConfig(path=str(bundle)), data=DataConfig(**data))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def content(prepared: PreparedData) -> dict[str, bytes]:
    files = sorted(path for path in prepared.store_dir.rglob("*") if path.is_file())
    return {path.relative_to(prepared.store_dir).as_posix(): path.read_bytes() for path in files}


def ending(prepared: PreparedData) -> int:
    """The end of an answer, from the store's own tokenizer alone."""
    tokenizer = load_tokenizer(prepared.tokenizer_dir)
    assert end_tokens(tokenizer, own_template(tokenizer)) == (
        tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id,
    )  # fmt: skip
    return end_of_turn(tokenizer, own_template(tokenizer))


def loader_of(prepared: PreparedData, **changes: Any) -> TeacherLoader:
    store = TokenStore.open(prepared.store_dir)
    given = {"prompts_per_step": 8, "seed": 3, "shuffle": True, "mix": prepared.mix}
    return TeacherLoader(store.streams(), end_token=ending(prepared), **{**given, **changes})


def texts(prepared: PreparedData, rows: Any) -> list[tuple[str, str, bool]]:
    tokenizer = load_tokenizer(prepared.tokenizer_dir)
    return [(tokenizer.decode(row.prompt), tokenizer.decode(row.response), row.ended) for row in rows]


def written(row: dict[str, Any]) -> tuple[str, str, bool]:
    asked = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in row["content"])
    return f"{asked}<|im_start|>assistant\n", f"{row['teacher_response']}<|im_end|>", True


def same(a: TeacherBatch, b: TeacherBatch) -> bool:
    return (a.step, a.sample_hash) == (b.step, b.sample_hash) and all(
        (one.id, one.ended) == (two.id, two.ended)
        and np.array_equal(one.prompt, two.prompt)
        and np.array_equal(one.response, two.response)
        for one, two in zip(a.rows, b.rows, strict=True)
    )


def test_every_row_comes_once_an_epoch_as_it_was_written(tmp_path: Path, bundle: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    prepared = prepare(config(bundle), root=tmp_path)
    train, val = (prepared.manifest.splits[name] for name in ("train", "val"))
    assert train["documents"] + val["documents"] == 90
    assert val["documents"] > 3
    assert prepared.manifest.conversations == {
        "max_tokens": 2048 + 1536, "too_long": 0, "truncated": 0, "turns_left_out": 0, "cut": 0,
    }  # fmt: skip
    assert prepared.summary == (
        f"{train['documents']} prompts of {train['tokens'] - train['trained']:,} tokens, "
        f"their answers of {train['trained']:,}, for training; "
        f"{val['documents']} prompts of {val['tokens'] - val['trained']:,} tokens, "
        f"their answers of {val['trained']:,}, for validation"
    )
    count = train["documents"]
    loader = loader_of(prepared, prompts_per_step=count)
    assert loader.rows_per_epoch == prepared.rows == prepared.rows_per_epoch(512) == count
    assert loader.steps_per_epoch == 1
    held = texts(
        prepared,
        validation_rows(TokenStore.open(prepared.store_dir).split("val"), 99, end_token=ending(prepared)),
    )
    orders = []
    for epoch in (1, 2):
        batch = loader.step(epoch)
        assert all((row.prompt.dtype, row.response.dtype) == (np.int32, np.int32) for row in batch.rows)
        assert [row.id // count for row in batch.rows] == [epoch - 1] * count
        orders.append([row.id % count for row in batch.rows])
        found = texts(prepared, batch.rows)
        assert sorted(found + held) == sorted(map(written, ROWS))
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(count))
    assert orders[0] != orders[1]
    in_order = loader_of(prepared, prompts_per_step=count, shuffle=False)
    assert [row.id for row in in_order.step(2).rows] == list(range(count, 2 * count))


def test_a_step_is_a_pure_function_of_seed_and_step(tmp_path: Path, bundle: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    prepared = prepare(config(bundle), root=tmp_path)
    first = loader_of(prepared)
    batches = [first.step(step) for step in range(1, 60)]
    again = loader_of(
        prepare(config(bundle), root=tmp_path)
    )  # opened once more, read from the middle, and back
    for step in (57, 3, 31, 1, 59):
        assert same(again.step(step), batches[step - 1])
    ids = [row.id for batch in batches for row in batch.rows]
    assert len(set(ids)) == len(ids) == 59 * 8
    assert len({batch.sample_hash for batch in batches}) == 59
    assert not same(loader_of(prepared, seed=4).step(1), batches[0])


def test_three_workers_make_the_store_of_one(tmp_path: Path, bundle: Path) -> None:
    for number in range(3):
        write_rows(tmp_path / f"rows-{number}.jsonl", ROWS[number * 30 : number * 30 + 30])
    long = {"content": [*ROWS[0]["content"], *ROWS[1]["content"]] * 9, "teacher_response": "so. " * 80}
    write_rows(tmp_path / "rows-3.jsonl", [long])
    data = {"train": ("rows-*.jsonl",), "max_prompt_tokens": 40, "max_response_tokens": 30}
    alone = config(bundle, **data, store_dir="alone")
    spread = config(bundle, **data, store_dir="spread")
    one = prepare(alone, root=tmp_path)
    for index in (2, 0, 1):
        prepare(spread, root=tmp_path, num_workers=3, worker_index=index)
    three = merge_parts(spread, 3, root=tmp_path)
    assert content(three) == content(one)
    assert one.manifest.conversations is not None
    assert one.manifest.conversations["cut"] >= 1
    assert one.manifest.conversations["turns_left_out"] == 17
    assert same(loader_of(three).step(5), loader_of(one).step(5))


def test_rows_that_are_too_long(tmp_path: Path, bundle: Path) -> None:
    question, answer = ROWS[3]["content"][0], {"role": "assistant", "content": "9."}
    rows = [
        *ROWS[:20],
        {"content": [question, answer, question], "teacher_response": "9."},
        {"content": [question], "teacher_response": "9. " * 60},
        {"content": [{"role": "user", "content": "x y " * 90}], "teacher_response": "9."},
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    limits = {"max_prompt_tokens": 35, "max_response_tokens": 50}
    prepared = prepare(config(bundle, **limits), root=tmp_path)
    assert prepared.manifest.conversations == {
        "max_tokens": 85, "too_long": 1, "truncated": 2, "turns_left_out": 2, "cut": 1,
    }  # fmt: skip
    assert prepared.summary.endswith("; 1 too long, left out; 2 truncated (2 turns left out, 1 cut)")
    listed = [json.loads(line) for line in (prepared.store_dir / LEFT_OUT).read_text().splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in listed] == [
        (21, "truncated"), (22, "truncated"), (23, "too long"),
    ]  # fmt: skip
    (cut,) = [row for row in every_row(prepared) if not row.ended]
    assert len(cut.response) == 50
    assert int(cut.response[-1]) != ending(prepared)
    dropped = prepare(config(bundle, **limits, over_length="drop"), root=tmp_path)
    assert dropped.manifest.conversations is not None
    assert dropped.manifest.conversations["too_long"] == 3
    with pytest.raises(DataError) as caught:
        prepare(config(bundle, **limits, over_length="error"), root=tmp_path)
    told = str(caught.value).splitlines()
    assert told[0] == "3 rows are longer than data.max_prompt_tokens 35 or data.max_response_tokens 50"
    assert [line.split(": ")[0] for line in told[1:4]] == [
        f"{tmp_path / 'rows.jsonl'}:{line}" for line in (21, 22, 23)
    ]
    assert told[4].endswith(
        "raise data.max_prompt_tokens or data.max_response_tokens, or set data.over_length to truncate or drop"
    )
    assert not list((tmp_path / "cache").glob("*/left-out.jsonl.tmp*"))


def every_row(prepared: PreparedData) -> list[TeacherRow]:
    store = TokenStore.open(prepared.store_dir)
    return [
        row
        for name in ("train", "val")
        for row in validation_rows(store.split(name), 10**6, end_token=ending(prepared))  # type: ignore[arg-type]
    ]


def test_the_fields_are_those_that_are_named(tmp_path: Path, bundle: Path) -> None:
    write_rows(tmp_path / "usual.jsonl", ROWS)
    renamed = [
        # beside them what looks like rows of other shapes
        {"messages": row["content"], "gpt": row["teacher_response"], "content": "x", "text": "t"}
        for row in ROWS
    ]
    write_rows(tmp_path / "rows.jsonl", renamed)
    named = {"prompt_field": "messages", "response_field": "gpt"}
    usual = prepare(config(bundle, train=("usual.jsonl",)), root=tmp_path)
    prepared = prepare(config(bundle, **named), root=tmp_path)
    for file in ("train-00000.bin", "train-00000.mask", "val-00000.bin"):
        assert content(prepared)[file] == content(usual)[file]
    assert prepared.store_dir != usual.store_dir
    convert(str(tmp_path / "usual.jsonl"), tmp_path / "usual.parquet")
    table = prepare(config(bundle, train=("usual.parquet",)), root=tmp_path)
    assert content(table)["train-00000.bin"] == content(usual)["train-00000.bin"]
    # the same file, read by another name, is another store
    write_rows(tmp_path / "two.jsonl", [{**row, "other": f"{row['teacher_response']}!"} for row in ROWS])
    one, two = (
        prepare(config(bundle, train=("two.jsonl",), response_field=name), root=tmp_path)
        for name in ("teacher_response", "other")
    )
    assert sorted(texts(one, every_row(one))) == sorted(map(written, ROWS))
    assert not two.cached
    assert all(answer.endswith("!<|im_end|>") for _, answer, _ in texts(two, every_row(two)))
    # what lacks them is named by file, line and field
    write_rows(tmp_path / "rows.jsonl", [renamed[0], {"messages": renamed[1]["messages"]}, ROWS[2]])
    with pytest.raises(DataError) as caught:
        prepare(config(bundle, **named), root=tmp_path)
    assert str(caught.value).splitlines()[1:3] == [
        f"{tmp_path / 'rows.jsonl'}:2: field 'gpt': missing; the row has 'messages'",
        f"{tmp_path / 'rows.jsonl'}:3: field 'messages': missing; the row has 'content', 'teacher_response'",
    ]
    quarantined = prepare(
        config(bundle, **named, on_bad_record="quarantine", validation=("rows.jsonl",)), root=tmp_path
    )
    assert quarantined.manifest.quarantined == 4
    assert (quarantined.store_dir / QUARANTINE).exists()
    assert quarantined.summary.endswith("; 4 malformed rows set aside")


def test_duplicates_are_left_out(tmp_path: Path, bundle: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [*ROWS, *ROWS[:7]])
    prepared = prepare(config(bundle, dedup=True), root=tmp_path)
    again = prepare(config(bundle), root=tmp_path)
    assert prepared.manifest.duplicates > 3
    assert again.manifest.splits["train"]["documents"] == prepared.manifest.splits["train"]["documents"] + (
        prepared.manifest.duplicates
    )
    assert prepared.summary.endswith(f"; {prepared.manifest.duplicates} duplicates left out")


def test_a_mix_of_teachers(tmp_path: Path, bundle: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS[:30])
    write_rows(tmp_path / "b.jsonl", ROWS[30:80])
    write_rows(tmp_path / "val.jsonl", ROWS[80:])
    sources = [SourceConfig(path="a.jsonl", weight=3), SourceConfig(path="b.jsonl", weight=1)]
    prepared = prepare(config(bundle, train=tuple(sources), validation=("val.jsonl",)), root=tmp_path)
    assert prepared.mix is not None
    assert prepared.mix.rows == (30, 50)
    loader = loader_of(prepared)
    assert loader.rows_per_epoch == prepared.rows_per_epoch(512) == 80
    rows = [row for step in range(1, 65) for row in loader.step(step).rows]  # two blocks of 256
    assert len({row.id for row in rows}) == len(rows) == 512
    known = {
        text[0]: index for index, part in enumerate((ROWS[:30], ROWS[30:80])) for text in map(written, part)
    }
    sides = Counter(known[text[0]] for text in texts(prepared, rows))
    assert sides == {0: 384, 1: 128}
    assert all(known[text[0]] == row.id % 2 for text, row in zip(texts(prepared, rows), rows, strict=True))
    mix = mix_rows(train_sources(config(bundle, train=tuple(sources)).data), (30, 50))
    assert same(loader_of(prepared, mix=mix).step(9), loader.step(9))


def test_validation_rows_are_spread_evenly() -> None:
    split = make_split([(2, 3)] * 10)
    for count, expected in (
        (1, [0]),
        (3, [0, 3, 6]),
        (4, [0, 2, 5, 7]),
        (10, list(range(10))),
        (99, list(range(10))),
    ):
        rows = validation_rows(split, count, end_token=END)
        assert [row.id for row in rows] == expected
        assert [int(row.prompt[0]) for row in rows] == [10 + 5 * place for place in expected]
        again = validation_rows(split, count, end_token=END)
        assert all(np.array_equal(one.response, two.response) for one, two in zip(rows, again, strict=True))
    with pytest.raises(DataError, match="the train split has no conversation"):
        validation_rows(make_split([]), 3, end_token=END)


def test_where_a_prompt_ends() -> None:
    split = make_split([(1, 1), (4, 2), (2, 5)], ends=(0, 2))
    rows = validation_rows(split, 3, end_token=END)
    assert [(row.prompt.tolist(), row.response.tolist(), row.ended) for row in rows] == [
        ([10], [END], True),
        ([12, 13, 14, 15], [16, 17], False),
        ([18, 19], [20, 21, 22, 23, END], True),
    ]
    loader = TeacherLoader(split, prompts_per_step=2, seed=1, shuffle=False, end_token=END)
    assert [[row.id for row in loader.step(step).rows] for step in (1, 2, 3)] == [[0, 1], [2, 3], [4, 5]]
    assert [row.ended for row in loader.step(2).rows] == [True, True]
    assert TeacherLoader(split, prompts_per_step=7, seed=1, shuffle=True, end_token=END).steps_per_epoch == 1


def make_split(sizes: list[tuple[int, int]], ends: tuple[int, ...] = ()) -> TokenSplit:
    """Documents of so many tokens of prompt and answer, each token its own; those of `ends` end with END."""
    starts = np.cumsum([0, *(sum(size) for size in sizes)])
    tokens = np.arange(starts[-1], dtype=np.uint16) + 10
    mask = np.zeros(starts[-1], dtype=np.uint8)
    for number, ((start, stop), (prompt, _)) in enumerate(
        zip(itertools.pairwise(starts.tolist()), sizes, strict=True)
    ):
        mask[start + prompt : stop] = 1
        if number in ends:
            tokens[stop - 1] = END
    return TokenSplit.from_arrays(tokens, starts, EOS, mask=mask)
