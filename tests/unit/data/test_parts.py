"""Preparation spread over workers: the merged store is the unsplit one, and every wrong part is named."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import shutil
import signal
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.data.test_prepare import TEXTS, settings, write_corpus

from trainway.config.schema import RunConfig, SourceConfig, TokenizerConfig
from trainway.data import building, parts
from trainway.data.parts import PreparedPart, content_difference, resolve_index, split_files
from trainway.data.prepare import PreparedData, merge_parts, prepare, prepare_as_asked
from trainway.data.tokenizer import train_tokenizer
from trainway.errors import ConfigError, DataError

BAD = '{"text": 7}\nnot json\n'


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parts") / "bundle"
    train_tokenizer(TEXTS, TokenizerConfig(vocab_size=400), path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four training files, one of them zipped and one with bad records, and two for validation."""
    write_corpus(tmp_path / "a.jsonl", TEXTS[:90])
    write_corpus(tmp_path / "b.jsonl", TEXTS[90:130])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "b.jsonl").read_bytes()))
    (tmp_path / "b.jsonl").unlink()
    write_corpus(tmp_path / "c.jsonl", TEXTS[130:200])
    with (tmp_path / "c.jsonl").open("a") as file:
        file.write(BAD)
    (tmp_path / "d.txt").write_text("\n".join(TEXTS[200:260]))
    write_corpus(tmp_path / "v1.jsonl", TEXTS[260:280])
    write_corpus(tmp_path / "v2.jsonl", TEXTS[280:])
    return tmp_path


CASES: dict[str, dict[str, Any]] = {
    "plain": {"train": ("a.jsonl", "b.jsonl.gz", "c.jsonl", "d.txt"), "text_unit": "line"},
    "mix": {
        "train": (
            SourceConfig(path="[ab].jsonl*", weight=1, name="ab"),
            SourceConfig(path="gone", weight=1, optional=True),
            SourceConfig(path="c.jsonl", weight=0.5),
            SourceConfig(path="d.txt", weight=3),
        ),
        "text_unit": "line",
    },
    "validation": {"train": ("a.jsonl", "c.jsonl"), "validation": ("v1.jsonl", "v2.jsonl")},
}


def configure(case: str, bundle: Path | None, root: Path, **data: Any) -> RunConfig:
    return settings(root, bundle, **{**CASES[case], "on_bad_record": "quarantine", **data})


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def make_parts(config: RunConfig, root: Path, num_workers: int) -> list[Path]:
    made = [prepare(config, num_workers=num_workers, worker_index=i, root=root) for i in range(num_workers)]
    return [part.store_dir for part in made]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trained", [False, True])
def test_the_merged_store_is_the_unsplit_one(root: Path, bundle: Path, case: str, trained: bool) -> None:
    tokenizer = None if trained else bundle
    whole = prepare(configure(case, tokenizer, root, store_dir="whole"), root=root)
    assert whole.manifest.quarantined == 2
    for num_workers in (1, 2, 3):
        config = configure(case, tokenizer, root, store_dir=f"split-{num_workers}")
        for index in reversed(range(num_workers)):  # in any order
            part = prepare(config, num_workers=num_workers, worker_index=index, root=root)
            assert not part.cached
            assert part.store_dir.name == f"part-{index}-of-{num_workers}"
        assert prepare(config, num_workers=num_workers, worker_index=0, root=root).cached
        merged = merge_parts(config, num_workers, root=root)
        assert content(merged.store_dir) == content(whole.store_dir)
        assert (merged.store_dir.name, merged.mix) == (whole.store_dir.name, whole.mix)
        assert not list(root.glob(f"split-{num_workers}/*.parts/part-*/*"))
        # afterwards everything finds the store
        assert prepare(config, root=root).cached
        assert merge_parts(config, num_workers, root=root).cached
        late = prepare(config, num_workers=num_workers, worker_index=0, root=root)
        assert (late.store_dir, late.cached) == (merged.store_dir, True)


