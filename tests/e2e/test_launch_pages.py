"""Every command of docs/launch.md, docs/ssh.md and docs/pod.md is run, or dry-run where it would rent or enter a machine.

Requests are those that the real targets would send; jobs that the pages take `up` run at a target that keeps its machines
in memory; commands of other programs are given to those programs where they can be asked without doing anything.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import typer.main
import yaml
from pyarrow import parquet

from tests.pod_material import orders_for
from tests.sft_material import conversations
from tests.unit.jobs.test_verbs import MemoryTarget
from trainway.cli.app import app, main
from trainway.jobs import verbs
from trainway.jobs.load import load_job
from trainway.jobs.orders import JobDir, PodState

ROOT = Path(__file__).parents[2]
PAGES = ("launch", "ssh", "pod")
JOB_VERBS = {"up", "logs", "status", "tunnel", "ssh", "stop", "down", "cost", "reap"}


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


def commands(name: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page(name), re.S)
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def parsed(words: list[str]) -> None:
    """See that the program knows the verb, its options and how many arguments it takes; nothing is run."""
    group = typer.main.get_command(app)
    verb, *rest = words
    known = getattr(group, "commands", {})
    assert verb in known, f"there is no `trainway {verb}`"
    if inner := getattr(known[verb], "commands", None):
        assert rest and rest[0] in inner, f"there is no `trainway {shlex.join(words[:2])}`"
        inner[rest[0]].make_context(rest[0], rest[1:])
    else:
        known[verb].make_context(verb, rest)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages are read in: the project's own directory, with the data that their jobs name."""
    for name in ("src", "scripts", "images"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for path in (tmp_path / "src/trainway/jobs/examples").glob("*.yaml"):
        if path.name != "runpod-1b.yaml":  # the page copies that one
            shutil.copy(path, tmp_path)
    for name in ("out", "data"):
        (tmp_path / name).mkdir()
    conversations(tmp_path / "out" / "chats.sft.jsonl")
    for name in ("raw_corpus.txt", "chats.jsonl"):
        (tmp_path / name).write_text("{}\n")
    rows = pyarrow.table({"content": ["question"], "teacher_response": ["answer"]})
    for name in ("train", "val"):
        parquet.write_table(rows, tmp_path / "data" / f"{name}.parquet")
    (tmp_path / "job.yaml").write_text("name: my-job\nconfig: m3_medium\ntarget: local\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINWAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789")
    monkeypatch.setattr("trainway.doctor.checks.refuse_logins", lambda config, environ: None)
    return tmp_path


def run_verb(words: list[str], target: MemoryTarget) -> None:
    """A verb of a job: a dry run at its real target, all else at `target`."""
    if "--dry-run" in words:
        assert main(words) == 0
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verbs, "target_of", lambda name: target)
        code = main([*words, "--yes"] if words[0] in ("up", "reap") else words)
    assert code == (7 if words[0] == "ssh" else 0)  # of the command there


def run_trainway(words: list[str], target: MemoryTarget) -> None:
    words = [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else [word])]
    parsed(words)
    if words[0] in JOB_VERBS:
        run_verb(words, target)
    elif words[0] in ("plan", "data"):
        assert main(words) == 0


def run_image(words: list[str], folder: Path) -> None:
    engine = folder / "engine"
    engine.write_text(f'#!/bin/sh\necho "$@" >> {folder}/built\n')
    engine.chmod(0o755)
    environ = {**os.environ, "TRAINWAY_IMAGE_ENGINE": str(engine)}
    subprocess.run(words, check=True, capture_output=True, env=environ, timeout=60)
    pushed = words[words.index("--push") + 1] if "--push" in words else "--tag"
    assert pushed in (folder / "built").read_text().splitlines()[-1]


def run_other(line: str, folder: Path) -> None:
    """A command of another program, as far as it can be asked without doing it."""
    words = shlex.split(line)
    match words:
        case ["bash", "scripts/image.sh", *_]:
            run_image(words, folder)
        case ["cp", *_]:
            subprocess.run(["sh", "-c", line], check=True, timeout=60)
        case ["kubectl", "-n", space, "create", "secret", "generic", name, file]:
            spec = load_job("kubernetes-lora.yaml").spec
            assert spec.kubernetes.namespace == space
            assert spec.secrets["HF_TOKEN"] == f"{name}/{file.removeprefix('--from-file=').partition('=')[0]}"
        case ["ssh-keygen", *_]:
            subprocess.run([*words, "-q", "-N", "", "-f", str(folder / "key")], check=True, timeout=60)
        case ["ssh-copy-id", _]:
            pass  # it has no way to be asked alone, and no option is given
        case ["ssh", where, *_]:
            subprocess.run(["ssh", "-G", where], check=True, capture_output=True, timeout=60)
        case _:
            pytest.fail(f"nobody runs this: {line}")


