"""Secrets are found wherever they stand, told by file, line and kind, and never repeated."""

from __future__ import annotations

import base64
import json
import urllib.parse
from pathlib import Path

import pytest

from trainway.errors import DataError
from trainway.release import secrets
from trainway.release.secrets import Scanner, Secret, known_secrets, refuse_secrets, scan

LETTERS = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7"
SAMPLES = {
    "a token of the Hugging Face Hub": f"hf_{LETTERS}",
    "a token of GitHub": f"ghp_{LETTERS}abcdef",
    "a token of GitLab": f"glpat-{LETTERS}",
    "an API key (sk-)": f"sk-proj-{LETTERS}",
    "a key of RunPod": f"rpa_{LETTERS}",
    "a key of Weights & Biases": f"wandb_v1_{LETTERS}",
    "a token of Slack": f"xoxb-{LETTERS}",
    "a key of Amazon": "AKIA" + "ABCD2345EFGH6789",
    "a key of Google": f"AIza{LETTERS}{LETTERS}"[:39],
    "a token of a package index": f"pypi-{LETTERS}{LETTERS}",
    "a signed token (JWT)": f"eyJ{LETTERS}.eyJ{LETTERS}.{LETTERS}",
    "a private key": "-----BEGIN OPENSSH PRIVATE" + " KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA",
    "a login in an address": "https://ada:pa55word@example.org/data",
}
HARMLESS = (
    "hf_ is how tokens of the Hub begin, hf_token is a name",
    "sk-learn-estimator-html-doc-link-with-a-long-class-name",
    "task-" + LETTERS + " disk-0123456789ABCDEFGHIJKLMN",
    "-----BEGIN PRIVATE KEY-----\n(private key in base64 encoding)",
    "https://huggingface.co/ada/model and git@example.org:ada/model",
    "0123456789abcdef0123456789abcdef01234567",
)


def found(tmp_path: Path, content: bytes, known: dict[str, str] | None = None) -> list[Secret]:
    (tmp_path / "file").write_bytes(content)
    return scan(tmp_path, ["file"], Scanner(known or {}))


@pytest.mark.parametrize("kind", secrets.KINDS)
def test_each_kind_is_found_by_its_line_and_not_repeated(tmp_path: Path, kind: str) -> None:
    sample = SAMPLES[kind]
    told = found(tmp_path, f"first\nsecond {sample} rest\n".encode())
    assert told == [Secret("file", "line 2", kind)]
    with pytest.raises(DataError) as caught:
        refuse_secrets(told)
    assert caught.value.what == f"1 secret would leave with the release: file (line 2): {kind}"
    assert sample[:12] not in str(caught.value)
    # in JSON, too
    assert [one.kind for one in found(tmp_path, json.dumps({"a": sample}).encode())] == [kind]


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_alike_passes(tmp_path: Path, text: str) -> None:
    assert found(tmp_path, text.encode()) == []


def test_a_secret_across_two_blocks_and_one_among_weights_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "BLOCK", 1000)
    monkeypatch.setattr(secrets, "OVERLAP", 200)
    token = SAMPLES["a token of the Hugging Face Hub"]
    for at in (980, 999, 1000, 1001, 1999, 3456):
        text = b"\n" * at + token.encode() + b"\n" * 2000
        assert found(tmp_path, text) == [Secret("file", f"line {at + 1}", "a token of the Hugging Face Hub")]
        weights = bytes(at) + b"\xff" + token.encode() + bytes(3000)
        assert found(tmp_path, weights) == [
            Secret("file", f"byte {at + 1}", "a token of the Hugging Face Hub")
        ]


def test_a_value_of_this_machine_is_found_in_every_way_of_writing_it(tmp_path: Path) -> None:
    value = 'p@ss "wörd"/+=\\1'
    forms = [
        value, json.dumps(value), json.dumps(value, ensure_ascii=False), urllib.parse.quote(value, safe=""),
        base64.b64encode(value.encode()).decode(),
    ]  # fmt: skip
    for form in forms:
        told = found(tmp_path, f"x: {form}\n".encode(), {"the value of DB_PASSWORD": value})
        assert [(one.place, one.kind) for one in told] == [("line 1", "the value of DB_PASSWORD")], form
    assert found(tmp_path, b"hunter2hunter2x", {"it": "hunter2hunter2"}) == []  # part of a longer word
    assert len(found(tmp_path, b"a hunter2hunter2, b", {"it": "hunter2hunter2"})) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "hf\\_{}"),
        ("README.md", "hf&#95;{}"),
        ("report.html", "hf&lowbar;{}"),
        ("report.html", r"<script>{{\"a\": \"hf\u005f{}\"}}</script>"),
    ],
)
def test_a_secret_that_a_page_writes_otherwise_is_found(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text("\n" + text.format(LETTERS))
    assert scan(tmp_path, [name], Scanner({})) == [Secret(name, "line 2", "a token of the Hugging Face Hub")]


def test_a_name_of_a_file_is_looked_at_too(tmp_path: Path) -> None:
    name = SAMPLES["a key of RunPod"]
    (tmp_path / name).write_text("")
    assert scan(tmp_path, [name], Scanner({})) == [Secret("a file", "its name", "a key of RunPod")]


def test_what_this_machine_keeps_secret(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_of_the_login_file\n")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password abcdef0123456789\n")
    environ = {
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "WANDB_API_KEY": "0123456789abcdef",
        "AWS_SECRET_ACCESS_KEY": "secret/of+amazon",
        "MY_TOKEN": "short",
        "DB_PASSWORD_FILE": "/run/secrets/db-password",
        "MAX_TOKENS": "123456789",
        "TOKENIZERS_PARALLELISM": "false-and-long",
        "PATH": "/usr/local/bin:/usr/bin",
    }
    assert known_secrets(environ, tmp_path) == {
        "the value of WANDB_API_KEY": "0123456789abcdef",
        "the value of AWS_SECRET_ACCESS_KEY": "secret/of+amazon",
        "the login of the Hugging Face Hub": "hf_of_the_login_file",
        "the password of api.wandb.ai in .netrc": "abcdef0123456789",
    }
