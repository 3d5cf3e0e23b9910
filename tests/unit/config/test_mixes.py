"""Sources with fields of their own: read, written, checked, and every fault named by its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainway.config.load import config_difference, dump_config, fingerprint, load_config
from trainway.config.mixes import is_mix, source_name, train_sources
from trainway.config.resolved import flat_config
from trainway.config.schema import RunConfig, SourceConfig
from trainway.errors import ConfigError

LENGTH = "train: {total_steps: 200}\n"


def load(tmp_path: Path, text: str, *overrides: str, suffix: str = "yaml") -> RunConfig:
    path = tmp_path / f"run.{suffix}"
    path.write_text(text)
    return load_config(path, overrides, environ={}).config


def refused(tmp_path: Path, train: str) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, f"{LENGTH}data:\n  train: {train}\n")
    return raised.value


BOOKS = SourceConfig(path="books/*.txt", name="books", weight=2)
NOTES = SourceConfig(path="notes.jsonl", weight=0.5, optional=True)


def test_yaml_toml_and_the_command_line_say_the_same(tmp_path: Path) -> None:
    yaml = """
data:
  train:
    - {path: "books/*.txt", name: books, weight: 2}
    - path: notes.jsonl
      weight: 0.5
      optional: yes
"""
    toml = """
[train]
total_steps = 200
[[data.train]]
path = "books/*.txt"
name = "books"
weight = 2
[[data.train]]
path = "notes.jsonl"
weight = 0.5
optional = true
"""
    words = "data.train=[{path: books/*.txt, name: books, weight: 2}, {path: notes.jsonl, weight: .5, optional: true}]"
    for config in (
        load(tmp_path, LENGTH + yaml),
        load(tmp_path, toml, suffix="toml"),
        load(tmp_path, LENGTH, words),
        load(tmp_path, LENGTH, "--data.train", words.removeprefix("data.train=")),
    ):
        assert config.data.train == (BOOKS, NOTES)
    assert is_mix(config.data)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("data.train=[{path: a, epochs: 2}, b.txt]", (SourceConfig(path="a", epochs=2), "b.txt")),
        ("data.train={path: a, weight: 2}", (SourceConfig(path="a", weight=2),)),
        ("train_file=a.txt,b 2.txt", ("a.txt", "b 2.txt")),
        ("data.train=2024,true", ("2024", "true")),
    ],
)
def test_the_command_line(tmp_path: Path, written: str, expected: tuple[Any, ...]) -> None:
    assert load(tmp_path, LENGTH, written).data.train == expected


def test_a_written_mix_is_read_again(tmp_path: Path) -> None:
    config = load(
        tmp_path, LENGTH, "data.train=[{path: a, epochs: 2, name: x}, b.txt, {path: c, optional: true}]"
    )
    text = dump_config(config)
    (tmp_path / "again.yaml").write_text(text)
    again = load_config(tmp_path / "again.yaml", environ={}).config
    assert again == config
    assert "null" not in text.partition("train:")[2].partition("validation:")[0]
    assert flat_config(config)["data.train"] == [
        {"path": "a", "name": "x", "epochs": 2.0},
        "b.txt",
        {"path": "c", "optional": True},
    ]


def test_what_a_resumed_run_may_change(tmp_path: Path) -> None:
    def difference(train: str) -> list[str]:
        old = load(tmp_path, LENGTH, "data.train=[{path: a, weight: 2}, {path: b, weight: 1}]")
        return config_difference(fingerprint(old), fingerprint(load(tmp_path, LENGTH, f"data.train={train}")))

    assert difference("[{path: a, weight: 2, name: x}, {path: b, weight: 1, optional: true}]") == []
    (changed,) = difference("[{path: a, weight: 3}, {path: b, weight: 1}]")
    assert changed.startswith("data.train: ")
    assert "'weight': 3.0" in changed


def test_strings_are_sources_too(tmp_path: Path) -> None:
    data = load(tmp_path, LENGTH, "data.train=[a.txt, {path: b, name: c}]").data
    assert train_sources(data) == (SourceConfig(path="a.txt"), SourceConfig(path="b", name="c"))
    assert [source_name(source) for source in train_sources(data)] == ["a.txt", "c"]
    assert not is_mix(data)


@pytest.mark.parametrize(
    ("train", "what", "rest"),
    [
        (
            "[a, {path: b, wieght: 1}]",
            "there is no setting 'data.train[1].wieght'",
            "a source has path, name, weight, epochs, optional\ndid you mean data.train[1].weight?",
        ),
        ("[{path: b, zzz: 1}]", "there is no setting 'data.train[0].zzz'", "take it out"),
        ("[{path: a, weight: 0}]", "data.train[0].weight is 0", "it must be greater than 0"),
        ("[{path: a, weight: big}]", "data.train[0].weight is 'big'", "it must be "),
        ("[{path: a, weight: true}]", "data.train[0].weight is true", "it is not a switch"),
        ("[{weight: 1}]", "data.train[0] has no path", "file, directory or pattern"),
        ("[a, 3]", "data.train[1] is 3", "a source is a path"),
        ("{path: a}", "there is no setting 'data.train.path'", "data.train is a list of sources"),
        (
            "[{path: a, weight: 1}, b]",
            "data.train[1] (b) has no weight, but others have one",
            "{path: b, weight: 1}",
        ),
        ("[{path: a, weight: 1, epochs: 1}]", "data.train[0] has both weight and epochs", "only epochs"),
        (
            "[{path: a, weight: 1}, {path: b, epochs: 1}]",
            "data.train: some sources have a weight",
            "only epochs",
        ),
        (
            "[{path: a, name: x}, {path: b, name: x}]",
            "data.train[1] and [0] are both called 'x'",
            "name: OTHER",
        ),
        ("[a, {path: b, name: a}]", "data.train[1] and [0] are both called 'a'", "path: b, name: OTHER"),
    ],
)
def test_what_is_wrong_is_named_by_file_line_and_place(
    tmp_path: Path, train: str, what: str, rest: str
) -> None:
    error = refused(tmp_path, train)
    assert error.what == f"{tmp_path}/run.yaml:3: {what}" or error.what.startswith(
        f"{tmp_path}/run.yaml:3: {what}"
    )
    assert rest in f"{error.why}\n{error.fix}"


def test_two_faults_are_both_named(tmp_path: Path) -> None:
    error = refused(tmp_path, "[{path: a, weight: -1}, {path: b, weight: x}]")
    assert error.what == "2 settings are wrong"
    assert "data.train[0].weight is -1" in error.why
    assert "data.train[1].weight is 'x'" in error.why
