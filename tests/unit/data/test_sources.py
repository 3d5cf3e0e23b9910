"""Sources: which files a setting stands for, what a document is, and every malformed record by its reason."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from trainway.config.schema import DataConfig
from trainway.data.sources import BadRecord, Document, find_sources, read_documents
from trainway.errors import DataError
from trainway.files import hash_file

CONFIG = DataConfig()


def names(tmp_path: Path, *patterns: str) -> list[str]:
    sources = find_sources(patterns, CONFIG, setting="data.train", root=tmp_path)
    return [source.path.relative_to(tmp_path).as_posix() for source in sources]


def read(path: Path, config: DataConfig = CONFIG) -> list[tuple[str, int] | str]:
    records = list(read_documents(path, config))
    return [(r.text, r.line) if isinstance(r, Document) else str(r).removeprefix(f"{path}:") for r in records]


def json_file(tmp_path: Path, data: bytes) -> Path:
    (tmp_path / "x.jsonl").write_bytes(data)
    return tmp_path / "x.jsonl"


def test_patterns_are_expanded_in_a_fixed_order(tmp_path: Path) -> None:
    for name in (
        "b.txt",
        "a.jsonl",
        "c.bin",
        ".hidden.txt",
        "d/z.md",
        "d/a.py.gz",
        "d/e/k.ndjson",
        ".git/x.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert names(tmp_path, ".") == ["a.jsonl", "b.txt", "d/a.py.gz", "d/z.md", "d/e/k.ndjson"]
    assert names(tmp_path, "b.txt", "d") == ["b.txt", "d/a.py.gz", "d/z.md", "d/e/k.ndjson"]
    assert names(tmp_path, "*.txt") == ["b.txt"]
    assert names(tmp_path, "*") == ["a.jsonl", "b.txt", "d/a.py.gz", "d/z.md", "d/e/k.ndjson"]
    assert names(tmp_path, "**/*.md") == ["d/z.md"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("dtaa.txt", r"data\.train: .*dtaa\.txt is missing[\s\S]*nearest names: data\.txt"),
        ("no/such.txt", r"the directory .*no is missing too"),
        ("*.nope", r"'\*\.nope' matches nothing"),
        ("*.bin", r"'\*\.bin' matches no file of a known kind"),
        ("bare", r"bare holds no file of a known kind"),
        ("x.bin", r"x\.bin is of an unknown kind[\s\S]*\.jsonl"),
        ("empty.txt", r"empty\.txt: the file is empty"),
        ("found", r"found/e\.jsonl: the file is empty"),
    ],
)
def test_what_is_missing_unknown_or_empty_stops_at_once(tmp_path: Path, pattern: str, message: str) -> None:
    (tmp_path / "data.txt").write_text("x")
    (tmp_path / "x.bin").write_text("x")
    (tmp_path / "bare").mkdir()
    (tmp_path / "found").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "found" / "e.jsonl").touch()
    with pytest.raises(DataError, match=message):
        names(tmp_path, pattern)


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a\.txt is named twice"):
        names(tmp_path, "a.txt", "*.txt")


def test_json_lines_with_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"text": "a\\r\\nb"}\r\n\r\n  \n{"x": {"text": 1}, "text": "\xc3\xa9"}'
    assert read(json_file(tmp_path, data)) == [("a\nb", 1), ("é", 4)]
    assert read(json_file(tmp_path, b'{"body": "x"}'), DataConfig(text_field="body")) == [("x", 1)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "1: not valid JSON: Expecting ',' delimiter at column 13"),
        (b"[1]", "1: the line holds a list, not an object: one JSON object per line is needed"),
        (b'{"text": 3}', "1: field 'text': is a number, not a string"),
        (b'{"text": null}', "1: field 'text': is null, not a string"),
        (
            b'{"txt": "x", "id": 1}',
            "1: field 'text': missing; the record has 'txt', 'id'; did you mean 'txt'?",
        ),
        (b"{}", "1: field 'text': missing; the record has none"),
        (b'{"text": " \\n"}', "1: field 'text': empty"),
        (b'{"text": "a", "text": "b"}', "1: field 'text': the key occurs twice in one object"),
        (b'{"text": "a\\u0000"}', "1: field 'text': holds a NUL character at character 1"),
        (b'{"text": "ab\\ud800"}', "1: field 'text': holds a lone surrogate U+D800 at character 2"),
        (b'{"text": "\xff"}', "1: not valid UTF-8 at byte 10 of the line"),
        (b'{"text": "a", "n": NaN}', "1: not valid JSON: NaN is not a JSON number"),
        (b'{"text": "a", "n": -Infinity}', "1: not valid JSON: -Infinity is not a JSON number"),
        (b'{"text": "a", "n": ' + b"[" * 100_000, "1: JSON nested too deeply"),
        (b'{"text": "' + b"x" * (1 << 20) + b'"}', "1: longer than max_document_mib (1 MiB)"),
    ],
)
def test_each_malformed_record_by_its_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    path = json_file(tmp_path, line + b'\n{"text": "next"}\n')
    assert read(path, DataConfig(max_document_mib=1)) == [reason, ("next", 2)]


def test_an_integer_of_thousands_of_digits_is_a_bad_record(tmp_path: Path) -> None:
    (found,) = read(json_file(tmp_path, b'{"text": "a", "n": ' + b"9" * 5000 + b"}"))
    assert str(found).startswith("1: not valid JSON: Exceeds the limit")


def test_a_line_of_100_mb_is_not_held_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'\n{"text": "next"}\n')
    tracemalloc.start()
    assert read(path, DataConfig(max_document_mib=1)) == [
        "1: longer than max_document_mib (1 MiB)",
        ("next", 2),
    ]
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_units_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n \nthree\nfour")
    assert read(path) == [("one\ntwo\n\n \nthree\nfour", 1)]
    assert read(path, DataConfig(text_unit="paragraph")) == [("one\ntwo", 1), ("three\nfour", 5)]
    assert read(path, DataConfig(text_unit="line")) == [("one", 1), ("two", 2), ("three", 5), ("four", 6)]


def test_malformed_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"ok\n\nb\xff\n\nc\x00d")
    assert read(path) == ["1: not valid UTF-8 at byte 5 of the file"]
    bad = ["3: not valid UTF-8 at byte 1 of the paragraph", "5: holds a NUL character at character 1"]
    assert read(path, DataConfig(text_unit="paragraph")) == [("ok", 1), *bad]
    path.write_bytes(b"x" * (1 << 19) + b"\n" + b"y" * (1 << 19) + b"\n\nshort\n")
    config = DataConfig(max_document_mib=1)
    assert read(path, config) == [
        "1: longer than max_document_mib (1 MiB): set text_unit to paragraph or line"
    ]
    too_long = "1: longer than max_document_mib (1 MiB): set text_unit to line"
    assert read(path, config.model_copy(update={"text_unit": "paragraph"})) == [too_long, ("short", 4)]
    path.write_bytes(b" \n")
    assert read(path) == ["1: empty"]


def test_gzip_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(
        b"".join(json.dumps({"text": os.urandom(50).hex()}).encode() + b"\n" for _ in range(500))
    )
    path.write_bytes(whole)
    assert len(read(path)) == 500
    for damaged in (whole[: len(whole) // 2], whole[:-20] + b"\0" * 20, b"plain text"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz: truncated or corrupt gzip file"):
            read(path)
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match="the file is empty"):
        read(path)


def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    entries = []
    for name, text in (("s1.txt", "a\nb\n"), ("s0.txt", "cc\ndd\n")):
        (folder / name).write_text(text)
        entries.append({"file": name, "lines": 2, "bytes": len(text), "hash": hash_file(folder / name)})
    (folder / "manifest.json").write_text(json.dumps({"shards": entries}))
    return folder


def test_shards_are_read_line_by_line_in_the_manifests_order(tmp_path: Path) -> None:
    sharded(tmp_path)
    sources = find_sources(["shards"], CONFIG, setting="data.train", root=tmp_path)
    assert [(s.path.name, s.text_unit, s.size) for s in sources] == [
        ("s1.txt", "line", 4),
        ("s0.txt", "line", 6),
    ]
    assert [s.hash for s in sources] == [hash_file(s.path) for s in sources]


def change(folder: Path, fault: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    first = manifest["shards"][0]
    match fault:
        case "missing":
            (folder / "s0.txt").unlink()
        case "truncated":
            (folder / "s0.txt").write_text("cc")
        case "empty":
            (folder / "s0.txt").write_text("")
        case "flipped":
            (folder / "s0.txt").write_text("cc\nde\n")
        case "duplicated":
            (folder / "s2.txt").write_text("a\nb\n")
        case "twice":
            manifest["shards"].append(first)
        case "outside":
            first["file"] = "../data.txt"
        case "no hash":
            del first["hash"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"s0\.txt: the shard is missing"),
        ("truncated", r"s0\.txt: the shard was altered\n2 bytes; the manifest says 6"),
        ("empty", r"s0\.txt: the shard was altered\nit is empty"),
        ("flipped", r"s0\.txt: the shard was altered\nits xxh3 hash"),
        ("duplicated", r"s2\.txt: an unknown shard"),
        ("twice", r"s1\.txt is listed twice"),
        ("outside", r"shards\[0\]: '\.\./data\.txt' is not a plain file name"),
        ("no hash", r"shards\[0\]: needs 'file', 'bytes' and 'hash'"),
    ],
)
def test_altered_shards_are_named(tmp_path: Path, fault: str, message: str) -> None:
    change(sharded(tmp_path), fault)
    with pytest.raises(DataError, match=message):
        names(tmp_path, "shards")


def test_swapped_shards_are_noticed(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / "s0.txt").rename(folder / "t")
    (folder / "s1.txt").rename(folder / "s0.txt")
    (folder / "t").rename(folder / "s1.txt")
    with pytest.raises(DataError, match="the shard was altered"):
        names(tmp_path, "shards")


def test_a_manifest_without_shards_is_data(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert names(tmp_path, ".") == ["manifest.json"]


def test_bad_record_prints_file_line_and_field() -> None:
    assert str(BadRecord(Path("a.jsonl"), 7, "text", "empty")) == "a.jsonl:7: field 'text': empty"
