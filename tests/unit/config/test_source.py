"""Files as they come: bounded, strict, and with the line of every mistake."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from trainway.config.source import MAX_FILE_BYTES, parse_scalar, parse_yaml, read_layers
from trainway.errors import ConfigError


def refused(path: Path, text: str | bytes) -> ConfigError:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        read_layers(path)
    return caught.value


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("seed: 1\nseed: 2\n", "a.yaml:2: 'seed' is set twice"),
        ("train:\n  seq_len: 1\n  seq_len: 1\n", "a.yaml:3: 'seq_len' is set twice"),
        ("seed: .nan\n", "a.yaml:1: nan is not a usable number"),
        ("optim:\n  lr: -.inf\n", "a.yaml:2: -inf is not a usable number"),
        ("optim:\n  betas: [0.9, .NaN]\n", "a.yaml:2: nan is not a usable number"),
        ("a: b: c\n", "a.yaml:1: this is not valid YAML"),
        ("- a\n- b\n", "a.yaml holds no settings"),
        ("just text\n", "a.yaml holds no settings"),
        ("a: !!python/object/apply:os.system [ls]\n", "a.yaml:1"),
        ("seed: !!int x\n", "a.yaml:1"),
        ("? [a]\n: 3\n", "a.yaml:1: a key is not a word"),
        ("b: &b {x: 1}\na:\n  <<: *b\n", "a.yaml:3: merge keys"),
        ("--- \na: 1\n---\nb: 2\n", "a.yaml"),
        ("a: *nothing\n", "a.yaml:1: this is not valid YAML"),
    ],
)
def test_malformed_yaml_is_refused_with_its_line(tmp_path: Path, text: str, what: str) -> None:
    error = refused(tmp_path / "a.yaml", text)
    assert what in error.what
    assert error.fix


def test_bombs_are_bounded(tmp_path: Path) -> None:
    began = time.monotonic()
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    assert "values" in refused(tmp_path / "bomb.yaml", "\n".join(lines)).what
    assert "nested too deeply" in refused(tmp_path / "deep.yaml", "a: " + "[" * 5000 + "]" * 5000).what
    assert "nested too deeply" in refused(tmp_path / "self.yaml", "a: &a [*a]\n").what
    assert "nested too deeply" in refused(tmp_path / "deep.toml", "a = " + "[" * 5000 + "]" * 5000).what
    assert "1 MiB" in refused(tmp_path / "huge.yaml", b"#" * (MAX_FILE_BYTES + 1)).what
    assert "is no number" in refused(tmp_path / "digits.yaml", "seed: " + "9" * 5000).what
    assert time.monotonic() - began < 10


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "not UTF-8" in refused(tmp_path / "a.yaml", b"name: \xff\n").what
    assert "not valid TOML" in refused(tmp_path / "a.toml", "a = 1\na = 2\n").what
    for missing, why in (("no.yaml", "no such file"), (str(tmp_path), "directory")):
        with pytest.raises(ConfigError) as caught:
            read_layers(Path(missing))
        assert why in caught.value.why
    assert "ends in none" in refused(tmp_path / "a.json", "{}").why


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("\ufeff# nothing\n")
    assert read_layers(tmp_path / "a.yaml")[0].settings == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("400_000", 400000),
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("6.0e-4", 6e-4),
        (".5", 0.5),
        ("3.", 3.0),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("[a, 1]", ["a", 1]),
        ("none", "none"),
        ("010", 10),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("a: b: c", "a: b: c"),
        ("'quoted", "'quoted"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, value: object) -> None:
    read = parse_scalar(text)
    assert read == value
    assert type(read) is type(value)


def test_lines_are_those_of_the_keys() -> None:
    settings = parse_yaml("a: 1\n\nb:\n  c:\n    - 2\n  d.e: x\n", "f")
    assert [(s.path, s.value, s.origin) for s in settings] == [
        (("a",), 1, "f:1"),
        (("b", "c"), [2], "f:4"),
        (("b", "d", "e"), "x", "f:6"),
    ]
