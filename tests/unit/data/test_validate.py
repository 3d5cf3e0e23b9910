"""Validation: sixty malformed rows among good ones, each named, no good one blamed, in constant memory."""

from __future__ import annotations

import base64
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from trainway.config.schema import DataConfig
from trainway.data.rows import BadRecord
from trainway.data.validate import validate
from trainway.errors import ConfigError, DataError

OK = '{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}'


def messages(inner: str) -> bytes:
    return f'{{"messages": [{inner}]}}'.encode()


# (line, field, a part of the reason)
MALFORMED: list[tuple[bytes, str, str]] = [
    # not JSON, or not strictly
    (b'{"text": "x"', "", "not valid JSON"),
    (b'{"text": "x', "", "Unterminated string"),
    (b'{"text":', "", "not valid JSON"),
    (b"{", "", "not valid JSON"),
    (b'"text": "x"}', "", "Extra data"),
    (b'{"text": "x"} trailing', "", "Extra data at column 15"),
    (b'{"text": "x"}{"text": "y"}', "", "Extra data at column 14"),
    (b'{"text": "x"},', "", "Extra data"),
    (b"{'text': 'x'}", "", "not valid JSON"),
    (b'{text: "x"}', "", "not valid JSON"),
    (b'{"text": "x",}', "", "not valid JSON"),
    (b'{"text": "x" /* why */}', "", "not valid JSON"),
    (b'{"text": "a\\x"}', "", "Invalid \\escape"),
    (b'{"text": "a\tb"}', "", "Invalid control character"),
    (b'{"text": "a\x00b"}', "", "Invalid control character"),
    (b"\x00\x00\x00", "", "not valid JSON"),
    (b'{"text": "x", "n": NaN}', "", "NaN is not a JSON number"),
    (b'{"text": "x", "n": [Infinity]}', "", "Infinity is not a JSON number"),
    (b'{"text": "x", "n": -Infinity}', "", "-Infinity is not a JSON number"),
    (b'{"text": "x", "n": 1e400}', "", "out of range"),
    (b'{"text": "x", "n": 01}', "", "not valid JSON"),
    (b'{"text": "x", "n": ' + b"7" * 5000 + b"}", "", "Exceeds the limit"),
    (b'{"text": "x", "n": True}', "", "not valid JSON"),
    (b'\xef\xbb\xbf{"text": "x"}', "", "byte order mark"),
    (b"text", "", "not valid JSON"),
    (b'{"text": "x", "d": ' + b"[" * 200 + b"]" * 200 + b"}", "", "nested too deeply"),
    (b'{"a":' * 100_000, "", "nested too deeply"),
    # not UTF-8
    (b'{"text": "\xff"}', "", "not valid UTF-8 at byte 10"),
    ('{"text": "größe"}'.encode("latin-1"), "", "not valid UTF-8 at byte 12"),
    (b'{"text": "\xed\xa0\x80"}', "", "not valid UTF-8"),
    (b'{"text": "\xf0\x9f\x98"}', "", "not valid UTF-8"),
    ('{"text": "x"}'.encode("utf-16"), "", "not valid UTF-8"),
    # JSON, but not an object
    (b'["text", "x"]', "", "a list, not an object"),
    (b'"text"', "", "a string, not an object"),
    (b"3.5", "", "a number, not an object"),
    (b"null", "", "null, not an object"),
    (b"true", "", "a boolean, not an object"),
    # an object of no shape
    (b"{}", "", "of no known shape: it has no field"),
    (b'{"txt": "x"}', "", "of no known shape: it has 'txt'"),
    (b'{"prompt": "x"}', "completion", "missing"),
    (b'{"completion": "x"}', "prompt", "missing"),
    (b'{"content": [], "x": 1}', "teacher_response", "missing"),
    # a shape, with a fault
    (b'{"text": "x", "text": "y"}', "text", "twice"),
    (b'{"text": "x", "meta": {"a": 1, "a": 1}}', "meta.a", "twice"),
    (b'{"text": ""}', "text", "empty"),
    (b'{"text": " \\n\\t"}', "text", "empty"),
    (b'{"text": 5}', "text", "a number"),
    (b'{"text": null}', "text", "null"),
    (b'{"text": ["x"]}', "text", "a list"),
    (b'{"text": "a\\u0000"}', "text", "NUL character at character 1"),
    (b'{"text": "\\ud83d"}', "text", "lone surrogate U+D83D"),
    (b'{"text": "x", "meta": ["\\ude00\\ud83d"]}', "meta[0]", "lone surrogate U+DE00"),
    (b'{"prompt": "x", "completion": ""}', "completion", "empty"),
    (b'{"prompt": {"a": 1}, "completion": "y"}', "prompt", "an object"),
    (messages(""), "messages", "empty list"),
    (messages('{"role": "user", "content": "x"}'), "messages", "no assistant turn"),
    (messages(f'{OK}, {{"role": "user", "content": ""}}'), "messages[2].content", "empty"),
    (messages(f'{OK}, {{"role": "user", "content": 7}}'), "messages[2].content", "a number"),
    (messages(f'{OK}, {{"role": "User", "content": "x"}}'), "messages[2].role", "'User'"),
    (messages(f'{OK}, {{"content": "x"}}'), "messages[2].role", "missing"),
    (messages(f"{OK}, []"), "messages[2]", "a list"),
    (b'{"messages": "hi"}', "messages", "a string"),
    (b'{"content": [{"role": "user"}], "teacher_response": "x"}', "content[0].content", "missing"),
    (b'{"content": [{"role": "user", "content": "x"}], "teacher_response": 0}', "teacher_response", "a number"),
]  # fmt: skip

