"""The sharder: what each mode writes, what the manifest says, what is refused, and that its readers accept it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from trainway.config.schema import DataConfig, RunConfig, ShardConfig, TokenizerConfig
from trainway.data.prepare import prepare
from trainway.data.shard import ShardReport, shard, shard_settings
from trainway.data.shard_writer import json_string
from trainway.data.sources import Document, find_sources, read_documents
from trainway.errors import ConfigError, DataError, Stopped
from trainway.files import hash_file

TEXTS = [f"document {i} with some words, naïve\tand “quoted” \\ {'x' * (i % 7)}" for i in range(25)]


def source(folder: Path, texts: list[str] = TEXTS, name: str = "in.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(folder: Path, **settings: Any) -> ShardReport:
    values = {"inputs": (str(folder / "in.jsonl"),), "out": str(folder / "out"), "lines_per_shard": 10}
    return shard(shard_settings({**values, **settings}))


def manifest(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return value


def read_back(folder: Path) -> list[str]:
    """The documents as `prepare` reads them."""
    config = DataConfig()
    records = [
        record
        for item in find_sources([str(folder)], config, setting="data.train")
        for record in read_documents(item.path, config, text_unit=item.text_unit)
    ]
    assert all(isinstance(record, Document) for record in records)
    return [record.text for record in records if isinstance(record, Document)]


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_prod_writes_every_document_as_a_line(tmp_path: Path) -> None:
    source(tmp_path)
    report = run(tmp_path)
    out = tmp_path / "out"
    assert visible(out) == ["manifest.json", "shard-00000.txt", "shard-00001.txt", "shard-00002.txt"]
    lines = [path.read_text().splitlines(keepends=True) for path in sorted(out.glob("shard-*"))]
    assert [len(part) for part in lines] == [10, 10, 5]
    assert [line for part in lines for line in part] == [text + "\n" for text in TEXTS]
    found = manifest(out)
    assert found["complete"] is True
    assert found["shards"] == [
        {"file": path.name, "lines": count, "bytes": path.stat().st_size, "hash": hash_file(path)}
        for path, count in zip(sorted(out.glob("shard-*")), [10, 10, 5], strict=True)
    ]
    size = sum(len(text.encode()) + 1 for text in TEXTS)
    totals = {"shards": 3, "lines": 25, "bytes": size, "text_bytes": size, "line_breaks_replaced": 0}
    assert found["totals"] == totals == report.train
    assert (report.validation, report.quarantined, report.resumed_lines, report.cached) == (None, 0, 0, False)
    assert read_back(out) == TEXTS


def test_exactly_full_shards_leave_no_empty_one(tmp_path: Path) -> None:
    source(tmp_path, TEXTS[:20])
    assert run(tmp_path).train["shards"] == 2
    assert visible(tmp_path / "out") == ["manifest.json", "shard-00000.txt", "shard-00001.txt"]


@pytest.mark.parametrize(("take", "lines"), [(12, 12), (10, 10), (99, 25)])
def test_smoke_takes_the_first_documents(tmp_path: Path, take: int, lines: int) -> None:
    source(tmp_path)
    report = run(tmp_path, mode="smoke", take=take)
    assert report.train["lines"] == lines
    assert read_back(tmp_path / "out") == TEXTS[:lines]


def test_smoke_does_not_read_beyond_its_sample(tmp_path: Path) -> None:
    path = source(tmp_path, TEXTS[:3])
    path.write_text(path.read_text() + "not JSON\n")
    assert run(tmp_path, mode="smoke", take=3).train["lines"] == 3


def test_split_is_decided_by_seed_and_text_alone(tmp_path: Path) -> None:
    texts = [*TEXTS * 4, *(f"other {i}" for i in range(100))]
    source(tmp_path, texts)
    report = run(tmp_path, mode="split", val_ratio=0.3, seed=7)

    def held_out(text: str) -> bool:
        return bool(xxhash.xxh3_64_intdigest(text.encode(), 7) < int(0.3 * 2**64))

    train, val = read_back(tmp_path / "out"), read_back(tmp_path / "out-val")
    assert train == [text for text in texts if not held_out(text)]
    assert val == [text for text in texts if held_out(text)]
    assert len(val) > 20 and not set(train) & set(val)
    assert (report.val_out, report.validation) == (
        tmp_path / "out-val",
        manifest(tmp_path / "out-val")["totals"],
    )
    assert manifest(tmp_path / "out-val")["complete"] is True


def test_split_agrees_with_what_prepare_holds_out(tmp_path: Path) -> None:
    texts = [f"text number {i} of some length" for i in range(300)]
    path = source(tmp_path, texts)
    run(tmp_path, mode="split", val_ratio=0.2, seed=3)
    data = DataConfig(train=(str(path),), val_ratio=0.2, store_dir=str(tmp_path / "cache"))
    stored = prepare(RunConfig(seed=3, data=data, tokenizer=TokenizerConfig(vocab_size=300)))
    assert stored.manifest.splits["val"]["documents"] == len(read_back(tmp_path / "out-val"))


@pytest.mark.parametrize(("out", "val"), [("train", "val"), ("corpus", "corpus-val")])
def test_the_validation_directory_is_a_sibling(tmp_path: Path, out: str, val: str) -> None:
    source(tmp_path)
    assert run(tmp_path, out=str(tmp_path / out), mode="split", val_ratio=0.5).val_out == tmp_path / val


def test_the_validation_directory_may_be_named(tmp_path: Path) -> None:
    source(tmp_path)
    run(tmp_path, mode="split", val_ratio=0.5, val_out=str(tmp_path / "elsewhere"))
    assert read_back(tmp_path / "elsewhere")


def test_a_document_becomes_one_line(tmp_path: Path) -> None:
    texts = ["a\nb", "\n\nkept  inside\n", "c\r\nd\re\n\nf", "\ufeffmark", "g\u2028h\x0ci"]
    source(tmp_path, texts)
    report = run(tmp_path)
    shown = (tmp_path / "out/shard-00000.txt").read_bytes().decode()
    assert shown == "a b\nkept  inside\nc d e  f\nmark\ng\u2028h\x0ci\n"
    assert (
        report.train["line_breaks_replaced"]
        == manifest(tmp_path / "out")["totals"]["line_breaks_replaced"]
        == 5
    )


def test_jsonl_loses_nothing(tmp_path: Path) -> None:
    texts = [*TEXTS, "a\nb\r", "\ufeffmark", '\u2028 \x01 \x7f \t \\ " é 𝄞']
    source(tmp_path, texts)
    run(tmp_path, format="jsonl")
    lines = [
        line
        for path in sorted((tmp_path / "out").glob("shard-*.jsonl"))
        for line in path.read_text().split("\n")[:-1]
    ]
    assert [json.loads(line) for line in lines] == [{"text": text} for text in texts]
    assert "é" in lines[-1]  # unescaped
    assert read_back(tmp_path / "out") == texts


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_json_strings_are_those_of_the_json_module(text: str) -> None:
    assert json_string(text, text.encode()) == json.dumps(text, ensure_ascii=False).encode()


def test_the_slow_side_of_a_split_is_gzipped_in_members(tmp_path: Path) -> None:
    texts = [f"text {i} " + "words " * (i % 30) for i in range(200)]
    source(tmp_path, texts)
    run(tmp_path, mode="split", val_ratio=0.1, seed=1, gzip=True)
    train, val = read_back(tmp_path / "out"), read_back(tmp_path / "out-val")
    assert sorted(train + val) == sorted(texts)
    assert [text for text in texts if text in val] == val and len(val) > 10
    packed = (tmp_path / "out-val/shard-00000.txt.gz").read_bytes()
    assert packed.count(bytes.fromhex("1f8b080000000000")) > 2  # one for each training shard


@pytest.mark.parametrize("style", ["text", "jsonl"])
def test_gzip_shards_depend_on_the_text_alone(tmp_path: Path, style: str) -> None:
    source(tmp_path)
    run(tmp_path, gzip=True, format=style, out=str(tmp_path / "a"))
    run(tmp_path, gzip=True, format=style, out=str(tmp_path / "b"))
    run(tmp_path, format=style, out=str(tmp_path / "plain"))
    for packed, plain in zip(
        sorted((tmp_path / "a").glob("*.gz")), sorted((tmp_path / "plain").glob("s*")), strict=True
    ):
        data = packed.read_bytes()
        assert data == (tmp_path / "b" / packed.name).read_bytes()
        assert data[:4] == b"\x1f\x8b\x08\x00" and data[4:8] == bytes(4)  # neither name nor time
        assert gzip.decompress(data) == plain.read_bytes()
    assert manifest(tmp_path / "a")["totals"]["text_bytes"] == manifest(tmp_path / "plain")["totals"]["bytes"]
    assert read_back(tmp_path / "a") == TEXTS


def test_sources_of_every_kind_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    source(folder, ["one", "two"], "1.jsonl")
    (folder / "2.txt").write_text("three\nthree\n\nfour\n")
    with gzip.open(folder / "3.jsonl.gz", "wt") as file:
        file.write('{"text": "five"}\n')
    run(tmp_path, inputs=(str(folder),), text_unit="paragraph")
    assert read_back(tmp_path / "out") == ["one", "two", "three three", "four", "five"]


def test_a_named_field(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"content": "a", "text": 1}\n')
    run(tmp_path, text_field="content", format="jsonl")
    assert (tmp_path / "out/shard-00000.jsonl").read_text() == '{"text": "a"}\n'


def test_shards_can_be_sharded_again(tmp_path: Path) -> None:
    source(tmp_path)
    run(tmp_path, gzip=True)
    run(tmp_path, inputs=(str(tmp_path / "out"),), out=str(tmp_path / "again"), lines_per_shard=7)
    assert read_back(tmp_path / "again") == TEXTS


def test_a_malformed_record_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = source(tmp_path, TEXTS[:12])
    path.write_text(path.read_text() + '{"txet": "a"}\n' + '{"text": "z"}\n')
    with pytest.raises(DataError) as error:
        run(tmp_path)
    assert f"{path}:13: field 'text': missing; the record has 'txet'; did you mean 'txet'?" in str(
        error.value
    )
    assert "1 complete shards are in" in error.value.why
    found = manifest(tmp_path / "out")
    assert (found["complete"], found["totals"]["lines"]) == (False, 10)
    assert visible(tmp_path / "out") == ["manifest.json", "shard-00000.txt"]
    # and it goes on past it, without doing anything twice
    report = run(tmp_path, on_bad_record="quarantine")
    assert (report.resumed_lines, report.train["lines"], report.quarantined) == (10, 13, 1)


def test_malformed_records_are_set_aside_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\nnope\n{"text": 5}\n{"text": "b"}\n')
    report = run(tmp_path, on_bad_record="quarantine", lines_per_shard=1)
    assert report.quarantined == 3 and read_back(tmp_path / "out") == ["a", "b"]
    listed = (tmp_path / "out/quarantine.jsonl").read_bytes()
    assert [(json.loads(line)["line"], json.loads(line)["field"]) for line in listed.splitlines()] == [
        (2, "text"), (3, ""), (4, "text"),
    ]  # fmt: skip
    assert manifest(tmp_path / "out")["quarantine"] == {
        "file": "quarantine.jsonl",
        "records": 3,
        "bytes": len(listed),
        "hash": xxhash.xxh3_128_hexdigest(listed),
    }
    with pytest.raises(ConfigError, match="on-bad-record is error"):
        run(tmp_path, lines_per_shard=1)


def test_a_lone_byte_order_mark_is_an_empty_document(tmp_path: Path) -> None:
    source(tmp_path, ["a", "\ufeff \u2003", "b"])
    assert run(tmp_path, on_bad_record="quarantine").quarantined == 1
    assert (tmp_path / "out/shard-00000.txt").read_text() == "a\nb\n"


def test_no_document_is_an_error_each_time(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n\n")
    for _ in range(2):
        with pytest.raises(DataError, match="there is no document"):
            run(tmp_path)


def test_a_complete_directory_is_verified_and_nothing_is_written(tmp_path: Path) -> None:
    source(tmp_path)
    first = run(tmp_path, mode="split", val_ratio=0.3)
    times = {
        path: path.stat().st_mtime_ns
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    again = run(tmp_path, mode="split", val_ratio=0.3)
    assert again.cached and (again.train, again.validation) == (first.train, first.validation)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    (tmp_path / "out-val/shard-00000.txt").write_text("altered\n")
    with pytest.raises(DataError, match=r"out-val/shard-00000\.txt: the shard was altered"):
        run(tmp_path, mode="split", val_ratio=0.3)


def stop_after(shards: int, folder: Path, **settings: Any) -> None:
    """Interrupt a run once that many shards are complete and some documents more are taken."""
    calls = iter(range(10**9))

    def stop() -> bool:
        path = folder / "out/manifest.json"
        return len(manifest(path.parent)["shards"]) >= shards and next(calls) > 3

    values = {"inputs": (str(folder / "in.jsonl"),), "out": str(folder / "out"), "lines_per_shard": 10}
    with pytest.raises(Stopped, match=f"stopped: {shards} complete shards are in"):
        shard(ShardConfig.model_validate({**values, **settings}), stop=stop)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    source(tmp_path)
    stop_after(1, tmp_path)
    before = visible(tmp_path / "out")
    with pytest.raises(ConfigError, match="gzip was False, and is True; lines_per_shard was 10, and is 5"):
        run(tmp_path, lines_per_shard=5, gzip=True)
    assert visible(tmp_path / "out") == before


def test_before_the_first_shard_settings_may_change(tmp_path: Path) -> None:
    source(tmp_path)
    stop_after(0, tmp_path, format="jsonl", mode="split", val_ratio=0.2)
    run(tmp_path)
    assert read_back(tmp_path / "out") == TEXTS


def test_a_changed_source_is_refused_by_name(tmp_path: Path) -> None:
    path = source(tmp_path)
    stop_after(1, tmp_path)
    text = path.read_text()
    path.write_text(text.replace("document 24", "document 42"))
    with pytest.raises(DataError, match=r"in\.jsonl has another content"):
        run(tmp_path)
    path.write_text(text + "\n")
    with pytest.raises(DataError, match=rf"had {len(text)} bytes, and has {len(text) + 1}"):
        run(tmp_path)
    path.write_text(text)
    other = source(tmp_path, ["z"], "more.jsonl")
    with pytest.raises(DataError, match="it had 1 files, and has 2"):
        run(tmp_path, inputs=(str(path), str(other)))
    run(tmp_path)
    assert read_back(tmp_path / "out") == TEXTS


def test_an_unfinished_directory_can_be_used(tmp_path: Path) -> None:
    source(tmp_path)
    stop_after(2, tmp_path)
    assert read_back(tmp_path / "out") == TEXTS[:20]
    assert not list((tmp_path / "out").glob(".*partial"))


def test_a_damaged_shard_is_named_on_resume_and_left_alone(tmp_path: Path) -> None:
    source(tmp_path)
    stop_after(2, tmp_path)
    path = tmp_path / "out/shard-00001.txt"
    data = path.read_bytes()
    path.write_bytes(data[:-2] + b"!\n")
    with pytest.raises(DataError, match=r"shard-00001\.txt: the shard was altered"):
        run(tmp_path)
    path.write_bytes(data)
    run(tmp_path)
    assert read_back(tmp_path / "out") == TEXTS


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_shard_in_hand_is_named_on_resume(tmp_path: Path, damage: str) -> None:
    source(tmp_path, [f"text {i}" for i in range(200)])
    settings = {"mode": "split", "val_ratio": 0.1}
    stop_after(5, tmp_path, **settings)
    resume = manifest(tmp_path / "out")["resume"]["validation"]["tail"]
    (path,) = (tmp_path / "out-val").glob(".shard-*.partial")
    data = path.read_bytes()
    assert len(data) == resume["bytes"] > 0
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "cut" else b"#" + data[1:])
    with pytest.raises(DataError, match=r"shard-0000\d.* is damaged"):
        run(tmp_path, **settings)
    path.write_bytes(data)
    assert run(tmp_path, **settings).resumed_lines > 50


def test_the_log_says_once_that_line_breaks_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source(tmp_path, [f"a\nb{i}" for i in range(40)])
    run(tmp_path)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "warning: line breaks inside documents become spaces: --format jsonl keeps them"
    ]


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    source(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "shard-00000.txt").write_text("mine\n")
    with pytest.raises(ConfigError, match=r"out is not empty\nit holds shard-00000.txt"):
        run(tmp_path)
    (out / "manifest.json").write_text('{"shards": []}')
    with pytest.raises(DataError, match="was not written by the sharder"):
        run(tmp_path)
    assert (out / "shard-00000.txt").read_text() == "mine\n"


def test_the_validation_directory_of_another_sharding_is_left_alone(tmp_path: Path) -> None:
    source(tmp_path)
    run(tmp_path, mode="split", val_ratio=0.3, out=str(tmp_path / "first"))
    stop_after(0, tmp_path, mode="split", val_ratio=0.2)
    kept = (tmp_path / "first-val/shard-00000.txt").read_bytes()
    with pytest.raises(ConfigError, match="first-val is not empty"):
        run(tmp_path, mode="split", val_ratio=0.2, val_out=str(tmp_path / "first-val"))
    stop_after(1, tmp_path, mode="split", val_ratio=0.2)
    with pytest.raises(ConfigError, match="belongs to another sharding"):
        run(tmp_path, mode="split", val_ratio=0.2, val_out=str(tmp_path / "first-val"))
    assert (tmp_path / "first-val/shard-00000.txt").read_bytes() == kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inputs": ()}, "there is no source"),
        ({"dataset": "owner/name"}, "there are two sources"),
        ({"take": 5}, "--take would be ignored\nonly mode smoke takes a sample"),
        ({"val_ratio": 0.1}, "--val-ratio would be ignored"),
        ({"val_out": "x"}, "--val-out would be ignored"),
        ({"seed": 1}, "--seed would be ignored"),
        ({"split": "test"}, "--split would be ignored"),
        ({"mode": "split", "val_ratio": 1.0}, "--val-ratio is 1.0\nit must be less than 1"),
        ({"mode": "prd"}, "--mode is 'prd'\nit must be 'smoke', 'prod' or 'split'"),
        ({"lines_per_shard": 0}, "--lines-per-shard is 0\nit must be greater than 0"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    source(tmp_path)
    with pytest.raises(ConfigError) as error:
        run(tmp_path, **settings)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_source_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"in.jsonl is missing"):
        run(tmp_path)
    with pytest.raises(DataError, match="was not found"):
        run(tmp_path, inputs=(), dataset=str(tmp_path / "none"))
    assert not (tmp_path / "out").exists()


def test_directories_inside_each_other_are_refused(tmp_path: Path) -> None:
    source(tmp_path)
    for settings in (
        {"inputs": (str(tmp_path),)},
        {"mode": "split", "val_out": str(tmp_path / "out/val")},
        {"mode": "split", "val_out": str(tmp_path / "out")},
    ):
        with pytest.raises(ConfigError, match="lie inside each other"):
            run(tmp_path, **settings)
    (tmp_path / "out").mkdir()
    source(tmp_path / "out")
    with pytest.raises(ConfigError, match="is in the directory that is written to"):
        run(tmp_path, inputs=(str(tmp_path / "o*/*.jsonl"),))


def test_the_help_states_the_defaults_of_the_schema() -> None:
    import inspect

    from trainway.cli.data_shard import shard as verb

    stated = {
        name: parameter.annotation
        for name, parameter in inspect.signature(verb).parameters.items()
        if name in ShardConfig.model_fields
    }
    for name in ("mode", "split", "text_field", "text_unit", "lines_per_shard", "take", "val_ratio", "seed",
                 "format", "on_bad_record"):  # fmt: skip
        assert f"[{ShardConfig.model_fields[name].default}]" in str(stated[name]), name
