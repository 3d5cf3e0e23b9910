"""`trainway eval` as a user meets it: training's own figures, several models, sources, adapters, what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import metrics, once, run_cli, shared, tiny, write_config
from tests.sft_material import LORA, base_model, conversations, tiny_sft
from trainway.cli.app import main
from trainway.errors import ConfigError, DataError
from trainway.recipes.evaluation import Asked, evaluate, evaluate_models
from trainway.release.bundle import export
from trainway.report.compare import compare
from trainway.run_dir import RunDir
from trainway.training.evaluations import read_evaluations

Capture = pytest.CaptureFixture[str]
HELD_OUT = ("few.jsonl", "many.jsonl")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(tmp_path_factory, "evaluated")


@pytest.fixture(scope="module")
def run(place: Path, corpus: Path, store_dir: Path) -> Path:
    """Pretrained for 20 steps, with two validation files of which an evaluation reads a part."""

    def make() -> None:
        lines = corpus.read_text().splitlines(keepends=True)
        for name, part in zip(HELD_OUT, (lines[:12], lines[12:40]), strict=True):
            (place / name).write_text("".join(part))
        config: dict[str, Any] = tiny(corpus, store_dir, place / "run")
        config["data"] = {
            "train": [str(corpus)],
            "validation": [str(place / name) for name in HELD_OUT],
            "store_dir": str(store_dir),
        }
        config["eval"] = {"every": 10, "num_samples": 0, "max_tokens": 4000}
        run_cli("train", write_config(place / "config.yaml", config))

    once(place / "run-ready", make)
    return place / "run"


@pytest.fixture(scope="module")
def adapted(place: Path, store_dir: Path) -> Path:
    """Adapters trained on conversations for 6 steps."""

    def make() -> None:
        base = base_model(place / "base")
        chats = conversations(place / "chats.jsonl")
        config = tiny_sft(
            base, chats, store_dir, place / "adapted", lora=LORA,
            train={"total_steps": 6}, eval={"every": 3}, checkpoint={"save_every": 3},
        )  # fmt: skip
        run_cli("train", write_config(place / "adapted.yaml", config))

    once(place / "adapted-ready", make)
    return place / "adapted"


def validations(run: Path) -> dict[object, dict[str, Any]]:
    return {record["step"]: record for record in metrics(run, "val/loss")}


def test_every_checkpoint_has_trainings_own_figures(run: Path) -> None:
    recorded = validations(run)
    found = evaluate_models([run], which=["all"])
    assert [one.step for one in found] == [10, 20]
    for one in found:
        figures = recorded[one.step]
        for name in ("val/loss", "val/ppl", "val/bpb"):
            assert one.figures[name] == pytest.approx(figures[name], rel=1e-6), name
        assert one.figures["val/tokens"] == figures["val/tokens"] < 4000  # as many as eval.max_tokens lets it
        low, high = one.figures["val/loss_low"], one.figures["val/loss_high"]
        assert low is not None
        assert high is not None
        assert low < figures["val/loss"] < high


def test_sources_make_the_whole(run: Path, place: Path) -> None:
    one = evaluate(run, max_tokens=0)
    assert list(one.sources) == [str(place / name) for name in HELD_OUT]
    few, many = one.sources.values()
    assert (few["val/documents"], many["val/documents"]) == (12, 28)
    for name in ("val/tokens", "val/bytes", "val/documents"):
        assert few[name] + many[name] == one.figures[name]  # type: ignore[operator]
    nats = few["val/loss"] * few["val/tokens"] + many["val/loss"] * many["val/tokens"]  # type: ignore[operator]
    assert nats / one.figures["val/tokens"] == pytest.approx(one.figures["val/loss"], rel=1e-12)  # type: ignore[operator]


@pytest.mark.slow
def test_rows_at_once_change_nothing(run: Path, place: Path) -> None:
    alone, together = (evaluate(run, data=(str(place / HELD_OUT[0]),), batch_rows=rows) for rows in (1, 16))
    assert alone.figures["val/loss"] == pytest.approx(together.figures["val/loss"], rel=1e-6)
    assert alone.settings["rows"] == 1
    assert {name: alone.figures[name] for name in ("val/tokens", "val/bytes")} == {
        name: together.figures[name] for name in ("val/tokens", "val/bytes")
    }


def test_models_in_one_table(run: Path, place: Path, tmp_path: Path, capsys: Capture) -> None:
    exported = export(run, tmp_path / "exported", which=20)
    hostile = tmp_path / "held <script>$(touch x);'\".jsonl"
    hostile.write_bytes((place / HELD_OUT[1]).read_bytes())
    out = tmp_path / "all.json"
    words = ["eval", str(run), str(exported), "--which", "10,20", "--data", str(hostile)]
    assert main([*words, "--seq-len", "64", "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert json.loads(out.read_text()) == printed
    early, late, copied = printed["models"]
    assert [one["model"] for one in printed["models"]] == [f"{run} step 10", f"{run} step 20", str(exported)]
    assert late["figures"] == copied["figures"]
    assert late["difference"] == copied["difference"]
    assert early["difference"] == {}
    gap = late["figures"]["val/bpb"] - early["figures"]["val/bpb"]
    assert late["difference"]["bpb"] == pytest.approx(gap, rel=1e-9)
    assert late["difference"]["low"] < gap < late["difference"]["high"] < 0
    (row,) = [row for row in compare([run]) if row.step == 20]
    assert row.figures[f"{hostile.name}/val/loss"] == late["figures"]["val/loss"]
    assert not (tmp_path / "x").exists()


def test_the_table_says_how(run: Path, capsys: Capture) -> None:
    assert main(["eval", str(run)]) == 0
    shown = capsys.readouterr()
    head, row, *sources, how = shown.out.splitlines()
    assert head.split()[:3] == ["model", "step", "loss"]
    assert row.split()[:2] == [str(run), "20"]
    assert f"{validations(run)[20]['val/loss']:.4f} ±" in row
    assert len(sources) == 2
    assert how.startswith("fp32 arithmetic, float32 weights, cpu; all tokens, rows of 64, ")


def test_an_adapter_comes_with_its_base_and_answers_alone_count(adapted: Path, place: Path) -> None:
    recorded = validations(adapted)
    for one in evaluate_models([adapted], which=[3, 6]):
        assert one.figures["val/loss"] == pytest.approx(recorded[one.step]["val/loss"], rel=1e-6)
        assert one.figures["val/tokens"] == recorded[one.step]["val/tokens"]
        assert one.settings["base"] == str(place / "base")
        assert one.settings["counted"] == "assistant"
    chats = (str(place / "chats.jsonl"),)
    tuned, base = evaluate_models([adapted, place / "base"], Asked(data=chats, seq_len=96))
    assert base.settings["counted"] == "assistant"  # as the run beside it was trained
    assert base.figures["val/tokens"] == tuned.figures["val/tokens"]
    assert base.difference["bpb"] > 0  # type: ignore[operator]


def test_it_is_kept_beside_the_run(run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("document 7:\n\ndocument 8:\n")
    assert (
        main(["eval", str(run / "checkpoints" / "step-10"), "--prompts", str(prompts), "--max-tokens", "640"])
        == 0
    )
    (kept,) = [one for one in read_evaluations(RunDir(run)) if one.samples]
    assert (kept.step, kept.data, kept.figures["val/documents"] < 40) == (10, ("validation",), True)  # type: ignore[operator]
    assert [sample["prompt"] for sample in kept.samples] == ["document 7:", "document 8:"]
    assert kept.settings["asked"]["max_tokens"] == 640


def test_errors_come_before_any_work(
    run: Path, adapted: Path, place: Path, tmp_path: Path, capsys: Capture
) -> None:
    held = str(place / HELD_OUT[0])
    with pytest.raises(ConfigError, match="some of these models were trained on texts"):
        evaluate_models([run, adapted], Asked(data=(held,)))
    with pytest.raises(ConfigError, match="there is nothing to evaluate"):
        evaluate_models([place / "base"])
    with pytest.raises(ConfigError, match="--which chooses among a run's checkpoints"):
        evaluate_models([place / "base"], Asked(data=(held,)), which=["latest"])
    with pytest.raises(ConfigError, match="no checkpoint of step 11"):
        evaluate_models([run], which=[11])
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": 7}\n')
    with pytest.raises(DataError, match="1 malformed record"):
        evaluate_models([run], Asked(data=(str(tmp_path / "broken.jsonl"),)))
    assert main(["eval", str(run), "--which", "first"]) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["error", "why", "fix"]