@pytest.mark.parametrize("name", ["launch", "ssh"])
def test_the_verbs_of_a_page_are_taken_in_their_order(
    name: str, checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if name == "ssh":
        (block,) = re.findall(r"```yaml\n(.*?)```", page(name), re.S)
        (checkout / "job.yaml").write_text(block)
        (checkout / "run.yaml").write_text(yaml.safe_dump({"extends": "lora_default"}))
        shutil.copy(checkout / "src/trainway/config/presets/lora_default.yaml", checkout / "run.yaml")
        if shutil.which("ssh") is None:
            pytest.skip("ssh is not installed")
    target, run = MemoryTarget(), 0
    for line in commands(name):
        program, *words = shlex.split(line)
        if program == "trainway":
            try:
                run_trainway(words, target)
            except (AssertionError, Exception) as error:
                raise AssertionError(f"{line}: {error}\n{''.join(capfd.readouterr())}") from error
        else:
            run_other(line, checkout)
        run += 1
    assert run == len(commands(name)) >= 11
    assert "canary" not in "".join(capfd.readouterr())


def test_a_dry_run_shows_what_each_quick_start_would_send(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every file that the table names, not of those alone that a command dry-runs."""
    files = re.findall(r"`(src/trainway/jobs/examples/[\w-]+\.yaml)`", page("launch"))
    assert len(files) == 7
    for file in files:
        shutil.copy(checkout / file, checkout / Path(file).name)
        assert main(["up", Path(file).name, "--dry-run", "--json"]) == 0, file
        assert json.loads(capsys.readouterr().out), file


def test_the_supervisor_takes_its_orders_as_the_page_says(checkout: Path) -> None:
    orders = orders_for(checkout)
    (checkout / "orders.json").write_text(orders.model_dump_json())
    job_dir = JobDir.of(checkout, orders.job)
    job_dir.path.mkdir(parents=True)
    over = PodState(job="try", stage="ended", outcome="done", began=0, updated=1)
    job_dir.state.write_text(over.model_dump_json())
    (line,) = [line for line in commands("pod") if "trainway.pod" in line]
    words = [sys.executable if word == "python" else word for word in shlex.split(line)]
    by_file = subprocess.run(words, capture_output=True, text=True, timeout=100)
    environ = {**os.environ, "TRAINWAY_ORDERS": orders.model_dump_json()}
    by_variable = subprocess.run(words[:-1], capture_output=True, text=True, timeout=100, env=environ)
    for done in (by_file, by_variable):
        assert (done.returncode, done.stderr) == (0, "") and "is over already (done)" in done.stdout


def test_a_bare_machine_is_made_ready_by_commands_that_exist(checkout: Path) -> None:
    (script,) = [shlex.split(line) for line in commands("pod") if "bootstrap.sh" in line]
    text = (ROOT / script[1]).read_text()
    for option in (word for word in script if word.startswith("--")):
        assert f"{option})" in text, option
    subprocess.run(["sh", "-n", script[1]], check=True, timeout=60)
    (verb,) = [shlex.split(line)[1:] for line in commands("pod") if line.startswith("trainway bootstrap")]
    parsed(verb)


@pytest.mark.parametrize("name", PAGES)
def test_commands_within_the_text_can_be_typed(name: str) -> None:
    prose = re.sub(r"```.*?```", "", page(name), flags=re.S)
    found = [shlex.split(line)[1:] for line in re.findall(r"`(trainway [a-z][^`]*)`", prose)]
    stand_ins = {"N": "1", "NAME": "A100"}
    for words in found:
        if words[1:] or words[0] in ("doctor", "status", "reap", "cost"):
            parsed([stand_ins.get(word, word.rstrip(".")) for word in words])
        else:
            assert words[0] in getattr(typer.main.get_command(app), "commands", {}), words
    assert found or name == "ssh"
