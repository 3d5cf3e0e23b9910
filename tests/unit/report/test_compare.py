"""Checkpoints side by side: from metrics.jsonl and what is on the disk, of any recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainway.checkpoint.store import CheckpointStore
from trainway.cli.app import main
from trainway.errors import ConfigError
from trainway.gad.samples import Sample, write_samples
from trainway.report.compare import compare, compare_samples, compare_settings, ranked
from trainway.run_dir import RunDir
from trainway.training.evaluations import Evaluation, checkpoint_identity, keep_evaluation

Capture = pytest.CaptureFixture[str]

FIGURES = {
    "val/loss": 1.5,
    "val/rouge_l": 0.31256,
    "val/length": 412.04,
    "val/teacher_length": 396.2,
    "val/distinct_2": 0.61,
    "val/truncated": 0.0125,
    "val/discriminator_accuracy": 0.875,
}


def write_run(path: Path, records: list[dict[str, Any]], saved: dict[int, bool] | None = None) -> Path:
    """A run directory with these metrics, and checkpoints by step, True for a best one."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("{}\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    store = CheckpointStore(path / "checkpoints", keep_last=2)
    for step, best in (saved or {}).items():
        store.save(step, lambda directory: (directory / "weights").write_text("w"), best=best)
    return path


@pytest.fixture
def distilled(tmp_path: Path) -> Path:
    records: list[dict[str, Any]] = [{"step": 0, "gad/stage": "warmup", **FIGURES, "val/rouge_l": 0.1}]
    for step in range(1, 5):
        stage = "warmup" if step <= 2 else "adversarial"
        records.append({"step": step, "gad/stage": stage, "train/student_loss": 2.0, "gad/kl": 0.1})
        records.append({"step": step, **FIGURES, "val/loss": 2.0 - step / 10})
    run = write_run(tmp_path / "distilled", records, {1: False, 2: True, 3: False, 4: False})
    write_samples(
        run / "samples.jsonl",
        [
            Sample(
                step, prompt, f"teacher on {prompt}", f"student {step} on {prompt}", step / 4, 1.0, step == 0
            )
            for step in (0, 2, 4)
            for prompt in ("cats", "dogs", "\x1b[31mred")
        ],
    )
    return run


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    records = [
        {"step": 10, "train/loss": 3.0},
        {"step": 10, "val/loss": 3.25, "val/ppl": 25.79, "val/bpb": float("nan"), "val/tokens": 1000},
    ]
    return write_run(tmp_path / "pretrained", records)


def test_validations_of_a_run(distilled: Path) -> None:
    rows = compare([distilled])
    assert [(row.step, row.stage, row.saved, row.is_latest, row.is_best) for row in rows] == [
        (0, "warmup", False, False, False),
        (1, "warmup", False, False, False),  # its checkpoint went when newer ones came
        (2, "warmup", True, False, True),
        (3, "adversarial", True, False, False),
        (4, "adversarial", True, True, False),
    ]
    assert rows[0].figures == {**FIGURES, "val/rouge_l": 0.1}
    assert [row.figures["val/loss"] for row in rows[1:]] == [1.9, 1.8, 1.7, 1.6]


def test_a_checkpoint_stands_for_its_step(distilled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for target in ("step-2", "best"):
        (row,) = compare([distilled / "checkpoints" / target])
        assert (row.run, row.step, row.is_best) == (distilled, 2, True)
    monkeypatch.chdir(distilled / "checkpoints" / "step-3")
    assert [row.step for row in compare([Path(".")])] == [3]
    monkeypatch.chdir(distilled)
    assert [row.step for row in compare([Path("."), Path("checkpoints/latest")])] == [0, 1, 2, 3, 4, 4]


def test_a_checkpoint_without_a_validation_is_listed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"step": 1, "train/loss": 2.0}], {1: False})
    (row,) = compare([run])
    assert (row.step, row.saved, row.figures) == (1, True, {})


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "file",
        "empty",
        "elsewhere/step-2",
        "distilled/checkpoints/step-9",
        "distilled/checkpoints/x",
    ],
)
def test_what_is_neither_run_nor_checkpoint(name: str, tmp_path: Path, distilled: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "elsewhere" / "step-2").mkdir(parents=True)
    (distilled / "checkpoints" / "x").mkdir()
    with pytest.raises(ConfigError, match="is neither a run nor a checkpoint"):
        compare([distilled, tmp_path / name])


