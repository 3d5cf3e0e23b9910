"""`.env` files: what is read, what is refused with its line, and that nothing is expanded, run or printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainway.errors import ConfigError
from trainway.launch.dotenv import apply_dotenv, read_dotenv


def read(tmp_path: Path, text: str) -> dict[str, str]:
    path = tmp_path / ".env"
    path.write_bytes(text.encode())
    return read_dotenv(path)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A=plain", "plain"),
        ("export A=plain", "plain"),
        ("  export   A=plain  ", "plain"),
        ("A=", ""),
        ("A= # nothing", ""),
        ("A=x # a comment", "x"),
        ("A=x#y", "x#y"),
        ("A='one two # three'", "one two # three"),
        ('A="one two"  # a comment', "one two"),
        (r'A="tab\t line\n \"quoted\" back\\slash \d"', 'tab\t line\n "quoted" back\\slash \\d'),
        (r"A='no \n escapes'", r"no \n escapes"),
        ("A=$HOME", "$HOME"),
        ("A=`id`", "`id`"),
        ('A="$(touch pwned)"', "$(touch pwned)"),
        ("A=key=value==", "key=value=="),
        ("A=ünïcode", "ünïcode"),
    ],
)
def test_values(tmp_path: Path, line: str, value: str) -> None:
    assert read(tmp_path, f"# first\n\n{line}\nB=2\n") == {"A": value, "B": "2"}
    assert not (tmp_path / "pwned").exists()


def test_a_later_line_wins_and_windows_files_are_read(tmp_path: Path) -> None:
    assert read(tmp_path, "\ufeffA=1\r\nB='x'\r\nA=2\r\n") == {"A": "2", "B": "x"}


@pytest.mark.parametrize(
    "line",
    [
        "A",
        "A =1-secret",
        "=1-secret",
        "1A=1-secret",
        "a-b=1-secret",
        "A='1-secret",
        'A="1-secret',
        "A='x' 1-secret",
        "A=x 1-secret",
        "A=it's-secret",
        "rm -rf secret",
        "A=1-secret\0",
        "LD_PRELOAD=secret.so",
        "PYTHONPATH=secret",
        "PATH=secret",
    ],
)
def test_a_malformed_line_is_named_by_its_number_and_its_value_kept_secret(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f"GOOD=1\n{line}\n")
    assert f"{tmp_path / '.env'}:2" in caught.value.what
    assert "secret" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_dotenv(tmp_path / "none")
    (tmp_path / "latin").write_bytes(b"A=\xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 2"):
        read_dotenv(tmp_path / "latin")


def test_the_real_environment_wins() -> None:
    environ = {"A": "real", "EMPTY": ""}
    assert apply_dotenv({"A": "file", "B": "file", "EMPTY": "file"}, environ) == ["B"]
    assert environ == {"A": "real", "B": "file", "EMPTY": ""}
