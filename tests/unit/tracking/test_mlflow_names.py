"""Names that MLflow refuses become ones that it takes, and stay apart."""

from __future__ import annotations

import pytest

pytest.importorskip("mlflow")

from trainway.tracking.mlflow import LONGEST_NAME, metric_name

ODD = (
    "val/loss/<a>",
    "val/loss/[a]",
    "../x",
    "/x",
    "x//y",
    "x/./y",
    "x/",
    "ä",
    "a\nb",
    "x" * 300,
    "x" * 301,
    ".",
    "",
)


@pytest.mark.parametrize("name", ["train/loss", "val/bpb", "perf/step_s", "a b:c-d.e"])
def test_what_mlflow_takes_stays(name: str) -> None:
    assert metric_name(name) == name


def test_what_it_refuses_is_taken_in_another_form() -> None:
    from mlflow.utils.validation import _validate_metric_name

    names = [metric_name(name) for name in ODD]
    assert len(set(names)) == len(ODD)
    for name in names:
        _validate_metric_name(name)
        assert len(name) <= LONGEST_NAME