def test_a_torn_or_foreign_line_is_left_out(distilled: Path) -> None:
    before = compare([distilled])
    with (distilled / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"val/loss": 1}\n{"step": "x", "val/loss": 1}\n{"step": 4, "val/loss": 0')
    assert compare([distilled]) == before


def test_samples_by_prompt(distilled: Path) -> None:
    cats, dogs = compare_samples([distilled], 2)
    assert (cats.prompt, cats.reference, cats.by_teacher) == ("cats", "teacher on cats", True)
    assert [(run, answer.step, answer.text) for run, answer in cats.answers] == [
        (distilled, step, f"student {step} on cats") for step in (0, 2, 4)
    ]
    assert dogs.prompt == "dogs"
    (only,) = compare_samples([distilled / "checkpoints" / "step-4"], 1)
    assert [answer.step for _, answer in only.answers] == [4]
    assert len(compare_samples([distilled, distilled], 9)[0].answers) == 6
    assert compare_samples([distilled], 0) == []


def test_the_table(distilled: Path, capsys: Capture) -> None:
    assert main(["compare", str(distilled)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "step  stage        marks   val/loss  ROUGE-L  length (of teacher's)  distinct-2  truncated  D accuracy",
        "0     warmup               1.5000    0.1000   412.0 (1.04x)          0.6100      1.2%       87.5%",
        "1     warmup               1.9000    0.3126   412.0 (1.04x)          0.6100      1.2%       87.5%",
        "2     warmup       best    1.8000    0.3126   412.0 (1.04x)          0.6100      1.2%       87.5%",
        "3     adversarial  saved   1.7000    0.3126   412.0 (1.04x)          0.6100      1.2%       87.5%",
        "4     adversarial  latest  1.6000    0.3126   412.0 (1.04x)          0.6100      1.2%       87.5%",
    ]


def test_the_table_of_several_runs(distilled: Path, pretrained: Path, capsys: Capture) -> None:
    assert main(["compare", str(pretrained), str(distilled / "checkpoints" / "step-4")]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == (
        "run step stage marks val/loss ppl ROUGE-L length (of teacher's) distinct-2 truncated D accuracy".split()
    )
    assert rows[0].split() == ["pretrained", "10", "3.2500", "25.79"]
    assert rows[1].startswith("distilled   4     adversarial  latest  1.6000           0.3126")


def test_two_runs_of_one_name_are_told_apart(tmp_path: Path, capsys: Capture) -> None:
    for folder in ("a", "b"):
        write_run(tmp_path / folder / "run", [{"step": 1, "val/loss": 1.0}])
    assert main(["compare", str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]


def test_json_holds_every_figure(distilled: Path, pretrained: Path, capsys: Capture) -> None:
    assert main(["compare", str(pretrained), str(distilled), "--json", "--samples", "1"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["rows"][0] == {
        "run": "pretrained",
        "path": str(pretrained),
        "step": 10,
        "stage": None,
        "saved": False,
        "latest": False,
        "best": False,
        "tokens": None,
        "hours": None,
        "dollars": None,
        "figures": {"val/loss": 3.25, "val/ppl": 25.79, "val/tokens": 1000},
    }
    assert [row["step"] for row in found["rows"]] == [10, 0, 1, 2, 3, 4]
    (asked,) = found["samples"]
    assert (asked["prompt"], asked["reference"]) == ("cats", "teacher on cats")
    assert asked["answers"][0] == {
        "run": "distilled",
        "step": 0,
        "best": False,
        "text": "student 0 on cats",
        "truncated": True,
        "score": 0.0,
        "teacher_score": 1.0,
    }


def test_samples_are_shown_and_harmless(distilled: Path, capsys: Capture) -> None:
    assert main(["compare", str(distilled), "--samples", "3"]) == 0
    shown = capsys.readouterr().out
    assert (
        "\n> cats\n[teacher]\nteacher on cats\n[step 0 (score 0.000)]\nstudent 0 on cats [cut off]\n" in shown
    )
    assert "[step 4 (score 1.000)]\nstudent 4 on dogs\n" in shown
    assert "\x1b" not in shown and "\\x1b[31mred" in shown


def test_a_run_before_its_first_validation(tmp_path: Path, capsys: Capture) -> None:
    run = write_run(tmp_path / "young", [{"step": 1, "train/loss": 2.0}])
    assert main(["compare", str(run)]) == 0
    assert capsys.readouterr().out == f"no validations in {run}\n"
    assert main(["compare", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": [], "settings": {}, "samples": []}


def test_errors_are_three_lines_and_code_2(tmp_path: Path, capsys: Capture) -> None:
    assert main(["compare", str(tmp_path / "nothing")]) == 2
    error, why, fix = capsys.readouterr().err.splitlines()
    assert error == f"error: {tmp_path / 'nothing'} is neither a run nor a checkpoint"
    assert why == "why: there is nothing of that name"
    assert fix.startswith("fix: give run directories")
    assert main(["compare"]) == 2


def test_help_has_an_example(capsys: Capture) -> None:
    assert main(["compare", "--help"]) == 0
    assert "Example: trainway compare runs/" in capsys.readouterr().out


def test_nothing_heavy_is_imported(distilled: Path) -> None:
    code = f"import sys\nfrom trainway.cli.app import main\nmain(['compare', {str(distilled)!r}, '--samples', '1'])\n"
    code += "print(*sorted({'torch', 'transformers', 'numpy', 'tensorboard'} & set(sys.modules)), 'end')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == " end".strip()


def evaluated(run: Path, step: int, **what: Any) -> None:
    """Keep an evaluation of a checkpoint that is on the disk."""
    identity = checkpoint_identity(RunDir(run).checkpoints / f"step-{step}")
    date = "2026-01-02T00:00:00Z"
    keep_evaluation(Evaluation(str(run), str(run), step, identity, date, **what))


def trained_run(path: Path, lr: float, world_size: int) -> Path:
    """A finished run of 4 steps in two hours, saved after the second and the fourth, settings and all."""
    records: list[dict[str, Any]] = [{"step": step, "train/tokens": 100 * step} for step in range(1, 5)]
    records += [{"step": 2, "val/loss": 3.0}, {"step": 4, "val/loss": 2.5}]
    write_run(path, records)
    (path / "config.yaml").write_text(f"optim: {{lr: {lr}, name: adamw}}\nrun_dir: {path}\n")
    (path / "report.json").write_text(json.dumps({"world_size": world_size}))
    store = CheckpointStore(path / "checkpoints", keep_last=2)
    for step in (2, 4):
        state = json.dumps({"tokens_seen": 100 * step, "elapsed_s": 1800.0 * step})
        store.save(step, lambda directory, state=state: (directory / "state.json").write_text(state))
    return path


def test_tokens_hours_and_dollars(tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run", 0.01, world_size=2)
    first, last = compare([run], gpu_price=2.5)
    assert (first.tokens, first.hours, first.dollars) == (200, 1.0, 5.0)
    assert (last.tokens, last.hours, last.dollars) == (400, 2.0, 10.0)
    assert [row.dollars for row in compare([run])] == [None, None]  # nobody said what a GPU costs
    (run / "report.json").unlink()
    assert [row.dollars for row in compare([run], gpu_price=2.5)] == [None, None]  # nor how many there were


def test_settings_that_differ(tmp_path: Path, capsys: Capture) -> None:
    a, b = trained_run(tmp_path / "a", 0.01, 1), trained_run(tmp_path / "b", 0.02, 1)
    assert compare_settings([a, b]) == {"optim.lr": {a: 0.01, b: 0.02}}
    assert compare_settings([a, a / "checkpoints" / "step-2"]) == {}
    assert main(["compare", str(a), str(b)]) == 0
    shown = capsys.readouterr().out.split("settings that differ:\n")[1].splitlines()
    assert [line.split() for line in shown] == [["a", "b"], ["optim.lr", "0.01", "0.02"]]


def test_evaluations_fill_in_scores(tmp_path: Path, capsys: Capture) -> None:
    run = trained_run(tmp_path / "run", 0.01, 1)
    scores = {
        "arc_easy": {
            "acc": 0.25,
            "acc_stderr": 0.02,
            "acc_norm": 0.5,
            "acc_norm_stderr": 0.03,
            "num_samples": 40,
        }
    }
    evaluated(run, 2, tasks=scores)
    evaluated(
        run, 4, data=("/x/held-out.jsonl",), figures={"val/loss": 2.75, "val/bpb": 1.5, "val/ppl": None}
    )
    evaluated(run, 4, data=("validation",), figures={"val/loss": 9.0, "val/bpb": 1.25})
    first, last = compare([run])
    assert (first.figures["arc_easy/acc"], first.figures["arc_easy/acc_norm"]) == (0.25, 0.5)
    assert (last.figures["held-out.jsonl/val/loss"], last.figures["val/bpb"]) == (2.75, 1.25)
    assert last.figures["val/loss"] == 2.5  # of training, which read what it was told to
    assert main(["compare", str(run)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    wanted = "step marks val/loss bpb arc_easy acc_norm held-out.jsonl val/loss held-out.jsonl val/bpb tokens hours"
    assert head.split() == wanted.split()
    assert rows[0].split() == ["2", "saved", "3.0000", "0.5000", "200", "1.00"]
    assert rows[1].split() == ["4", "latest", "2.5000", "1.2500", "2.7500", "1.5000", "400", "2.00"]


def test_an_evaluation_of_other_weights_does_not_count(tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run", 0.01, 1)
    evaluated(run, 4, tasks={"arc_easy": {"acc": 0.25}})
    assert "arc_easy/acc" in compare([run])[-1].figures
    store = CheckpointStore(run / "checkpoints", keep_last=2)
    store.discard_after(2)
    store.save(4, lambda directory: (directory / "state.json").write_text("{}"))  # trained anew
    assert "arc_easy/acc" not in compare([run])[-1].figures


def test_best_first(distilled: Path, pretrained: Path, capsys: Capture) -> None:
    rows = compare([distilled, pretrained])
    assert [row.figures["val/loss"] for row in ranked(rows, "loss")] == [1.5, 1.6, 1.7, 1.8, 1.9, 3.25]
    by_rouge = ranked(rows, "val/rouge_l")
    assert [row.figures.get("val/rouge_l") for row in by_rouge] == [0.31256] * 4 + [0.1, None]
    assert [row.step for row in ranked(rows, "step")] == [0, 1, 2, 3, 4, 10]
    assert main(["compare", str(distilled), "--sort", "arc"]) == 2
    error, why, _ = capsys.readouterr().err.splitlines()
    assert error == "error: there is no arc to sort by"
    assert "val/rouge_l" in why


def test_samples_of_any_recipe(pretrained: Path, capsys: Capture) -> None:
    lines = [
        {"step": 0, "prompt": "one plus one", "text": "is", "reference": "is two"},
        {"step": 10, "prompt": "one plus one", "text": "is <script>\x1b[2J", "reference": "is two"},
        {"step": 10, "best": True, "prompt": "one plus one", "text": "is two", "reference": "is two"},
        {"step": 10, "prompt": "no text"},
    ]
    (pretrained / "samples.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1'
    )
    assert main(["compare", str(pretrained), "--samples", "2"]) == 0
    shown = capsys.readouterr().out.split("\n\n")[1]
    assert shown == (
        "> one plus one\n[reference]\nis two\n[step 0]\nis\n[step 10]\nis <script>\\x1b[2J\n[step 10 best]\nis two\n"
    )
