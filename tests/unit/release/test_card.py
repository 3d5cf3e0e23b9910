"""The card says what the run knows; its front matter is what the Hub takes; nothing in it is obeyed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from trainway.config.schema import RunConfig
from trainway.errors import ConfigError
from trainway.release.base_id import Base, find_base_id
from trainway.release.card import Facts, make_card
from trainway.release.markdown import plain

COMMIT = "c" * 40
PAYLOAD = "<script>alert(1)</script> $(touch x);'\"\n---\nlicense: none\n| [x](javascript:x) `a` www.a.example https://b.example"
PROVENANCE: dict[str, Any] = {
    "started": "2026-11-22T04:00:00+00:00",
    "data_hash": "3f1c",
    "config_hash": "77aa",
    "versions": {"python": "3.11.7", "trainway": "0.1.0", "torch": "2.13.0", "numpy": None},
    "cpu": {"model": "AMD EPYC", "cores": 8},
    "devices": {"name": "NVIDIA H100", "count": 8},
    "datasets": ["org/chats"],
    "git": {"trainway": None, "project": {"commit": COMMIT, "dirty": False}},
}
REPORT = {"steps": 1200, "tokens": 9_000_000, "seconds": 7200.0, "parameters": 135_000_000}


def facts(**changes: Any) -> Facts:
    settings = {"recipe": "sft", "model": {"path": "org/base"}, "lora": {"enabled": True, "r": 8}}
    known = Facts(
        config=RunConfig.model_validate(settings),
        provenance=PROVENANCE,
        report=REPORT,
        step=1000,
        metrics={"val/loss": 1.25, "val/ppl": 3.49},
        base=Base("org/base", COMMIT),
        repo="ada/tuned",
        tag="v0.1",
        licence="apache-2.0",
        is_adapter=True,
        has_picture=True,
        run_name="first",
        cost=12.5,
    )
    return replace(known, **changes)


def test_the_hubs_own_reader_takes_the_front_matter() -> None:
    data = ModelCard(make_card(facts())).data
    assert (data.license, data.base_model, data.library_name) == ("apache-2.0", "org/base", "peft")
    assert (data.pipeline_tag, data.datasets) == ("text-generation", ["org/chats"])
    assert data.tags == ["trainway", "sft", "lora"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.task_type) == ("loss", 1.25, "text-generation")


def test_it_says_what_is_known() -> None:
    body = make_card(facts()).split("---\n", 2)[2]
    for line in (
        "# tuned",
        f"It started from [org/base](https://huggingface.co/org/base) at commit `{COMMIT}`.",
        'model = AutoPeftModelForCausalLM.from_pretrained("ada/tuned", revision="v0.1")',
        "Datasets of the Hub: [org/chats](https://huggingface.co/datasets/org/chats).",
        "| LoRA rank | 8 |",
        "| validation loss (nats per token) | 1.2500 |",
        "| tokens | 9,000,000 |",
        "| hardware | 8 × NVIDIA H100 |",
        "| hours of training | 2.00 |",
        "| cost of the training | \\$12.50 |",
        f"| commit of the project | {COMMIT} |",
        "![training and validation loss over the steps](loss.png)",
    ):
        assert line in body
    # the picture, the licence and the cost are left out where there are none
    bare = make_card(facts(licence=None, cost=None, has_picture=False, metrics={}, report={}, provenance={}))
    assert not any(word in bare for word in ("license", "cost", "loss.png", "model-index", "None"))


def test_a_base_that_is_not_on_the_hub_is_left_out_with_a_reason() -> None:
    config = RunConfig.model_validate({"recipe": "sft", "model": {"path": "/home/ada/models/base"}})
    base = find_base_id(config, {"base_model": {"path": "/home/ada/models/base", "commit": None}})
    card = make_card(facts(config=config, base=base))
    assert "base_model" not in (ModelCard(card).data.to_dict())
    assert "/home/ada" not in card
    assert "not named: model.path is a local directory" in card


@pytest.mark.parametrize("where", ["description", "run_name", "versions", "device", "dataset", "data_hash"])
def test_payloads_are_text_and_the_front_matter_stays_ours(where: str) -> None:
    changed = facts()
    if where == "description":
        changed = replace(changed, config=changed.config.model_copy(update={"description": PAYLOAD}))
    elif where == "run_name":
        changed = facts(run_name=PAYLOAD)
    else:
        known = {
            "versions": {"versions": {"python": PAYLOAD, PAYLOAD: "1"}},
            "device": {"devices": {"name": PAYLOAD, "count": 1}},
            "dataset": {"datasets": [PAYLOAD, "org/chats"]},
            "data_hash": {"data_hash": PAYLOAD},
        }[where]
        changed = facts(provenance={**PROVENANCE, **known})
    card = make_card(changed)
    front = yaml.safe_load(card.split("---\n", 2)[1])
    assert front == yaml.safe_load(make_card(facts()).split("---\n", 2)[1])
    assert "<script" not in card and "\nlicense: none" not in card
    assert "[x](" not in card and "www.a" not in card and "https://b" not in card


def test_values_show_as_they_are() -> None:
    assert plain("a|b*c_d`e`[f]~g~") == "a\\|b\\*c\\_d\\`e\\`\\[f\\]\\~g\\~"
    assert plain("x\n\x1b[31m\u202ey") == "x \\[31m y"
    assert plain("\ud800") == "?"
    assert len(plain("y" * 5000)) == 300
    assert (plain(3e-4), plain(None)) == ("0.0003", "")


PATHS = {
    "org/base": ({}, Base("org/base")),
    "gpt2": ({}, Base("gpt2")),
    "org/base@": ({}, None),
    "/models/base": ({}, None),
    "./org/base": ({}, None),
    "~/base": ({}, None),
    f"/x/hub/models--org--base.1/snapshots/{COMMIT}": ({}, Base("org/base.1", COMMIT)),
    f"/x/hub/models--gpt2/snapshots/{COMMIT}": ({}, Base("gpt2", COMMIT)),
    "org/other": ({"base_model": {"path": "org/other", "commit": COMMIT}}, Base("org/other", COMMIT)),
    # it was a directory when the run began, whatever there is now
    "org/local": ({"base_model": {"path": "org/local", "commit": None}}, None),
}


@pytest.mark.parametrize("path", PATHS)
def test_the_base_is_named_as_the_run_knows_it(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    provenance, expected = PATHS[path]
    config = RunConfig.model_validate({"recipe": "sft", "model": {"path": path}})
    found = find_base_id(config, provenance)
    if expected is None:
        assert found.id is None and found.reason
    else:
        assert found == expected


def test_a_directory_of_that_name_goes_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    config = RunConfig.model_validate({"recipe": "sft", "model": {"path": "org/base"}})
    assert find_base_id(config, {}).id is None
    assert find_base_id(config, {}, "org/real") == Base("org/real")


@pytest.mark.parametrize(
    ("path", "stated", "what"),
    [
        ("/models/base", "/models/base", "'/models/base' is no id of a model on the Hub"),
        ("/models/base", "a--b/c", "'a--b/c' is no id of a model on the Hub"),
        ("org/base", "org/other", "release.base is org/other, and the run started from org/base"),
        (None, "org/other", "release.base is org/other, and the run started from no model"),
    ],
)
def test_what_the_user_says_is_checked(path: str | None, stated: str, what: str) -> None:
    config = RunConfig.model_validate({"model": {"path": path}})
    with pytest.raises(ConfigError) as caught:
        find_base_id(config, {}, stated)
    assert caught.value.what == what