def test_another_mix_of_the_same_sources_is_found_prepared(root: Path, bundle: Path) -> None:
    first = prepare(configure("mix", bundle, root), root=root)
    sources = tuple(
        source.model_copy(update={"weight": None, "epochs": 2.0, "name": f"n{i}"})
        for i, source in enumerate(CASES["mix"]["train"])
    )
    second = prepare(configure("mix", bundle, root, train=sources), root=root)
    assert second.cached
    assert first.mix is not None
    assert second.mix is not None
    assert (first.mix.names, second.mix.names) == (("ab", "c.jsonl", "d.txt"), ("n0", "n2", "n3"))
    assert second.rows_per_epoch(512) == sum(2 * rows for rows in second.mix.rows)
    assert (first.absent, second.absent) == (("gone",), ("n1",))
    assert [stream["name"] for stream in first.manifest.streams] == ["ab", "c.jsonl", "d.txt"]
    total = first.manifest.splits["train"]
    for key in ("tokens", "documents", "text_bytes"):
        assert sum(stream[key] for stream in first.manifest.streams) == total[key] > 0


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 9))
def test_files_are_split_as_evenly_as_their_order_allows(sizes: list[int], num_parts: int) -> None:
    if num_parts > len(sizes):
        with pytest.raises(ConfigError, match="trainway data shard"):
            split_files(sizes, num_parts)
        return
    ranges = split_files(sizes, num_parts)
    assert [place for part in ranges for place in part] == list(range(len(sizes)))
    assert len(ranges) == num_parts
    assert all(ranges)
    best = min(
        max(sum(sizes[i:j]) for i, j in zip((0, *cuts), (*cuts, len(sizes)), strict=True))
        for cuts in combinations(range(1, len(sizes)), num_parts - 1)
    )
    assert max(sum(sizes[place] for place in part) for part in ranges) == best


def test_missing_parts_are_named(root: Path, bundle: Path) -> None:
    config = configure("plain", bundle, root)
    prepare(config, num_workers=3, worker_index=1, root=root)
    with pytest.raises(DataError) as raised:
        merge_parts(config, 3, root=root)
    assert raised.value.what.endswith("part-0-of-3: the part is missing")
    assert raised.value.why == "worker 0 has not made it; so are the parts of workers 2"
    assert raised.value.fix == "run: trainway prepare CONFIG --num-workers 3 --worker-index 0"
    assert raised.value.code == 3


def test_parts_of_other_settings_are_refused_with_the_difference(root: Path, bundle: Path) -> None:
    made = make_parts(configure("plain", bundle, root), root, 2)
    other = configure("plain", bundle, root, val_ratio=0.2)
    with pytest.raises(
        DataError, match=r"part-0-of-2: the part is missing[\s\S]*split: \[0.1, 42\] -> \[0.2, 42\]"
    ):
        merge_parts(other, 2, root=root)
    (new,) = make_parts(other, root, 2)[:1]
    shutil.rmtree(new)
    shutil.copytree(made[0], new)
    with pytest.raises(
        DataError, match=r"made from other data or settings\nsplit: \[0.1, 42\] -> \[0.2, 42\]"
    ):
        merge_parts(other, 2, root=root)


def test_parts_of_other_data_are_refused_with_the_difference(root: Path, bundle: Path) -> None:
    config = configure("plain", bundle, root)
    make_parts(config, root, 2)
    size = (root / "a.jsonl").stat().st_size
    (root / "a.jsonl").write_text((root / "a.jsonl").read_text().replace("Document 5:", "Document V:"))
    with pytest.raises(DataError, match=rf"train file 0: {size} bytes with hash \w+ -> {size} bytes"):
        merge_parts(config, 2, root=root)


def test_parts_in_each_others_places_are_refused(root: Path, bundle: Path) -> None:
    config = configure("plain", bundle, root)
    first, second = make_parts(config, root, 2)
    first.rename(first.with_name("x"))
    second.rename(first)
    first.with_name("x").rename(second)
    with pytest.raises(DataError, match=r"part-0-of-2 holds other files than worker 0 of 2 prepares"):
        merge_parts(config, 2, root=root)


def test_another_tokenizer_is_refused(root: Path, bundle: Path) -> None:
    config = configure("plain", None, root)
    first, _ = make_parts(config, root, 2)
    shutil.rmtree(first)
    shared = first.with_name("tokenizer")
    shutil.rmtree(shared)
    shutil.copytree(bundle, shared)
    prepare(config, num_workers=2, worker_index=0, root=root)
    with pytest.raises(DataError, match=r"tokenizer is another tokenizer than that of part 0"):
        merge_parts(config, 2, root=root)


