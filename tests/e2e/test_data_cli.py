"""`trainway data`: rows from a table to training data and back, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import run_cli
from trainway.cli.app import main

Capture = pytest.CaptureFixture[str]
GOOD = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "größe 😀"}]}\n'
BAD = '{"prompt": "x"}\n{"text": "a\\u001b[31m", "text": "b"}\n'


@pytest.mark.parametrize("verb", ["validate", "convert", "export", "stats", "inspect"])
def test_every_verb_has_help_with_an_example(verb: str, capsys: Capture) -> None:
    assert main(["data", verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Example: trainway data {verb} " in shown
    assert "--json" in shown
    assert main(["data", "--help"]) == 0
    assert f"\n  {verb} " in capsys.readouterr().out


def test_validate_as_a_program(tmp_path: Path) -> None:
    path, aside = tmp_path / "a.jsonl", tmp_path / "bad.jsonl"
    path.write_text(GOOD + BAD + GOOD)
    done = run_cli("data", "validate", path, "--quarantine", aside, "--dedup", check=3)
    assert done.stdout.splitlines() == [
        f"{path}:2: field 'completion': missing; the row has 'prompt'",
        f"{path}:3: field 'text': the key occurs twice in one object",
    ]
    assert done.stderr.splitlines() == [
        "error: 2 of 4 rows are malformed",
        f"why: {aside} holds them",
        "fix: correct them, or set them aside with `trainway data convert ... --quarantine FILE`",
    ]
    assert [json.loads(line)["raw"] + "\n" for line in aside.read_text().splitlines()] == BAD.splitlines(True)
    path.write_text(GOOD * 2)
    done = run_cli("data", "validate", path, "--dedup")
    assert (done.stdout, done.stderr) == (
        "ok: 2 rows in 1 file (messages: 2), 4 turns, 18 characters, 1 duplicate\n",
        "",
    )


def test_validate_in_json_and_limited(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + BAD)
    assert main(["data", "validate", str(path), "--json", "--max-errors", "1"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["bad"], found["shapes"]) == (3, 2, {"messages": 1})
    assert found["errors"] == [
        {
            "source": str(path),
            "line": 2,
            "field": "completion",
            "reason": "missing; the row has 'prompt'",
        }
    ]
    assert main(["data", "validate", str(path), "--max-errors", "1"]) == 3
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1:] == ["and 1 more"]
    assert main(["data", "validate", str(path), "--kind", "nonsense"]) == 2
    assert main(["data", "validate", str(tmp_path / "no.jsonl")]) == 3


def test_from_a_table_to_training_rows_and_back(tmp_path: Path, capsys: Capture) -> None:
    table = tmp_path / "a.csv"
    table.write_bytes('question,output\r\n007,"größe\n😀"\r\n"a,b",c\r\n'.encode())
    assert main(["data", "convert", str(table), str(tmp_path / "b.jsonl"), "--prompt-field", "question"]) == 0
    assert capsys.readouterr().out == f"ok: {tmp_path / 'b.jsonl'}, 2 rows\n"
    expected = '{"prompt": "007", "completion": "größe\\n😀"}\n{"prompt": "a,b", "completion": "c"}\n'
    assert (tmp_path / "b.jsonl").read_text(encoding="utf-8") == expected
    for source, out, *options in (
        ("b.jsonl", "c.parquet", "--to-shape", "teacher"),
        ("c.parquet", "d.csv", "--to-shape", "messages"),
        ("d.csv", "e.jsonl", "--to-shape", "prompt", "--dedup"),
    ):
        assert main(["data", "convert", str(tmp_path / source), str(tmp_path / out), *options]) == 0
    assert (tmp_path / "e.jsonl").read_text(encoding="utf-8") == expected
    assert main(["data", "convert", str(table), str(tmp_path / "e.jsonl")]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["data", "convert", str(table), str(tmp_path / "f.jsonl")]) == 3
    error = capsys.readouterr().err
    assert f"error: {table}:2: field 'prompt': missing; the row has 'question', 'output'" in error


def test_export_and_what_it_left_out(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "tree.jsonl"
    rows = [
        {"message_id": "a", "parent_id": None, "role": "prompter", "text": "q", "lang": "en"},
        {
            "message_id": "b",
            "parent_id": "a",
            "role": "assistant",
            "text": "worse",
            "rank": 1.0,
            "lang": "en",
        },
        {
            "message_id": "c",
            "parent_id": "a",
            "role": "assistant",
            "text": "better",
            "rank": 0.0,
            "lang": "en",
        },
        {
            "message_id": "d",
            "parent_id": "a",
            "role": "assistant",
            "text": "gone",
            "deleted": True,
            "lang": "en",
        },
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    assert main(["data", "export", str(path), "--split", "train[:100%]", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"ok: {out}, 1 conversation from 4 rows; deleted: 1\n"
    assert json.loads(out.read_text())["messages"][1]["content"] == "better"
    assert main(["data", "validate", str(out)]) == 0
    again = ["data", "export", str(path), "--out", str(out), "--force", "--json"]
    capsys.readouterr()
    assert main([*again, "--paths", "all", "--messages-key", "conversations"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2
    assert "conversations" in json.loads(out.read_text().splitlines()[0])
    assert main([*again, "--lang", "fr"]) == 3
    assert "error: nothing to export" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 2


def test_stats_and_inspect(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + BAD + GOOD)
    assert main(["data", "stats", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "rows         2\nbad rows     2" in shown
    assert "8 to 15     2     ████" in shown
    assert f"{path}:1  9" in shown
    assert main(["data", "stats", str(path), "--json", "--dedup"]) == 0
    assert json.loads(capsys.readouterr().out)["duplicates"] == 1
    assert main(["data", "inspect", str(path)]) == 0
    assert "── assistant (7 characters)\ngröße 😀" in capsys.readouterr().out
    assert main(["data", "inspect", str(path), "--line", "3", "--json"]) == 3
    (row,) = json.loads(capsys.readouterr().out)
    assert row["error"] == "field 'text': the key occurs twice in one object"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "holds no rows"),
        (b'[{"text": "x"}]\n', "a list, not an object"),
        (b"\xff\xfe{\x00", "not valid UTF-8"),
        (b'\x00\n{"text": "x"}\r\n', ":1: not valid JSON"),
        (b'{"text": "\\ud800"}\n', "lone surrogate"),
    ],
)
def test_faulty_files_end_with_the_datas_exit_code(
    tmp_path: Path, data: bytes, why: str, capsys: Capture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    assert main(["data", "validate", str(path)]) == 3
    captured = capsys.readouterr()
    assert why in captured.out + captured.err
    assert "internal error" not in captured.err
