"""The volume: its layout, its room, what is set for the Hub, and that a missing or read-only one is told at once."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from trainway.config.load import load_config
from trainway.errors import EnvironmentFault
from trainway.planning.arithmetic import count_parameters
from trainway.recipes.volume import Volume, check_room, hub_environment, make_folders, token_environment

GIB = 2**30
Usage = namedtuple("Usage", "total used free")


def test_folders_are_made_once(tmp_path: Path) -> None:
    volume = Volume(tmp_path, "e")
    assert make_folders(volume) == 6
    assert make_folders(volume) == 0
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert names == [
        "artifacts", "artifacts/tokenizer", "cache", "cache/e", "datasets", "datasets/train", "datasets/train/e",
        "datasets/val", "datasets/val/e", "hf_cache", "runs", "runs/e",
    ]  # fmt: skip


def test_a_root_that_is_not_there_or_no_directory(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="there is no directory"):
        make_folders(Volume(tmp_path / "none", "e"))
    assert not (tmp_path / "none").exists()
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(EnvironmentFault, match="cannot make"):
        make_folders(Volume(tmp_path, "e"))


def test_a_root_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(
        "tempfile.TemporaryFile", refuse
    )  # the tests may run as root, whom permissions do not stop
    with pytest.raises(EnvironmentFault, match="cannot write"):
        make_folders(Volume(tmp_path, "e"))


def test_room_is_that_of_data_and_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("runpod_1b", environ={}).config
    volume = Volume(tmp_path, "e")
    make_folders(volume)
    checkpoints = 5 * 12 * count_parameters(config.model, 32000).total  # 3 kept, the best, one being written
    needed = checkpoints + int(100 * GIB * 1.7)

    def free(size: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, size))

    free(needed + GIB)
    assert check_room(volume, config, 100 * GIB, shards=True) == pytest.approx(needed, rel=1e-6)
    free(needed - GIB)
    with pytest.raises(EnvironmentFault) as caught:
        check_room(volume, config, 100 * GIB, shards=True)
    assert f"{needed / GIB:,.2f} GiB are needed" in caught.value.what
    check_room(volume, config, 90 * GIB, shards=True)
    check_room(volume, config, 100 * GIB, shards=False)  # they are there
    free(100 * GIB)
    assert check_room(volume, config, 10 * GIB, shards=True, checkpoints=False) == 17 * GIB
    free(needed - GIB)
    with (volume.train_shards / "a").open("wb") as file:
        file.truncate(2 * GIB)
    check_room(volume, config, 100 * GIB, shards=True)  # what is held already is not needed again
    short = load_config("runpod_1b", ["total_steps=10"], environ={}).config
    assert check_room(volume, short, 0, shards=True) == pytest.approx(checkpoints * 2 / 5 - 2 * GIB, rel=1e-6)


def test_the_hub_is_told_of_the_volume_and_the_users_values_win(tmp_path: Path) -> None:
    volume = Volume(tmp_path, "e")
    new, said = hub_environment(volume, {})
    assert new == {
        "HF_HOME": str(tmp_path / "hf_cache"),
        "HF_DATASETS_CACHE": str(tmp_path / "hf_cache" / "datasets"),
    }
    assert said == [f"{name}={value}" for name, value in new.items()]
    new, said = hub_environment(volume, {"HF_HOME": "/mine"})
    assert list(new) == ["HF_DATASETS_CACHE"]
    assert said[-1] == "HF_HOME=/mine is kept as you set it"


@pytest.mark.parametrize("name", ["HUGGINGFACEHUB_API_TOKEN", "HUGGINGFACE_HUB_TOKEN"])
def test_a_token_by_another_name_is_handed_on_and_never_said(name: str) -> None:
    new, said = token_environment({name: "hf_secret"})
    assert new == {"HF_TOKEN": "hf_secret"}
    assert said == [f"HF_TOKEN is taken from {name}"]
    assert token_environment({name: "hf_secret", "HF_TOKEN": "own"}) == ({}, [])
    assert token_environment({}) == ({}, [])
