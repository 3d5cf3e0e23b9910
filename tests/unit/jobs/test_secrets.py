"""Secrets of this machine: one meaning of an empty variable, whatever the target."""

from __future__ import annotations

import pytest

from trainway.errors import EnvironmentFault, ExitCode
from trainway.jobs.secrets import secrets_of
from trainway.jobs.spec import JobSpec

EVIL = "$(touch x);'\"\nnext"


def spec(target: str, **secrets: str) -> JobSpec:
    return JobSpec.model_validate(
        {"name": "try", "config": "m3_medium", "target": target, "secrets": secrets}
    )


@pytest.mark.parametrize("target", ["local", "ssh"])
def test_each_comes_from_the_variable_that_the_job_names(target: str) -> None:
    found = secrets_of(spec(target, HF_TOKEN="MINE", AGAIN="MINE"), {"MINE": EVIL, "HF_TOKEN": "another"})
    assert found == {"HF_TOKEN": EVIL, "AGAIN": EVIL}


@pytest.mark.parametrize("target", ["local", "ssh"])
def test_what_is_not_set_and_what_is_empty_are_both_missing(target: str) -> None:
    job = spec(target, A="UNSET", B="EMPTY", C="HERE", D="EMPTY")
    with pytest.raises(EnvironmentFault) as raised:
        secrets_of(job, {"EMPTY": "", "HERE": "canary-0123"})
    assert raised.value.code == ExitCode.ENVIRONMENT
    assert raised.value.what == "EMPTY, UNSET: not set here, or empty"
    assert "canary" not in str(raised.value)


@pytest.mark.parametrize("target", ["runpod", "kubernetes"])
def test_a_target_with_a_store_of_its_own_takes_none_from_here(target: str) -> None:
    assert secrets_of(spec(target, HF_TOKEN="hf_token"), {}) == {}
