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
from trainway.gad.compare import compare, compare_samples
from trainway.gad.samples import Sample, write_samples

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
    assert (cats.prompt, cats.teacher) == ("cats", "teacher on cats")
    assert [(run, sample.step, sample.student) for run, sample in cats.students] == [
        (distilled, step, f"student {step} on cats") for step in (0, 2, 4)
    ]
    assert dogs.prompt == "dogs"
    (only,) = compare_samples([distilled / "checkpoints" / "step-4"], 1)
    assert [sample.step for _, sample in only.students] == [4]
    assert len(compare_samples([distilled, distilled], 9)[0].students) == 6
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
        "figures": {"val/loss": 3.25, "val/ppl": 25.79, "val/tokens": 1000},
    }
    assert [row["step"] for row in found["rows"]] == [10, 0, 1, 2, 3, 4]
    (asked,) = found["samples"]
    assert (asked["prompt"], asked["teacher"]) == ("cats", "teacher on cats")
    assert asked["students"][0] == {
        "run": "distilled",
        "step": 0,
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
    assert json.loads(capsys.readouterr().out) == {"rows": [], "samples": []}


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