def test_a_flipped_byte_is_named(root: Path, bundle: Path) -> None:
    config = configure("mix", bundle, root)
    made = make_parts(config, root, 2)
    files = [file for part in made for file in sorted(part.rglob("*")) if file.is_file()]
    assert {file.name for file in files} >= {"part.json", "quarantine.jsonl", "train.1-00000.bin"}
    for file in files:
        data = file.read_bytes()
        file.write_bytes(
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        )
        index = made.index(next(part for part in made if file.is_relative_to(part)))
        with pytest.raises(DataError) as raised:
            merge_parts(config, 2, root=root)
        assert str(file) in raised.value.what
        assert f"trainway prepare CONFIG --num-workers 2 --worker-index {index}" in raised.value.fix
        with pytest.raises(DataError, match=file.name):  # the worker does not take it for done either
            prepare(config, num_workers=2, worker_index=index, root=root)
        file.write_bytes(data)
    assert not merge_parts(config, 2, root=root).cached


def test_bad_records_end_the_worker_that_meets_them(root: Path, bundle: Path) -> None:
    config = configure("plain", bundle, root, on_bad_record="error")
    assert prepare(config, num_workers=4, worker_index=0, root=root).summary.startswith(
        "part 0 of 4: 1 files, 90 "
    )
    with pytest.raises(DataError, match=r"2 malformed records[\s\S]*bad-records-2-of-4\.jsonl lists all"):
        prepare(config, num_workers=4, worker_index=2, root=root)
    assert not list((root / "cache").glob("*.parts/part-2-of-4*[!k]"))


def _work(config: RunConfig, root: Path, index: int, results: Any) -> None:
    results.put((index, prepare(config, num_workers=2, worker_index=index, root=root).cached))


