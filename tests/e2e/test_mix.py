"""A mix, trained, stopped and resumed; and every example of its page."""

from __future__ import annotations

import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import WORDS, metrics, run_cli, stream, tiny, write_config

PAGE = (Path(__file__).parents[2] / "docs/mixes.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of different sizes and words."""
    folder = tmp_path_factory.mktemp("mix")
    rng = random.Random(3)
    for name, count in (("books", 80), ("letters", 20), ("code", 60)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(count):
                words = " ".join(
                    f"{rng.choice(WORDS)}{rng.randrange(50)}" for _ in range(rng.randrange(30, 200))
                )
                file.write(json.dumps({"text": f"{name} {number}: {words}"}) + "\n")
    return folder


def config_file(folder: Path, sources: Path, name: str, **changes: object) -> Path:
    """The page's example of this name, with the model and the run of the tests."""
    example = next(block for block in blocks("yaml") if f"# {name}.yaml" in block)
    shown = yaml.safe_load(example)
    config = tiny(Path("unused"), sources / "cache", folder / name, **shown.get("train", {}))
    if "train" in shown:
        del config["train"]["total_steps"]  # type: ignore[attr-defined]
    train = [{**entry, "path": str(sources / entry["path"])} for entry in shown["data"]["train"]]
    config["data"] = {"train": train, "val_ratio": 0.1, "store_dir": str(sources / "cache")}
    return write_config(folder / f"{name}.yaml", {**config, **changes})


def test_a_mix_trains_and_resumes_at_the_same_rows(tmp_path: Path, sources: Path) -> None:
    config = config_file(tmp_path, sources, "mix")
    done = run_cli("train", config)
    lines = done.stderr.splitlines()
    shares = [line for line in lines if re.search(r"\[DATA\] \w+: \d+ documents of [\d,]+ tokens, ", line)]
    assert [line.split()[1] for line in shares] == ["books:", "letters:", "code:"]
    assert [re.search(r"([\d.]+%) of the rows", line)[1] for line in shares] == ["50.0%", "16.7%", "33.3%"]  # type: ignore[index]
    assert any("optional source diary is absent" in line for line in lines)
    assert not any("warning" in line for line in lines)
    before = stream(tmp_path / "mix")
    assert len(before) == 20
    run_cli("train", config, "--resume", 10)
    assert stream(tmp_path / "mix") == before
    *_, last = metrics(tmp_path / "mix", "data/epoch/letters")
    manifest = json.loads(next(sources.glob("cache/*/manifest.json")).read_text())
    tokens = {item["name"]: item["tokens"] for item in manifest["streams"]}
    assert last["step"] == 20
    assert last["data/epoch/letters"] == pytest.approx(20 * 8 / 6 / (tokens["letters"] // 64))


@pytest.mark.slow
def test_epochs_decide_the_length_and_frequent_sources_are_warned_of(tmp_path: Path, sources: Path) -> None:
    config = config_file(tmp_path, sources, "epochs")
    done = run_cli("train", config, "train.epochs=2")
    manifest = json.loads(
        next(p for p in sources.glob("cache/*/manifest.json") if "streams" in p.read_text()).read_text()
    )
    rows = [stream["tokens"] // 64 for stream in manifest["streams"]]
    total = round(rows[0] + 3 * rows[1] + 0.5 * rows[2])
    report = json.loads((tmp_path / "epochs/report.json").read_text())
    assert report["steps"] == round(2 * total / 8)
    assert "letters.jsonl is repeated 6.0 times" in done.stderr
    (tmp_path / "epochs/report.json").unlink()
    changed = config_file(tmp_path, sources, "epochs")
    changed.write_text(changed.read_text().replace("epochs: 3", "epochs: 4"))
    refused = run_cli("train", changed, "train.epochs=2", "--resume", 1, check=2)
    assert "data.train" in refused.stderr


@pytest.mark.slow
def test_two_ranks_read_the_same_rows(tmp_path: Path, sources: Path) -> None:
    alone = config_file(tmp_path / "one", sources, "mix")
    both = config_file(tmp_path / "two", sources, "mix")
    run_cli("train", alone)
    run_cli("train", both, "--nproc", 2)
    read = [[(r["step"], r["samples"]) for r in metrics(tmp_path / n / "mix")] for n in ("one", "two")]
    assert read[0] == read[1]
    losses = [[r["train/loss"] for r in metrics(tmp_path / n / "mix")] for n in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.slow
def test_the_commands_of_the_page_run_in_order(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file(tmp_path, sources, "mix")
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("bash")
    made = []
    for line in block.splitlines():
        program, *words = shlex.split(line)
        assert program == "trainway"
        made.append(run_cli(*words, "data.store_dir=own").stdout.strip())
    assert [Path(line.removeprefix("ok: ")).name for line in made[:2]] == ["part-0-of-2", "part-1-of-2"]
    (python,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "tokens for training" in done.stdout


def test_a_missing_part_ends_with_the_code_of_data(tmp_path: Path, sources: Path) -> None:
    config = config_file(tmp_path, sources, "mix")
    words = ("prepare", config, f"data.store_dir={tmp_path / 'own'}", "--num-workers", 3)
    made = run_cli(*words, "--worker-index", "auto", "--json", JOB_COMPLETION_INDEX="1")
    part = json.loads(made.stdout)
    assert (part["worker_index"], part["num_workers"], part["cached"]) == (1, 3, False)
    missing = run_cli(*words, "--merge", check=3)
    assert "part-0-of-3: the part is missing" in missing.stderr
    assert "trainway prepare CONFIG --num-workers 3 --worker-index 0" in missing.stderr
