"""Statistics and inspection: exact figures, and rows shown without obeying what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainway.config.schema import TokenizerConfig
from trainway.data.printable import printable
from trainway.data.show import inspect_rows, render
from trainway.data.stats import measure
from trainway.data.tokenizer import load_tokenizer, train_tokenizer
from trainway.errors import DataError

TURNS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "größe 😀", "thinking": "hm"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "bundle"
    train_tokenizer(["hello hello world"] * 20, TokenizerConfig(vocab_size=270), path)
    return path


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_figures_of_a_mixed_file(tmp_path: Path) -> None:
    rows = [
        {"messages": TURNS},
        {"text": "x" * 100},
        "{}",
        {"prompt": "ab", "completion": "c"},
        {"text": "x" * 100, "id": 2},
        {"content": TURNS[:1], "teacher_response": "y"},
        {"text": "z"},
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    found = measure([str(path)]).as_dict()
    assert found == {
        "files": 1,
        "bytes": path.stat().st_size,
        "unit": "characters",
        "rows": 6,
        "bad": 1,
        "duplicates": 1,
        "shapes": {
            "messages": {"rows": 1, "turns": 2, "characters": 12},
            "prompt": {"rows": 1, "turns": 2, "characters": 3},
            "teacher": {"rows": 1, "turns": 2, "characters": 6},
            "text": {"rows": 3, "turns": 0, "characters": 201},
        },
        "roles": {"user": 3, "assistant": 3},
        "turns": 6,
        "characters": 222,
        "mean": 222 / 6,
        "quantiles": {"0": 1, "0.25": 3, "0.5": 6, "0.75": 100, "0.9": 100, "0.95": 100, "0.99": 100, "1": 100},
        "histogram": [(1, 1, 1), (2, 3, 1), (4, 7, 1), (8, 15, 1), (16, 31, 0), (32, 63, 0), (64, 127, 2)],
        "longest": [(str(path), 2, 100), (str(path), 5, 100), (str(path), 1, 12), (str(path), 6, 6), (str(path), 4, 3)],
    }  # fmt: skip
    without = measure([str(path)], dedup=True)
    assert (without.rows, without.duplicates, without.total("characters")) == (5, 1, 122)
    assert without.longest[1] == (str(path), 1, 12)


def test_quantiles_of_many_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"text": "x" * length} for length in range(1000, 0, -1)))
    found = measure([str(path)])
    assert list(found.quantiles.values()) == [1, 250, 500, 750, 900, 950, 990, 1000]
    assert found.mean == 500.5
    assert found.histogram[-1] == (512, 1023, 489)
    assert sum(count for _, _, count in found.histogram) == 1000
    assert [line for _, line, _ in found.longest] == [1, 2, 3, 4, 5]


def test_tokens(tmp_path: Path, tokenizer: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": TURNS}, *({"text": "hello<|eos|>"} for _ in range(300)))
    encode = load_tokenizer(tokenizer)
    expected = sum(len(encode.encode(turn["content"], add_special_tokens=False)) for turn in TURNS)
    found = measure([str(path)], tokenizer=tokenizer)
    assert found.unit == "tokens"
    assert found.shapes["messages"].tokens == expected
    plain = len(encode.encode("hello", add_special_tokens=False)) + len("<|eos|>")
    assert found.quantiles["0.5"] == plain  # the end of a document is no token where it is written out
    assert found.shapes["text"].tokens == 300 * plain


def test_without_a_good_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "{}", "[]")
    with pytest.raises(DataError, match=r"there is no good row\nall 2 rows are malformed"):
        measure([str(path)])


def shown(path: Path, **options: Any) -> list[str]:
    return ["\n".join(render(row)) for row in inspect_rows(str(path), **options)]


def test_rows_are_shown_field_by_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"id": 1, "messages": TURNS}, {"question": "a\nb", "output": "c"})
    assert shown(path) == [
        (
            f"{path}:1  messages, 2 turns, 12 characters\n"
            "── user (5 characters)\nhello\n"
            "── assistant (7 characters)\ngröße 😀\n   thinking: hm\n"
            "id: 1"
        )
    ]
    (bad,) = shown(path, line=2)
    assert bad.splitlines()[0] == f"{path}:2  bad: field 'prompt': missing; the row has 'question', 'output'"
    assert '"question": "a\\nb"' in bad
    assert len(shown(path, first=5)) == 2
    with pytest.raises(DataError, match=r"no row begins in line 9\nthe last one before it is line 2"):
        shown(path, line=9)


def test_tokens_are_shown_as_pieces_of_the_text(tmp_path: Path, tokenizer: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "hello hello", "completion": "ä😀\nb"})
    ((row),) = inspect_rows(str(path), tokenizer=tokenizer)
    for part in row.parts:
        assert part.tokens is not None
        assert "".join(part.tokens) == part.text
    assert row.parts[0].tokens == ["hello", " hello"]
    assert "hello│ hello" in "\n".join(render(row))


def test_what_a_terminal_would_obey_is_escaped(tmp_path: Path) -> None:
    assert printable("a\tb\nc é 你 😀 \u00a0 👩\u200d💻") == "a\tb\nc é 你 😀 \u00a0 👩\u200d💻"
    assert printable("\x1b[2J\r\x07\x9b\u202e\u2028\U000e0001\x7f") == (
        "\\x1b[2J\\x0d\\x07\\x9b\\u202e\\u2028\\U000e0001\\x7f"
    )
    evil = "\x1b]0;title\x07"
    turns = [{"role": "user", "content": evil, "na\x1bme": evil}, {"role": "assistant", "content": "x"}]
    path = write(
        tmp_path / "a.jsonl", {"messages": turns, f"k{evil}": {evil: 1}}, f'{{"{json.dumps(evil)[1:-1]}": 1}}'
    )
    for text in shown(path, first=2):
        assert not any(ord(char) < 32 and char != "\n" for char in text)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\x1b[31m"}\n')
    assert "\\x1b[31m" in shown(tmp_path / "b.jsonl")[0]
