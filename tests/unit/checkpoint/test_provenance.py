"""Provenance says where a run comes from and keeps secrets out."""

import json
import subprocess
import time

import pytest

from trainway.provenance import collect_provenance, config_hash

HF = "hf_" + "aB3" * 11


def test_config_hash_ignores_the_order_of_keys():
    assert config_hash({"a": 1, "b": {"c": [1, 2], "d": None}}) == config_hash(
        {"b": {"d": None, "c": (1, 2)}, "a": 1}
    )
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert len(config_hash({})) == 32
    with pytest.raises(ValueError):
        config_hash({"a": float("nan")})


def test_collected_values():
    found = collect_provenance("c", "d", ["trainway", "train", f"--hf-token={HF}"])
    assert json.loads(json.dumps(found)) == found
    assert (found["config_hash"], found["data_hash"]) == ("c", "d")
    assert found["argv"] == ["trainway", "train", "--hf-token=***"]
    assert found["versions"]["torch"] and found["versions"]["python"]
    assert found["cpu"]["cores"] >= 1 and found["cpu"]["model"]
    assert found["started"].endswith("+00:00")


def test_git_state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert collect_provenance("", "", [])["git"]["project"] is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "f").write_text("1")
    for command in (["init", "-q"], ["add", "f"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    state = collect_provenance("", "", [])["git"]["project"]
    assert len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "f").write_text("2")
    assert collect_provenance("", "", [])["git"]["project"]["dirty"] is True


def test_no_git_and_a_hanging_git(tmp_path, monkeypatch):
    monkeypatch.setattr("trainway.provenance.GIT_TIMEOUT_S", 0.2)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert collect_provenance("", "", [])["git"] == {"trainway": None, "project": None}
    (tmp_path / "git").write_text("#!/bin/sh\nexec /bin/sleep 30\n")
    (tmp_path / "git").chmod(0o755)
    begun = time.monotonic()
    assert collect_provenance("", "", [])["git"] == {"trainway": None, "project": None}
    assert time.monotonic() - begun < 5
