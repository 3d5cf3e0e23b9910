"""Streamed datasets: slices, exact resume, and what a user reads when something is missing."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tests.servers import http_server

from trainway.data import hub
from trainway.data.hub import stream_rows
from trainway.data.splits import parse_split
from trainway.errors import ConfigError, DataError, EnvironmentFault, UserError

TRAIN = [{"text": f"row {i}", "number": i} for i in range(23)]
TEST = [{"text": f"test {i}", "number": i} for i in range(5)]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    datasets = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three training files and a test file."""
    folder = tmp_path_factory.mktemp("dataset")
    for number, part in enumerate((TRAIN[:7], TRAIN[7:8], TRAIN[8:])):
        (folder / f"train-{number}.jsonl").write_text(lines(part))
    (folder / "test.jsonl").write_text(lines(TEST))
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(URL, directory) of files on the web."""
    with http_server(partial(Quiet, directory=str(tmp_path))) as url:
        yield url, tmp_path


def test_rows_columns_and_features(local: Path) -> None:
    rows = stream_rows(str(local))
    assert rows.columns == ["text", "number"]
    assert rows.features == {"text": "string", "number": "int64"}
    assert list(rows) == TRAIN
    assert list(rows) == []  # one pass
    assert list(stream_rows(str(local), split="test", columns=["number"])) == [
        {"number": i} for i in range(5)
    ]


@pytest.mark.parametrize(
    ("split", "wanted"),
    [
        ("train[:10%]", TRAIN[:2]),
        ("train[90%:]", TRAIN[21:]),
        ("train[3:9]", TRAIN[3:9]),
        ("train[-5:]", TRAIN[-5:]),
        ("train[:-20]", TRAIN[:3]),
        ("train[20:99]", TRAIN[20:]),
        ("train[9:3]", []),
        ("train[:10%]+test[:2]", TRAIN[:2] + TEST[:2]),
        ("test+train[-1:]+test[4:]", TEST + TRAIN[-1:] + TEST[4:]),
        ("train[0.1%:5%]", TRAIN[:1]),
    ],
)
def test_slices(local: Path, split: str, wanted: list[dict[str, Any]]) -> None:
    assert list(stream_rows(str(local), split=split)) == wanted


@pytest.mark.parametrize(
    "split", ["train[5]", "train[:1%", "train[::2]", "", "train+", "train[a:b]", "train[:120%]"]
)
def test_a_split_that_cannot_be(split: str) -> None:
    with pytest.raises(ConfigError, match="split"):
        parse_split(split)


def test_a_percentage_of_parquet_needs_only_its_footers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(TRAIN), tmp_path / "train.parquet", row_group_size=4
    )
    monkeypatch.setattr(hub, "stage", lambda *words: pytest.fail("it counts"))
    assert list(stream_rows(str(tmp_path), split="train[50%:]")) == TRAIN[12:]


@pytest.mark.parametrize("split", ["train", "train[3:17]", "test[1:]+train[40%:]+test"])
@pytest.mark.parametrize("batch", [1, 4, 1000])
def test_resume_is_exact_at_every_row(
    local: Path, monkeypatch: pytest.MonkeyPatch, split: str, batch: int
) -> None:
    monkeypatch.setattr(hub, "BATCH_ROWS", batch)
    whole = list(stream_rows(str(local), split=split))
    rows = stream_rows(str(local), split=split)
    states = [rows.state()]
    for _ in rows:
        states.append(rows.state())
    states.append(rows.state())
    assert len(states) == len(whole) + 2
    for taken, state in enumerate(json.loads(json.dumps(states))):
        again = stream_rows(str(local), split=split, state=state)
        head = list(islice(iter(again), 2))
        tail = list(stream_rows(str(local), split=split, state=json.loads(json.dumps(again.state()))))
        assert head + tail == whole[taken:], taken


def test_resume_with_another_version_of_the_library_skips_the_rows_before(local: Path) -> None:
    rows = stream_rows(str(local), split="train[2:]")
    assert len(list(islice(iter(rows), 11))) == 11
    state = {**rows.state(), "datasets": "0.0.0", "position": {"nothing": "of ours"}}
    assert list(stream_rows(str(local), split="train[2:]", state=state)) == TRAIN[13:]


def test_resume_over_changed_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(lines(TRAIN))
    rows = stream_rows(str(path))
    before = rows.source()
    assert len(list(islice(iter(rows), 11))) == 11
    state = rows.state()
    path.write_text(lines(TRAIN).replace("row 3", "row X"))
    with pytest.raises(DataError, match=r"changed since its rows were last read"):
        next(iter(stream_rows(str(path), state=state)))
    assert stream_rows(str(path)).source() != before
    path.write_text(lines(TRAIN[:5]))
    with pytest.raises(DataError, match=r"changed since its rows were last read"):
        next(iter(stream_rows(str(path), state=state)))


@pytest.mark.parametrize("name", ["in.jsonl", "in.json.gz", "in.parquet", "in.csv", "in.txt"])
def test_a_single_file_on_disk_and_on_the_web(web: tuple[str, Path], name: str) -> None:
    url, folder = web
    path = folder / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TRAIN), path, row_group_size=5)
    elif name.endswith(".csv"):
        path.write_text("text,number\n" + "".join(f"{row['text']},{row['number']}\n" for row in TRAIN))
    elif name.endswith(".txt"):
        path.write_text("".join(f"{row['text']}\n" for row in TRAIN))
    else:
        data = lines(TRAIN).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    wanted = [{"text": row["text"]} for row in TRAIN] if name.endswith(".txt") else TRAIN
    for dataset in (str(path), f"{url}/{name}"):
        if dataset.startswith("http") and name.endswith(".txt"):
            with pytest.raises(DataError, match="plain text is not read from the web"):
                stream_rows(dataset)
            continue
        rows = stream_rows(dataset)
        assert list(islice(iter(rows), 9)) == wanted[:9]
        assert list(stream_rows(dataset, state=rows.state())) == wanted[9:]
        assert rows.source()["files"][0][1] == path.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"split": "trian"}, DataError, "has no split 'trian'\nits splits are: train, test\n"),
        ({"split": "train+dev"}, DataError, "has no split 'dev'"),
        ({"columns": ["txt"]}, DataError, "has no column 'txt'\nits columns are: text, number\n"),
        ({"columns": ["nmber"]}, DataError, "has no column 'nmber'\nits columns are: number, text\n"),
        ({"subset": "en"}, ConfigError, "its subsets are: default"),
        ({"revision": "main"}, ConfigError, "is no dataset of the Hub"),
    ],
)
def test_what_is_missing_is_named(
    local: Path, arguments: dict[str, Any], kind: type[UserError], message: str
) -> None:
    with pytest.raises(kind) as error:
        stream_rows(str(local), **arguments)
    assert message in str(error.value) and error.value.fix


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none was not found"):
        stream_rows(str(tmp_path / "none"))
    (tmp_path / "README.md").write_text("no data")
    with pytest.raises(DataError, match=r"no data was found"):
        stream_rows(str(tmp_path))
    with pytest.raises(DataError, match=r"x.doc is of an unknown kind"):
        stream_rows("http://127.0.0.1:9/x.doc")
    with pytest.raises(DataError, match=r"x.jsonl: no data was found"):
        stream_rows("http://127.0.0.1:9/x.jsonl")


def test_malformed_data_names_the_dataset(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"in.jsonl: cannot be read"):
        list(stream_rows(str(path)))


def test_without_the_library_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'trainway\[hub\]'"):
        stream_rows("owner/name")