GOOD: list[bytes] = [
    b'{"text": "x"}\r',
    '{"text": "größe 你好 😀 \ufeff \u2028 \u0085"}'.encode(),
    b'{"text": "\\ud83d\\ude00 \\u00e9 \\"quoted\\" \\\\ \\/ \\b\\f\\n\\r\\t"}',
    b'  {"text" : "spaces around"}\t',
    b'{"text": "NaN Infinity [[[[ {{{{ ]]]] null \\\\ud83d"}',
    b'{"text": "' + b"long " * 200_000 + b'"}',
    b'{"text": "x", "deep": ' + b'{"a": [' * 60 + b"]}" * 60 + b"}",
    b'{"text": "x", "n": [0, -1.5e-300, 123456789012345678901234567890, true, false, null, {}, []]}',
    b'{"prompt": "007", "completion": " 0"}',
    b'{"output": "b", "input": "a", "empty": "", "nothing": null}',
    b'{"prompt": "a", "completion": "b", "messages": null}',
    messages(OK),
    messages('{"role": "system", "content": "s"}, {"role": "developer", "content": "d"}, ' + OK),
    messages(OK + ', {"role": "tool", "content": "{}", "tool_call_id": "1"}, {"role": "user", "content": "?"}'),
    messages('{"role": "user", "content": [{"type": "text", "text": "x"}]}, {"role": "assistant", "content": "y"}'),
    b'{"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]}',
    b'{"content": [{"role": "user", "content": "q"}], "teacher_response": "r", "id": "1"}',
    b'{"text": "a\\u0001b \\u001b[31m"}',
    b'{"text": "x", "": 1, "a b": {"a b": 2}}',
]  # fmt: skip


def malformed_file(path: Path) -> dict[int, tuple[str, str]]:
    """Write good and bad rows in turns, with blank lines and one of 100 MB; (field, reason) by line."""
    expected: dict[int, tuple[str, str]] = {}
    number = 0
    with path.open("wb") as file:

        def put(line: bytes) -> None:
            nonlocal number
            number += 1
            file.write(line + b"\n")

        for index, (line, field, reason) in enumerate(MALFORMED):
            put(GOOD[index % len(GOOD)])
            if index % 7 == 0:
                put(b" \r")
            put(line)
            expected[number] = (field, reason)
        put(b"")
        number += 1
        expected[number] = ("", "longer than max_document_mib (64 MiB)")
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"y" * 1_000_000)
        file.write(b'"}\n')
        for line in GOOD:
            put(line)
        file.write(b'{"text": "no newline at the end"}')
    return expected


def check(path: Path, **options: Any) -> tuple[Any, list[BadRecord]]:
    bad: list[BadRecord] = []
    return validate([str(path)], on_bad=bad.append, **options), bad


