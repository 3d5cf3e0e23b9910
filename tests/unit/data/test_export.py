"""Export: message trees become conversations, thinking is kept, and an export of nothing is an error."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainway.data.export import export
from trainway.data.records import FieldNames
from trainway.data.trees import conversations, is_tree
from trainway.errors import ConfigError, DataError

READY = "ready_for_export"


def message(
    name: str, parent: str | None, role: str, rank: float | None = None, **fields: Any
) -> dict[str, Any]:
    return {
        "message_id": name,
        "parent_id": parent,
        "text": f"text of {name}",
        "role": role,
        "lang": "en",
        "deleted": False,
        "rank": rank,
        "synthetic": False,
        "message_tree_id": name[0],
        "tree_state": READY,
        **fields,
    }


def tree() -> list[dict[str, Any]]:
    """Tree a, answers before their parents; tree d in German; e not ready; f without an answer; g cut off."""
    return [
        message("a2", "a", "assistant", 1.0),
        message("a", None, "prompter"),
        message("a1", "a", "assistant", 0.0),
        message("a3", "a", "assistant", None),
        message("a12", "a1", "prompter", 1.0),
        message("a13", "a1", "prompter", 2.0),
        message("a11", "a1", "prompter", 0.0),
        message("a111", "a11", "assistant", 0.0, deleted=True),
        message("a112", "a11", "assistant", 1.0, text="größe 😀"),
        message("a1112", "a111", "prompter", 0.0),
        message("a1121", "a112", "prompter", 0.0),
        message("d", None, "prompter", lang="de"),
        message("d1", "d", "assistant", 0.0, lang="de"),
        message("e", None, "prompter", tree_state="growing"),
        message("e1", "e", "assistant", 0.0, tree_state="growing"),
        message("f", None, "prompter"),
        message("g1", "g", "assistant", 0.0),
        message("h", None, "prompter", text="  "),
    ]


def directory(tmp_path: Path, rows: list[dict[str, Any]], **splits: list[dict[str, Any]]) -> Path:
    folder = tmp_path / "dataset" / "data"
    folder.mkdir(parents=True)
    for name, part in {"train": rows, **splits}.items():
        pq.write_table(pa.Table.from_pylist(part), folder / f"{name}-00000-of-00001.parquet")
    return folder.parent


def exported(source: Path, **options: Any) -> list[dict[str, Any]]:
    out = source.parent / "out.jsonl"
    export(str(source), out, force=True, **options)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def names(path: list[dict[str, str]]) -> str:
    return " ".join(turn["content"].removeprefix("text of ") for turn in path)


def test_the_best_path_of_each_tree() -> None:
    skipped: Counter[str] = Counter()
    found = list(conversations(tree(), skipped=skipped))
    assert found[0] == {
        "messages": [
            {"role": "user", "content": "text of a"},
            {"role": "assistant", "content": "text of a1"},
            {"role": "user", "content": "text of a11"},
            {"role": "assistant", "content": "größe 😀"},
        ],
        "lang": "en",
        "message_tree_id": "a",
    }
    assert [names(row["messages"]) for row in found[1:]] == ["d d1"]
    assert skipped == {
        "deleted": 1,
        "tree not ready": 2,
        "tree without an answer": 1,
        "parent left out or not among the rows": 2,  # a1112, g1
        "empty": 1,
    }


def test_all_paths_of_each_tree() -> None:
    found = list(conversations(tree(), paths="all", skipped=Counter()))
    assert [names(row["messages"]) for row in found] == ["a a1 a11 größe 😀", "a a1", "a a2", "a a3", "d d1"]


def test_one_language() -> None:
    skipped: Counter[str] = Counter()
    found = list(conversations(tree(), lang="DE", skipped=skipped))
    assert [names(row["messages"]) for row in found] == ["d d1"]
    assert skipped["other language"] == 13


def test_a_tree_deeper_than_the_stack() -> None:
    rows = [message("0", None, "prompter")]
    for depth in range(1, 5000):
        rows.append(message(str(depth), str(depth - 1), "assistant" if depth % 2 else "prompter", 0.0))
    (found,) = conversations(rows, skipped=Counter())
    assert len(found["messages"]) == 5000


def test_a_tree_of_messages_from_a_directory(tmp_path: Path) -> None:
    folder = directory(
        tmp_path, tree(), validation=[message("v", None, "prompter"), message("w", "v", "assistant")]
    )
    assert [names(row["messages"]) for row in exported(folder)] == ["a a1 a11 größe 😀", "d d1"]
    assert [
        names(row["conversations"]) for row in exported(folder, messages_key="conversations", lang="de")
    ] == ["d d1"]
    assert [names(row["messages"]) for row in exported(folder, split="validation")] == ["v w"]
    assert [names(row["messages"]) for row in exported(folder, split="train[:3]", paths="all")] == [
        "a a1",
        "a a2",
    ]
    done = export(str(folder), tmp_path / "x.jsonl")
    assert (done.layout, done.read, done.rows, done.left_out["tree not ready"]) == ("tree", 18, 2, 2)


@pytest.mark.parametrize("name", ["tree.parquet", "tree.jsonl"])
def test_a_tree_of_messages_from_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(tree()), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in tree()))
    assert [names(row["messages"]) for row in exported(path)] == ["a a1 a11 größe 😀", "d d1"]


def test_what_is_a_tree() -> None:
    assert is_tree(tree()[0])
    assert not is_tree(["messages", "text", "role"])


THINKING = [
    {
        "reasoning_language": language,
        "developer": "Be brief.",
        "user": "q",
        "analysis": "hm",
        "final": "ä",
        "messages": [
            {"content": f"reasoning language: {language}", "role": "system", "thinking": None},
            {"content": "q", "role": "user", "thinking": None},
            {"content": "ä", "role": "assistant", "thinking": "hm\nso"},
        ],
    }
    for language in ("French", "German", "French", "English") * 25
]


def test_thinking_is_kept(tmp_path: Path) -> None:
    folder = directory(tmp_path, THINKING)
    rows = exported(folder, split="train[:2%]")
    assert rows == [
        {
            "reasoning_language": language,
            "developer": "Be brief.",
            "user": "q",
            "analysis": "hm",
            "final": "ä",
            "messages": [
                {"role": "system", "content": f"reasoning language: {language}"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "ä", "thinking": "hm\nso"},
            ],
        }
        for language in ("French", "German")
    ]
    assert '"ä"' in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert len(exported(folder, lang="french")) == 50
    assert len(exported(folder, split="train[10:20]+train[-5:]")) == 15


def test_other_shapes_and_fields_by_name(tmp_path: Path) -> None:
    folder = directory(tmp_path, [{"question": "q", "output": "a", "n": 1}])
    with pytest.raises(DataError, match=r"missing; the row has 'question', 'output', 'n'"):
        exported(folder)
    rows = exported(folder, names=FieldNames().named(prompt="question"))
    assert rows == [{"prompt": "q", "completion": "a", "n": 1}]


def test_a_dataset_of_no_known_columns_names_those_that_exist(tmp_path: Path) -> None:
    rows = [{"message_id": "a", "parent_id": "b", "body": "x", "role": "prompter"}]
    folder = directory(tmp_path, rows)
    with pytest.raises(DataError, match=r"its columns are: message_id, parent_id, body, role"):
        exported(folder)
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(DataError, match=r"--lang needs a column of lang, language"):
        exported(folder, lang="en")


def test_an_export_of_nothing_is_an_error(tmp_path: Path) -> None:
    folder = directory(tmp_path, tree())
    with pytest.raises(DataError, match="nothing to export") as caught:
        exported(folder, lang="xx")
    assert "18 rows of" in caught.value.why and "other language: 15" in caught.value.why
    with pytest.raises(DataError, match="nothing to export"):
        exported(folder, split="train[:0]")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_bad_row_by_its_number(tmp_path: Path) -> None:
    folder = directory(tmp_path, [{"text": "a"}, {"text": ""}, {"text": "c"}])
    with pytest.raises(DataError, match=r"train:2: field 'text': empty"):
        exported(folder)
    aside = tmp_path / "bad.jsonl"
    assert exported(folder, quarantine=aside) == [{"text": "a"}, {"text": "c"}]
    assert json.loads(aside.read_text())["line"] == 2
    with pytest.raises(DataError, match=r"left out: malformed: 1"):
        exported(folder, split="train[1:2]", quarantine=aside)
    assert json.loads(aside.read_text())["line"] == 1  # of the slice
    assert not (tmp_path / "out.jsonl.tmp").exists()


def test_slices_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": str(number)}) + "\n" for number in range(200)))

    def texts(split: str) -> list[int]:
        return [int(row["text"]) for row in exported(path, split=split)]

    assert texts("train[:1%]") == [0, 1]
    assert texts("train[100:103]+train[-1:]") == [100, 101, 102, 199]
    assert texts("train[99%:]") == [198, 199]
    with pytest.raises(DataError, match="has no split 'test'"):
        texts("test")


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n')
    with pytest.raises(ConfigError, match="would replace the data"):
        export(str(path), path, force=True)
    with pytest.raises(ConfigError, match=r"an export is JSON lines[\s\S]*data convert"):
        export(str(path), tmp_path / "out.parquet")
