"""`trainway bootstrap`: a key made once, a clone that follows its remote, data that is named when it is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.pod.bootstrap import bootstrap

pytestmark = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None or shutil.which("git") is None, reason="needs git and ssh-keygen"
)
EVIL = "my $(touch x);'\" repo"


def git(*words: str | Path) -> str:
    names = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    done = subprocess.run(["git", *names, *map(str, words)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    path = tmp_path / "training.git"
    git("init", "-q", path)
    commit(path, "one")
    return path


def commit(remote: Path, text: str) -> str:
    (remote / "file").write_text(text)
    git("-C", remote, "add", ".")
    git("-C", remote, "commit", "-q", "-m", text)
    return git("-C", remote, "rev-parse", "HEAD")


def test_a_second_run_changes_nothing_and_a_new_commit_is_fetched(remote: Path, tmp_path: Path) -> None:
    home, place = tmp_path / "home", tmp_path / EVIL
    first = bootstrap(str(remote), directory=place, home=home)
    key = home / ".ssh" / "id_ed25519"
    assert key.stat().st_mode & 0o077 == 0
    assert first.public_key.startswith("ssh-ed25519 AAAA")
    assert first.key_made and len(first.changed) == 2
    private = key.read_bytes()

    again = bootstrap(str(remote), directory=place, home=home)
    assert (again.changed, again.key_made, again.commit) == ([], False, first.commit)
    assert key.read_bytes() == private
    assert again.public_key == first.public_key

    newer = commit(remote, "two")
    assert bootstrap(str(remote), directory=place, home=home).commit == newer
    assert (place / "file").read_text() == "two"
    assert bootstrap(str(remote), directory=place, home=home, ref=first.commit).commit == first.commit
    assert bootstrap(str(remote), directory=place, home=home, ref="main").commit == newer
    assert not (tmp_path / "x").exists() and not Path("x").exists()


def test_the_next_command_survives_a_shell(remote: Path, tmp_path: Path) -> None:
    ready = bootstrap(str(remote), directory=tmp_path / EVIL, home=tmp_path)
    said = subprocess.run(
        ["sh", "-c", ready.next.replace("trainway doctor", "pwd")], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == str(tmp_path / EVIL)


def test_missing_data_is_named_and_nothing_is_made_in_its_place(remote: Path, tmp_path: Path) -> None:
    place = tmp_path / "clone"
    with pytest.raises(DataError, match=r"missing: data/a\.jsonl, data/b\n"):
        bootstrap(
            str(remote),
            directory=place,
            home=tmp_path,
            data=[Path("file"), Path("data/a.jsonl"), Path("data/b")],
        )
    assert not (place / "data").exists()
    assert bootstrap(str(remote), directory=place, home=tmp_path, data=[Path("file")]).changed == []


def test_what_is_there_is_not_overwritten(remote: Path, tmp_path: Path) -> None:
    place = tmp_path / "clone"
    place.mkdir()
    (place / "mine").touch()
    with pytest.raises(ConfigError, match="no clone"):
        bootstrap(str(remote), directory=place, home=tmp_path)
    other = tmp_path / "other.git"
    git("clone", "-q", remote, other)
    bootstrap(str(remote), directory=tmp_path / "two", home=tmp_path)
    with pytest.raises(ConfigError, match="is a clone of"):
        bootstrap(str(other), directory=tmp_path / "two", home=tmp_path)
    (tmp_path / "two" / "file").write_text("mine")
    commit(remote, "two")
    with pytest.raises(EnvironmentFault, match=r"merge .* failed"):
        bootstrap(str(remote), directory=tmp_path / "two", home=tmp_path)
    assert (tmp_path / "two" / "file").read_text() == "mine"


@pytest.mark.parametrize("repo", ["--upload-pack=touch x", "ext::sh -c touch% x"])
def test_an_address_is_no_command(repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, EnvironmentFault)):
        bootstrap(repo, directory=tmp_path / "clone", home=tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.endswith("x")]


def test_a_run_that_could_not_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(
        "recipe: pretrain\nrun_dir: runs/r\ndata:\n  train: [nowhere.jsonl]\ntrain:\n  total_steps: 5\n"
    )
    with pytest.raises(EnvironmentFault, match=r"nowhere\.jsonl"):
        bootstrap(config="run.yaml", home=tmp_path, environ={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert not (tmp_path / "runs").exists()