def test_every_malformed_row_is_named_and_no_good_row_is_blamed(tmp_path: Path) -> None:
    path, aside = tmp_path / "a.jsonl", tmp_path / "bad.jsonl"
    expected = malformed_file(path)
    assert len(expected) >= 60
    tracemalloc.start()
    found, bad = check(path, quarantine=aside)
    assert tracemalloc.get_traced_memory()[1] < 150 << 20  # the line of 100 MB is read up to 64 MiB
    tracemalloc.stop()
    assert [(record.line, record.field) for record in bad] == [
        (line, field) for line, (field, _) in expected.items()
    ]
    for record in bad:
        assert expected[record.line][1] in record.reason, str(record)
        assert record.source == path
    good = len(MALFORMED) + len(GOOD) + 1
    assert (found.rows, found.bad, sum(found.shapes.values())) == (good + len(expected), len(expected), good)

    lines = path.read_bytes().split(b"\n")
    for entry in map(json.loads, aside.read_text(encoding="utf-8").splitlines()):
        assert entry["field"] == expected[entry["line"]][0]
        raw = entry["raw"].encode() if "raw" in entry else base64.b64decode(entry["raw_base64"])
        line = lines[entry["line"] - 1]
        assert raw == (line[: len(raw)] if "bytes" in entry else line)
        assert entry.get("bytes", len(line)) == len(line)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = json.dumps(
        {"messages": [{"role": "user", "content": "q" * 2000}, {"role": "assistant", "content": "a"}]}
    )
    path.write_text((row + '\n{"text": 1}\n') * 4_000)
    tracemalloc.start()
    found = validate([str(path)], quarantine=tmp_path / "bad.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.rows, found.bad, found.turns) == (8_000, 4_000, 8_000)
    assert path.stat().st_size > 8 << 20
    assert peak < 5 << 20


def test_the_summary_of_good_rows(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_bytes(messages(OK) + b'\n{"text": "abc"}\n{"text": "abc", "id": 2}\n')
    (tmp_path / "d" / "b.csv").write_text("prompt,completion\nhi,yo\na,bc\n")
    found = validate([str(tmp_path / "d")], dedup=True)
    assert found.as_dict() == {
        "files": 2,
        "bytes": sum(path.stat().st_size for path in (tmp_path / "d").iterdir()),
        "rows": 5,
        "bad": 0,
        "duplicates": 2,
        "shapes": {"messages": 1, "prompt": 2, "text": 2},
        "turns": 6,
        "characters": 4 + 3 + 3 + 4 + 3,
    }


def test_a_required_shape(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(messages(OK) + b'\n{"text": "x"}\n')
    _, bad = check(path, kind="messages")
    assert [str(record) for record in bad] == [f"{path}:2: field 'messages': missing; the row has 'text'"]


def test_files_that_cannot_be_validated(tmp_path: Path) -> None:
    for name, data, message in (
        ("blank.jsonl", b"\n \n\n", r"blank\.jsonl: holds no rows\nevery line is blank"),
        ("empty.jsonl", b"", r"empty\.jsonl: the file is empty"),
        ("a.txt", b"text", r"a\.txt: plain text has no rows"),
        ("a.jsonl.gz", b"text", r"a\.jsonl\.gz: truncated or corrupt gzip file"),
        ("a.bin", b"text", r"a\.bin is of an unknown kind"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=message):
            check(tmp_path / name)
    with pytest.raises(DataError, match=r"no\.jsonl is missing"):
        check(tmp_path / "no.jsonl")


def test_the_quarantine_never_replaces_data(tmp_path: Path) -> None:
    path, aside = tmp_path / "a.jsonl", tmp_path / "bad.jsonl"
    path.write_text('{"text": 1}\n')
    aside.write_text("kept")
    with pytest.raises(ConfigError, match="would replace the data"):
        check(path, quarantine=path, force=True)
    with pytest.raises(ConfigError, match=r"bad\.jsonl exists already"):
        check(path, quarantine=aside)
    assert (path.read_text(), aside.read_text()) == ('{"text": 1}\n', "kept")
    check(path, quarantine=aside, force=True)
    assert json.loads(aside.read_text())["raw"] == '{"text": 1}'
    with pytest.raises(ConfigError, match=r"the directory .*no does not exist"):
        check(path, quarantine=tmp_path / "no" / "bad.jsonl")


def test_a_smaller_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * (1 << 20)}) + "\n")
    assert check(path)[0].bad == 0
    (bad,) = check(path, config=DataConfig(max_document_mib=1))[1]
    assert bad.reason == "longer than max_document_mib (1 MiB)"
