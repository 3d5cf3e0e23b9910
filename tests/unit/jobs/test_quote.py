"""Hours and dollars before anything is rented, and what is refused by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from trainway.errors import ConfigError, EnvironmentFault
from trainway.jobs.load import load_job
from trainway.jobs.quote import describe, quote, settle
from trainway.jobs.target import Job


def job(folder: Path, more: str, config: str = "runpod_1b", target: str = "runpod") -> Job:
    path = folder / "job.yaml"
    path.write_text(f"name: a\nconfig: {config}\ntarget: {target}\n{more}\n")
    return load_job(path, ["settings.train.total_steps=2000"])


def test_hours_and_dollars_are_the_plan_s(tmp_path: Path) -> None:
    wanted = job(tmp_path, "gpus: [{name: H100 SXM, count: 8}]\nnodes: 2")
    (offer,) = quote(wanted).offers
    assert offer.plan is not None and offer.plan.price is not None and offer.plan.hours is not None
    assert offer.plan.world_size == 16
    assert offer.dollars_per_hour == pytest.approx(16 * offer.plan.price.usd_per_hour)
    assert offer.dollars == pytest.approx(offer.plan.dollars)
    settled = settle(wanted, quote(wanted))
    assert settled.orders.limits.hours == pytest.approx(offer.plan.hours * 1.5 + 1)
    assert settled.orders.dollars_per_hour == offer.dollars_per_hour
    said = describe(settled, quote(wanted))
    assert f"${offer.dollars_per_hour:.2f} an hour" in said and "2 nodes" in said


def test_candidates_that_will_not_do_are_left_out(tmp_path: Path) -> None:
    wanted = job(tmp_path, "gpus: [{name: H100 SXM, max_price: 0.1}, RTX 4090, A100 80GB]")
    found = quote(wanted)
    refused = [offer.refused for offer in found.offers]
    assert "the highest allowed is $0.10" in refused[0]
    assert "GiB of its" in refused[1] and refused[2] == ""
    assert [gpu.name for gpu in settle(wanted, found).spec.gpus] == ["A100 80GB"]
    assert "will not do" in describe(wanted, found)


def test_a_run_that_fits_nowhere_is_refused_with_what_would_help(tmp_path: Path) -> None:
    wanted = job(tmp_path, "gpus: [RTX 4090]")
    with pytest.raises(EnvironmentFault) as caught:
        settle(wanted, quote(wanted))
    assert "1 x RTX 4090" in caught.value.why and "saves" in caught.value.fix


@pytest.mark.parametrize(("limit", "unit"), [("dollars: 0.01", "$"), ("hours: 0.001", "hours of 0.001")])
def test_a_plan_over_the_limits_is_refused(tmp_path: Path, limit: str, unit: str) -> None:
    wanted = job(tmp_path, f"gpus: [A100 80GB]\nlimits: {{{limit}}}")
    with pytest.raises(ConfigError, match="over the job's limits") as caught:
        settle(wanted, quote(wanted))
    assert unit in caught.value.why


def test_only_the_candidates_within_the_limits_stay(tmp_path: Path) -> None:
    wanted = job(tmp_path, "gpus: [A100 80GB, {name: H100 SXM, count: 8}]")
    slow, fast = quote(wanted).offers
    assert slow.hours is not None and fast.hours is not None
    between = (slow.hours + fast.hours) / 2
    limited = replace(
        wanted,
        spec=wanted.spec.model_copy(
            update={"limits": wanted.spec.limits.model_copy(update={"hours": between})}
        ),
    )
    assert [gpu.name for gpu in settle(limited, quote(limited)).spec.gpus] == ["H100 SXM"]


def test_a_paid_job_needs_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = "gpus: [{name: H100 SXM, count: 4}]"
    path = tmp_path / "job.yaml"
    path.write_text(f"name: a\nconfig: c.yaml\ntarget: runpod\n{text}\n")
    (tmp_path / "c.yaml").write_text(
        "recipe: sft\nmodel: {path: someone/unknown-to-all}\ndata: {train: [x.jsonl]}\ntrain: {total_steps: 5}\n"
    )
    wanted = load_job(path)
    found = quote(wanted)
    assert found.unknown
    with pytest.raises(ConfigError, match="nothing says when this job is to end"):
        settle(wanted, found)
    limited = load_job(path, ["limits.hours=3"])
    assert settle(limited, quote(limited)).orders.limits.hours == 3


def test_own_machines_cost_what_the_file_says(tmp_path: Path) -> None:
    wanted = job(tmp_path, "gpus: [{name: A100 80GB, count: 2, price: 1.25}]\nssh: {host: box}", target="ssh")
    assert quote(wanted).offers[0].dollars_per_hour == 2.5
    free = job(tmp_path, "gpus: [{name: A100 80GB}]\nssh: {host: box}", target="ssh")
    assert quote(free).offers[0].dollars_per_hour == 0


def test_without_gpus_nothing_is_planned(tmp_path: Path) -> None:
    wanted = job(tmp_path, "", config="m3_medium", target="local")
    assert quote(wanted).offers == ()
    assert settle(wanted, quote(wanted)).orders.limits.hours is None


def test_on_a_cluster_a_job_without_gpus_needs_an_end_too(tmp_path: Path) -> None:
    wanted = job(tmp_path, "", config="m3_medium", target="kubernetes")
    with pytest.raises(ConfigError, match="nothing says when this job is to end"):
        settle(wanted, quote(wanted))