def test_workers_at_once_share_the_tokenizer_and_do_no_part_twice(root: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    config = configure("plain", None, root)
    processes = [context.Process(target=_work, args=(config, root, index, results)) for index in (0, 1, 1)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert found == [(0, False), (1, False), (1, True)]
    whole = prepare(configure("plain", None, root, store_dir="whole"), root=root)
    assert content(merge_parts(config, 2, root=root).store_dir) == content(whole.store_dir)


def _slow_work(config: RunConfig, root: Path) -> None:
    def stay(*_: Any) -> None:
        (root / "reached").touch()
        time.sleep(60)

    parts.finish_store = stay  # type: ignore[assignment]
    prepare(config, num_workers=2, worker_index=0, root=root)


def test_a_killed_worker_leaves_nothing_half(root: Path, bundle: Path) -> None:
    config = configure("plain", bundle, root)
    process = multiprocessing.get_context("spawn").Process(target=_slow_work, args=(config, root))
    process.start()
    deadline = time.monotonic() + 60
    while not (root / "reached").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (stale,) = (root / "cache").glob("*.parts/part-0-of-2.tmp-*")
    assert (stale / "part.json").exists()
    with pytest.raises(DataError, match=r"part-0-of-2: the part is missing"):
        merge_parts(config, 2, root=root)
    assert not prepare(config, num_workers=2, worker_index=0, root=root).cached
    assert not stale.exists()
    prepare(config, num_workers=2, worker_index=1, root=root)
    whole = prepare(configure("plain", bundle, root, store_dir="whole"), root=root)
    assert content(merge_parts(config, 2, root=root).store_dir) == content(whole.store_dir)


def test_a_failed_merge_leaves_no_store(root: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure("plain", bundle, root)
    made = make_parts(config, root, 2)

    def failing(*_: Any) -> None:
        raise RuntimeError("on the way")

    monkeypatch.setattr(parts, "check_documents", failing)
    with pytest.raises(RuntimeError, match="on the way"):
        merge_parts(config, 2, root=root)
    assert all(part.exists() for part in made)
    assert not list((root / "cache").glob("*.tmp-*"))
    monkeypatch.undo()
    assert not merge_parts(config, 2, root=root).cached


@pytest.mark.parametrize(
    ("index", "environ", "expected"),
    [
        (2, {}, 2),
        ("auto", {"JOB_COMPLETION_INDEX": "1"}, 1),
        ("auto", {}, "JOB_COMPLETION_INDEX is not set"),
        ("auto", {"JOB_COMPLETION_INDEX": "x"}, "JOB_COMPLETION_INDEX is 'x'"),
        ("auto", {"JOB_COMPLETION_INDEX": "3"}, "3 is not one of 3 workers"),
        (-1, {}, "-1 is not one of 3 workers"),
    ],
)
def test_the_index_of_a_worker(index: Any, environ: dict[str, str], expected: int | str) -> None:
    if isinstance(expected, int):
        assert resolve_index(index, 3, environ) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            resolve_index(index, 3, environ)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": True}, "--num-workers is not given"),
        ({"num_workers": 2}, "needs both its index and the number"),
        ({"worker_index": "auto"}, "needs both its index and the number"),
        ({"num_workers": 2, "worker_index": "first"}, "'first'"),
        ({"num_workers": 2, "worker_index": "2"}, "2 is not one of 2 workers"),
    ],
)
def test_options_that_do_not_go_together(
    root: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(root)
    given = {"num_workers": None, "worker_index": None, "merge": False, **options}
    with pytest.raises(ConfigError, match=message):
        prepare_as_asked(configure("plain", bundle, root), **given)


def _last_merges(root: Path, index: int, results: Any) -> None:
    os.chdir(root)
    config = configure("plain", None, root)
    done = prepare_as_asked(config, num_workers=3, worker_index=str(index), merge=True)
    results.put((index, isinstance(done, PreparedData)))


def test_of_workers_at_once_the_last_one_merges(root: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_last_merges, args=(root, index, results)) for index in range(3)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert any(found.values())
    whole = prepare(configure("plain", None, root, store_dir="whole"), root=root)
    (merged,) = (root / "cache").glob(whole.store_dir.name)
    assert content(merged) == content(whole.store_dir)
    assert not list((root / "cache").glob("*.parts/part-*/"))


def test_a_worker_that_was_killed_merges_when_it_is_started_again(
    root: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    config = configure("plain", bundle, root)

    def work(index: int) -> PreparedData | PreparedPart:
        return prepare_as_asked(config, num_workers=2, worker_index=str(index), merge=True)

    process = multiprocessing.get_context("spawn").Process(target=_slow_work, args=(config, root))
    process.start()
    deadline = time.monotonic() + 60
    while not (root / "reached").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    assert isinstance(work(1), PreparedPart)  # the part of the killed worker is missing
    done = work(0)
    assert isinstance(done, PreparedData)
    whole = prepare(configure("plain", bundle, root, store_dir="whole"), root=root)
    assert content(done.store_dir) == content(whole.store_dir)
    late = work(1)  # and again, after all is done
    assert isinstance(late, PreparedPart) and late.store_dir == done.store_dir


def test_content_difference_names_what_changed() -> None:
    old = {"format": 1, "sources": {"train": [["text", "file", 5, "aa"], ["json", "file", 6, "bb"]]}}
    new = {"format": 1, "sources": {"train": [["text", "file", 5, "aa"]]}, "streams": [1]}
    assert content_difference(old, new) == [
        "train file 1: 6 bytes with hash bb -> absent",
        "streams: None -> [1]",
    ]
    assert content_difference(old, json.loads(json.dumps(old))) == []


def test_a_source_of_a_mix_without_documents_is_named(root: Path, bundle: Path) -> None:
    write_corpus(root / "one.jsonl", ["a single document that is held out for validation"])
    sources = (SourceConfig(path="a.jsonl", weight=1), SourceConfig(path="one.jsonl", name="one", weight=1))
    config = next(
        config
        for config in (
            configure("plain", bundle, root, train=sources).model_copy(update={"seed": seed})
            for seed in range(99)
        )
        if building.HeldOut(config)(b"a single document that is held out for validation")
    )
    with pytest.raises(DataError, match="the source one has no training document"):
        prepare(config, root=root)
    make_parts(config, root, 2)
    with pytest.raises(DataError, match="the source one has no training document"):
        merge_parts(config, 2, root=root)


def test_duplicates_are_left_out_by_one_worker_only(root: Path, bundle: Path) -> None:
    write_corpus(root / "a.jsonl", TEXTS[:90] + TEXTS[:40])
    whole = prepare(configure("plain", bundle, root, dedup=True, store_dir="whole"), root=root)
    assert whole.manifest.duplicates > 30
    config = configure("plain", bundle, root, dedup=True)
    make_parts(config, root, 1)
    assert content(merge_parts(config, 1, root=root).store_dir) == content(whole.store_dir)
    fresh = configure("plain", bundle, root, dedup=True, store_dir="fresh")
    with pytest.raises(ConfigError, match=r"data\.dedup cannot be spread over 2 workers"):
        make_parts(fresh, root, 2)
    with pytest.raises(ConfigError, match=r"data\.dedup cannot be spread over 2 workers"):
        merge_parts(fresh, 2, root=root)
