"""What a tracker is told: no secret of the configuration or the environment, names as configured."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainway.errors import DataError
from trainway.run_dir import RunDir
from trainway.tracking.target import Target, clean, masked

TOKEN = "hf_" + "c4nary" * 5
ODD = "no-known-kind-of-secret-91"


def test_secrets_are_masked_by_kind_by_setting_and_by_value() -> None:
    environ = {"MY_SECRET": ODD, "OTHER_API_KEY": "short", "HOME": "/home/someone"}
    config = {
        "description": f"with {TOKEN}",
        "data": {"train": [f"https://user:{ODD}@host/file", "hf://org/name"]},
        "service": {"api_key": "whatever it is"},
        "tracking": {"tags": ["short", f"x{ODD}x"]},
        "train": {"max_tokens": 5, "lr": 0.1, "flag": True, "none": None},
    }
    assert masked(config, environ) == {
        "description": "with ***",
        "data": {"train": ["https://***@host/file", "hf://org/name"]},
        "service": {"api_key": "***"},
        "tracking": {"tags": ["short", "x***x"]},
        "train": {"max_tokens": 5, "lr": 0.1, "flag": True, "none": None},
    }


@pytest.mark.parametrize("text", ["$(touch x);'\"\n<script>", "name=value", "tokenizer.path=/x", "a: b", ""])
def test_what_is_no_secret_stays_as_it_is(text: str) -> None:
    assert clean(text, {}) == text


def test_names_and_projects(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "my run")
    run.path.mkdir()
    run.config.write_text("tracking: {group: g, tags: [a]}\n")
    target = Target.read(run, "wandb", {"WANDB_PROJECT": "theirs"})
    assert (target.name, target.group, target.tags) == ("my run", "g", ["a"])
    assert target.project("WANDB_PROJECT") == "theirs" and target.project("OTHER") == "trainway"
    run.config.write_text("tracking: {project: ours, run_name: named}\n")
    target = Target.read(run, "wandb", {"WANDB_PROJECT": "theirs"})
    assert target.name == "named" and target.project("WANDB_PROJECT") == "ours"
    assert target.flat_config() == {"tracking.project": "ours", "tracking.run_name": "named"}


def test_what_is_remembered_of_each_tracker(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.config.write_text("{}\n")
    one, other = Target.read(run, "wandb", {}), Target.read(run, "mlflow", {})
    one.remember(id="1")
    one.remember(closed_at=3)
    assert one.recall() == {"id": "1", "closed_at": 3} and other.recall() == {}
    one.forget()
    assert one.recall() == {}


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no run"):
        Target.read(RunDir(tmp_path), "wandb", {})
    (tmp_path / "config.yaml").write_text("tracking: {report_to: [carrier-pigeon]}\n")
    with pytest.raises(DataError, match="not a configuration of this version"):
        Target.read(RunDir(tmp_path), "wandb", {})
