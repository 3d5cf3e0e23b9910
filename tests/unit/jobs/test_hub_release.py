"""A job that releases to the Hub: what its file may say, what its machine runs, and that its token is nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import Account, HubServer, serve_hub
from tests.pod_material import orders_for
from tests.unit.jobs.test_load import RUNPOD, error_of, written
from trainway.errors import EnvironmentFault
from trainway.jobs.load import load_job
from trainway.jobs.orders import JobDir, PodState
from trainway.jobs.verbs import up
from trainway.pod.stages import place_of, release

TO = "at_end.release.to=hf://ada/model"
TOKEN = "hf_" + "aB3" * 12


def test_the_orders_say_where_to(tmp_path: Path) -> None:
    words = [TO, "at_end.release.tag=v2", "at_end.release.licence=mit", "at_end.release.private=false"]
    told = load_job(written(tmp_path, RUNPOD), words).orders.release
    assert (told.to, told.tag, told.licence, told.private) == ("hf://ada/model", "v2", "mit", False)


def test_a_run_that_would_release_by_itself_leaves_it_to_the_job(tmp_path: Path) -> None:
    settings = {
        "release.push_to_hub": "true", "release.repo": "ada/model", "release.tag": "v3", "release.which": "latest",
    }  # fmt: skip
    job = load_job(
        written(tmp_path, RUNPOD), [f"settings={{{', '.join(f'{k}: {v}' for k, v in settings.items())}}}"]
    )
    assert job.config.release.push_to_hub
    assert not job.orders.config["release"].get("push_to_hub")
    told = job.orders.release
    assert (told.to, told.tag, told.which, told.private) == ("hf://ada/model", "v3", "latest", True)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["at_end.release.tag=v2"], "at_end.release.tag is set, and the release goes to no place"),
        (["at_end.release.to=out", "at_end.release.private=false"], "at_end.release.private is set, and the"),
        (
            ["at_end.release.to=hf://model"],
            "at_end.release.to is 'hf://model'\nit names no repository of the Hub",
        ),
        (["at_end.release.to=hf://ada/a/b"], "at_end.release.to is 'hf://ada/a/b'"),
        ([TO, "secrets={WANDB_API_KEY: wandb}"], "no secret holds a token of the Hub"),
        ([TO, "at_end.release.merge=true"], "at_end.release.merge is on, and the run trains the whole model"),
        (
            ["config=lora_default", TO, "at_end.release.merge=true", "settings={lora.quantize: 4bit}"],
            "at_end.release.merge is on, and lora.quantize is 4bit",
        ),
        ([TO, "settings={release.push_to_hub: true, release.repo: ada/b}"], "a job releases to one place"),
        (
            ["secrets={}", "settings={release.push_to_hub: true, release.repo: ada/b}"],
            "the run has release.push_to_hub, and no secret of the job holds a token",
        ),
    ],
)
def test_a_wrong_release_is_named(tmp_path: Path, words: list[str], what: str) -> None:
    assert what in error_of(tmp_path, RUNPOD, *words)


@pytest.mark.parametrize("state", [False, True])
def test_the_machine_releases_with_words_that_complete_themselves(tmp_path: Path, state: bool) -> None:
    told = {
        "to": "hf://ada/model",
        "tag": "v2",
        "merge": True,
        "private": False,
        "licence": "mit",
        "base": "org/b",
    }
    orders = orders_for(tmp_path, release=told)
    place = place_of(orders, JobDir.of(tmp_path, "try"), 0)
    cost: list[str] = []
    if state:
        place.job_dir.path.mkdir(parents=True)
        seen = PodState(job="try", stage="train", began=0.0, updated=0.0, dollars=12.5)
        place.job_dir.state.write_text(seen.model_dump_json())
        cost = ["--cost", "12.50"]
    for _ in range(2):  # whatever has become of it
        (step,) = release(orders, place, ("trainway",))
        assert step.stage == "release"
        assert step.command == (
            "trainway", "release", str(place.run.path), "--repo", "ada/model", "--tag", "v2", "--which", "latest",
            "--merge", "--public", "--licence", "mit", "--base", "org/b", *cost,
        )  # fmt: skip
        (place.run.path / "releases").mkdir(parents=True, exist_ok=True)


def test_it_is_proved_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path
) -> None:
    job = f"""\
name: local-one
config: cpu_small
settings: {{data.train: {corpus}}}
target: local
at_end: {{release: {{to: hf://ada/model}}}}
secrets: {{HF_TOKEN: HF_TOKEN}}
"""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve_hub(HubServer(tmp_path / "hub", {TOKEN: Account("ada", role="read")})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        said: list[Any] = []
        with pytest.raises(EnvironmentFault) as caught:
            up(written(tmp_path, job), confirm=lambda *plan: True, say=said.append)
        assert "a push to ada/model is planned, and the token of ada is read-only" in caught.value.what
        assert TOKEN not in str(caught.value) + str(said)
