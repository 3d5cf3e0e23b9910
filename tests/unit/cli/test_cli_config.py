"""The program as a user meets it: verbs, three-line errors, exit codes, JSON, and a quick start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from trainway.cli import app as program
from trainway.cli.app import main
from trainway.cli.arguments import parse_count, parse_resume, parse_which, split_arguments
from trainway.config.load import ENVIRONMENT
from trainway.errors import ConfigError, DataError, EnvironmentFault, Stopped

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RUN_CONFIG", *ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainway", *words], capture_output=True, text=True, timeout=60
    )


def test_version_and_help() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, "trainway 0.1.0\n")
    done = run("--help")
    assert done.returncode == 0
    for verb in ("quickstart", "presets", "config", "train", "prepare", "eval", "generate", "runs", "export"):
        assert f"\n  {verb} " in done.stdout


VERBS = """
quickstart; presets; presets show; config check; config show; config schema; prepare; train; tokenizer train
tokenizer show; eval; generate; export; release; runs; checkpoints; compare; plan; doctor; smoke; bench
"""


@pytest.mark.parametrize("verb", VERBS.strip().replace("\n", "; ").split("; "))
def test_every_verb_has_help_with_an_example(verb: str, capsys: Capture) -> None:
    assert main([*verb.split(), "--help"]) == 0
    assert "Example: trainway " in capsys.readouterr().out


def test_presets(capsys: Capture) -> None:
    assert main(["presets"]) == 0
    assert "m3_medium" in capsys.readouterr().out
    assert main(["presets", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) >= {
        "cpu_small",
        "m3_medium",
        "runpod_1b",
        "runpod_2b",
        "runpod_4b",
    }
    assert main(["presets", "show", "runpod-2b"]) == 0
    assert "hidden_size: 2560" in capsys.readouterr().out


def test_config_check(capsys: Capture) -> None:
    assert main(["config", "check", "m3_medium"]) == 0
    assert capsys.readouterr().out == "ok: preset m3_medium, 22,026,624 parameters\n"
    assert main(["config", "check", "--json", "m3_medium", "--seed", "7"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {
        "ok": True,
        "source": "preset m3_medium",
        "parameters": {"total": 22026624, "embedding": 7864320},
    }
    assert main(["config", "check", "m3_medium", "tokenizer.path=tok"]) == 0
    assert "its tokenizer" in capsys.readouterr().out


def test_config_show(capsys: Capture) -> None:
    assert main(["config", "show", "runpod_2b", "optim.lr=1e-3", "--seed", "7"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["optim.lr"].split() == ["optim.lr", "0.001", "command", "line"]
    assert lines["seed"].split() == ["seed", "7", "command", "line"]
    assert lines["model.num_layers"].split() == ["model.num_layers", "24", "preset", "runpod_2b"]
    assert main(["config", "show", "runpod_2b", "--json", "--lr=1e-3"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["config"]["optim"]["lr"] == 1e-3
    assert answer["origins"]["optim.lr"] == "command line"
    assert answer["plan"]["parameters"]["total"] == 1_961_617_920
    assert answer["plan"]["geometry"]["global_batch_size"] == 128


def test_a_plan_of_tuning_before_the_model_is_there(capsys: Capture, tmp_path: Path) -> None:
    assert main(["config", "check", "gpt-oss-20b-lora"]) == 0
    assert capsys.readouterr().out == (
        "ok: preset gpt_oss_20b_lora, 20,914,757,184 parameters, 15,040,512 of them trained (0.072 %)\n"
    )
    assert main(["config", "check", "lora_default", "--model", "org/unheard-of"]) == 0
    assert capsys.readouterr().out == "ok: preset lora_default, as many parameters as org/unheard-of has\n"
    assert main(["train", "lora_default", "--model", "org/unheard-of", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["memory_bytes"] is None
    # a local directory's config.json says it all
    shape = {"model_type": "qwen2", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96}
    shape |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert main(["config", "show", "lora_default", "--model", str(tmp_path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["parameters"]["trainable"] == 2 * 16 * (2 * (64 + 64) + 2 * (64 + 32))
    assert main(["train", "lora_default", "--model", str(tmp_path), "--num_gpus", "2", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["geometry"]["global_batch_size"] == 32


def test_config_schema(capsys: Capture) -> None:
    assert main(["config", "schema"]) == 0
    assert "optim" in json.loads(capsys.readouterr().out)["properties"]


def test_a_config_error_is_three_lines_and_code_2(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("train:\n  total_steps: 10\n  seq_leng: 5\n")
    done = run("config", "check", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    error, why, fix = done.stderr.splitlines()
    assert error == f"error: {file}:3: there is no setting 'train.seq_leng'"
    assert why.startswith("why: train has total_steps, epochs, seq_len")
    assert fix == "fix: did you mean train.seq_len?"
    shown = run("config", "check", str(file), "--debug").stderr
    assert "Traceback" in shown
    assert shown.endswith(done.stderr)


def test_run_config_stands_in(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    # R8
    assert main(["config", "check"]) == 2
    assert "there is no CONFIG" in capsys.readouterr().err
    monkeypatch.setenv("RUN_CONFIG", "cpu_small")
    monkeypatch.setenv("RUN_EXPERIMENT", "trial-1")
    assert main(["config", "show", "--json", "--seed", "3"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["config"]["seed"], answer["config"]["name"]) == (3, "trial-1")
    assert answer["origins"]["name"] == "environment RUN_EXPERIMENT"
    assert split_arguments(["m3_medium", "a=1"], {"RUN_CONFIG": "x"}) == ("m3_medium", ["a=1"])
    assert split_arguments(["--a", "1"], {"RUN_CONFIG": "x"}) == ("x", ["--a", "1"])


def test_a_file_may_have_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    file = tmp_path / "lr=1e-3.yaml"
    file.write_text("total_steps: 5\n")
    assert split_arguments([str(file)], {}) == (str(file), [])


@pytest.mark.parametrize(
    "words", [["config", "chekc"], ["nothing"], ["config"], ["generate"], ["config", "schema", "--nope"]]
)
def test_usage_errors_are_code_2(words: list[str], capsys: Capture) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "shown"),
    [
        (ConfigError("w", "y", "f"), 2, "error: w\nwhy: y\nfix: f\n"),
        (DataError("w", fix="f"), 3, "error: w\nfix: f\n"),
        (EnvironmentFault("w"), 4, "error: w\n"),
        (Stopped(7), 75, "stopped: step 7 is saved; run the same command again to go on\n"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Abort(), 130, "interrupted\n"),
        (
            ValueError("odd"),
            1,
            "internal error: ValueError: odd (run again with --debug for the traceback)\n",
        ),
        (SystemExit(9), 9, ""),
    ],
)
def test_exit_codes(
    raised: BaseException, code: int, shown: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(words: object) -> None:
        raise raised

    monkeypatch.setattr(program.config, "split_arguments", fail)
    assert main(["config", "check", "m3_medium"]) == code
    assert capsys.readouterr().err == shown


def test_an_internal_error_shows_its_traceback_on_request(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program.config, "split_arguments", lambda words: 1 / 0)
    assert main(["config", "--debug", "check", "m3_medium"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m trainway config schema | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("{\n0\n", "")


def test_train_sorts_its_words(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []

    def start(source: str, settings: list[str], **options: object) -> int:
        options.pop("progress")
        started.append((source, settings, options))
        return 75

    monkeypatch.setattr("trainway.launch.local.start_training", start)
    words = [
        "train",
        "cpu_small",
        "--lr",
        "1e-3",
        "--nproc",
        "2",
        "--resume",
        "7",
        "--",
        "--nnodes=2",
        "--debug",
    ]
    assert main(words) == 75
    options = {"resume": 7, "allow_changes": False, "torchrun_args": ["--nnodes=2", "--debug"]}
    assert started == [("cpu_small", ["--lr", "1e-3", "engine.nproc=2"], options)]
    assert main(["train", "cpu_small", "--allow-changes"]) == 75
    assert started[1] == ("cpu_small", [], {"resume": "auto", "allow_changes": True, "torchrun_args": []})
    assert main(["train", "cpu_small", "batch_size=8", "--nproc", "2", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["geometry"]["world_size"] == 2
    assert main(["train", "cpu_small", "--nproc", "3", "--dry-run"]) == 2
    assert "16 is not divisible by 16 rows x 3 ranks" in capsys.readouterr().err
    assert main(["train", "cpu_small", "--resume", "soon"]) == 2
    assert len(started) == 2


def test_the_flags_of_the_reference_launcher(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    # R30
    words = ["train", "gpt_oss_20b_lora", "--num_gpus", "2", "--include_gpus", "0,1", "--no_push_to_hub"]
    assert main([*words, "--no_evaluation", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["geometry"]["global_batch_size"] == 32
    assert main(["train", "gpt_oss_20b_lora", "--include_gpus=0,1,2,3", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["geometry"]["world_size"] == 4
    assert main(["train", "gpt_oss_20b_lora", "--include_gpus=0,1", "--num_gpus=4"]) == 2
    assert "engine.gpus names 2 (0, 1), for 4 processes" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr("trainway.launch.local.check_requirements", lambda config: None)
    assert main(["train", "gpt_oss_20b_lora", "--include_gpus=0,5"]) == 2
    assert "engine.gpus names 5\nwhy: CUDA_VISIBLE_DEVICES shows 0, 1 alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--hf_token", "TOKEN"], ["--hf-token=TOKEN"], ["--run-name", "TOKEN"], ["TOKEN"]]
)
def test_a_token_on_the_command_line_is_nowhere_repeated(words: list[str]) -> None:
    # R30 and the table of threats
    token = "hf_" + "Zq7" * 12
    done = run("train", "lora_default", *(word.replace("TOKEN", token) for word in words), "--debug")
    assert done.returncode == 2
    assert "is a secret, not a setting" in done.stderr
    assert "hf auth login" in done.stderr
    assert token not in done.stdout + done.stderr


def test_words_with_a_meaning() -> None:
    assert [parse_resume(word) for word in ("auto", "never", "0500")] == ["auto", "never", 500]
    assert [parse_count(word) for word in ("auto", "4")] == ["auto", 4]
    assert [parse_which(word) for word in ("best", "latest", "7")] == ["best", "latest", 7]
    for parse, word in ((parse_resume, "x"), (parse_count, "0"), (parse_which, "-1")):
        with pytest.raises(ConfigError):
            parse(word)
