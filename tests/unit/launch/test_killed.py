"""A rank that SIGKILL has ended: the agent tells it apart, and the launcher says what it most likely was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.config.test_load import load
from trainway.errors import EnvironmentFault, ExitCode
from trainway.launch import killed, local
from trainway.launch.agent import _exit_code
from trainway.launch.killed import killed_fault


def test_the_agent_tells_a_killed_rank_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code({0: -signal.SIGTERM, 1: -signal.SIGKILL}) == local.KILLED == 137
    assert "rank 1 was ended by SIGKILL" in capsys.readouterr().err
    # a rank that says why it fell wins
    assert _exit_code({0: 3, 1: -signal.SIGKILL}) == 3
    assert _exit_code({0: 1, 1: -signal.SIGTERM}) == ExitCode.INTERNAL
    assert _exit_code({0: -signal.SIGSEGV}) == ExitCode.INTERNAL


@pytest.mark.slow
def test_a_real_rank(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text("import os, signal, time\n\nif os.environ['RANK'] == '1':\n"
                      "    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)\n")  # fmt: skip
    words = [sys.executable, "-m", "trainway.launch.agent", "--standalone", "--nproc-per-node=2", str(script)]
    environ = {key: value for key, value in os.environ.items() if key != local.PARENT}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == local.KILLED, done.stderr
    assert "rank 1 was ended by SIGKILL" in done.stderr


def test_the_launcher_points_to_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    popen = subprocess.Popen
    ended = [sys.executable, "-c", f"raise SystemExit({local.KILLED})"]
    monkeypatch.setattr(local.subprocess, "Popen", lambda command, **options: popen(ended))
    monkeypatch.setattr(killed, "visible_gpus", list)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(EnvironmentFault) as caught:
        local.start_training("cpu_small", ["engine.nproc=2", "global_batch_size=32"])
    assert caught.value.what == "a process of the run was killed from outside (SIGKILL)"
    assert caught.value.why.startswith(
        "the kernel does that when the machine's memory is full; the plan: about 0."
    )
    assert caught.value.why.endswith(", of 2 ranks")
    assert "the same command goes on from the last checkpoint" in caught.value.fix
    assert "train.micro_batch_size=1 train.grad_accum_steps=16 saves 0." in caught.value.fix


def test_an_end_that_was_asked_for_is_none_of_it() -> None:
    agent = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({local.KILLED})"])
    stop = local._Stop(agent)
    stop.asked = True
    assert stop.exit_code() == ExitCode.INTERNAL


def test_with_gpus_it_is_what_lies_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(killed, "visible_gpus", lambda: ["0"])
    fault = killed_fault(load("gpt_oss_20b_full"), 4)
    assert "the plan puts 77.91 GiB a rank there" in fault.why
    unknown = killed_fault(load("gpt_oss_20b_full", ["model.path=org/unheard-of"]), 4)
    assert unknown.why == "the kernel does that when the machine's memory is full"
