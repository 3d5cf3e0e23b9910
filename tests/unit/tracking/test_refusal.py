"""A tracker that is not installed is refused before anything begins; a benchmark has none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import tiny, write_config
from trainway.cli.app import main
from trainway.config.load import load_config
from trainway.config.schema import TrackingConfig
from trainway.errors import EnvironmentFault
from trainway.recipes.bench import _quiet
from trainway.tracking import fed_trackers, refuse_missing_trackers


def test_all_that_are_missing_are_named_with_the_command() -> None:
    tracking = TrackingConfig(report_to=("trackio", "tensorboard", "wandb", "mlflow"))
    assert fed_trackers(tracking) == ["wandb", "mlflow", "trackio"]
    with pytest.raises(EnvironmentFault) as caught:
        refuse_missing_trackers(tracking, lambda name: object() if name == "mlflow" else None)
    assert caught.value.what == "tracking.report_to names wandb and trackio, which are not installed"
    assert caught.value.fix == "pip install 'trainway[wandb,trackio]'"
    refuse_missing_trackers(tracking, lambda name: object())
    refuse_missing_trackers(TrackingConfig(), lambda name: None)


def test_train_ends_with_exit_code_4(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    config = write_config(tmp_path / "c.yaml", tiny(corpus, tmp_path / "store", tmp_path / "run"))
    assert main(["train", str(config), "report_to=[trackio]"]) == 4
    assert capsys.readouterr().err.splitlines() == [
        "error: tracking.report_to names trackio, which is not installed",
        "why: the run would be tracked nowhere but in its directory",
        "fix: pip install 'trainway[trackio]'",
    ]
    assert not (tmp_path / "run").exists() and not (tmp_path / "store").exists()


def test_a_benchmark_is_tracked_nowhere(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", tiny(corpus, tmp_path / "store", tmp_path / "run"))
    loaded = load_config(str(config), ["report_to=all"]).config
    assert loaded.tracking.report_to == ("tensorboard", "wandb", "mlflow", "trackio")
    assert _quiet(loaded, tmp_path).tracking.report_to == ()
