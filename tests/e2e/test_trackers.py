"""Every tracker holds what metrics.jsonl holds, read back by its own reader; none of them touches the training."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import (
    kill_all,
    launch,
    metrics,
    once,
    run_cli,
    shared,
    stream,
    tiny,
    wait_for,
    write_config,
)
from tests.tracker_readers import (
    mlflow_points,
    recorded,
    tensorboard_points,
    trackio_points,
    wandb_points,
    wandb_records,
)

CANARY, ODD_CANARY = "hf_" + "c4nary" * 6, "a-secret-of-no-known-kind-77"
KEY = "c0ffee12" * 5
"""A key of Weights & Biases has 40 hex digits."""
SECRETS = {"HF_TOKEN": CANARY, "LAB_PASSWORD": ODD_CANARY, "WANDB_API_KEY": KEY}
NAME = "run $(touch x);'\"<script>"
SERVER_S = 300
STEPS = 800
"""Of a run that lives long enough to be interrupted."""


def places(folder: Path) -> dict[str, str]:
    """Environment of trackers that keep everything in `folder`."""
    return {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "TRACKIO_DIR": str(folder / "trackio"),
    }


def tracked(
    corpus: Path, stores: Path, run: Path, *trackers: str, wait_s: float = 120, **train: object
) -> dict[str, Any]:
    tracking = {"report_to": list(trackers), "wait_s": wait_s, "tags": ["a", "b"], "group": "g"}
    config = {**tiny(corpus, stores, run, **train), "tracking": tracking}
    if "total_steps" in train:  # a long one, of short steps
        config |= {
            "checkpoint": {"save_every": 100},
            "eval": {"every": 100, "max_new_tokens": 1, "num_samples": 1},
        }
    return config


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


@pytest.fixture(scope="module")
def plain(corpus: Path, store_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that no tracker follows."""
    run = shared(tmp_path_factory, "untracked") / "run"
    config = tracked(corpus, store_dir, run)
    return once(run, lambda: run_cli("train", write_config(run.parent / "c.yaml", config)))


def run_id(run: Path) -> str:
    found: str = json.loads((run / "tracker-mlflow.json").read_text())["id"]
    return found


def same_in_single_precision(
    found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]
) -> bool:
    """TensorBoard keeps 32 bits of a number."""
    return found == {
        step: {name: float(np.float32(value)) for name, value in row.items()}
        for step, row in expected.items()
    }


def test_all_trackers_at_once(corpus: Path, store_dir: Path, tmp_path: Path, plain: Path) -> None:
    names = [name for name in ("wandb", "trackio") if installed(name)]
    if installed("mlflow", "sqlalchemy", "alembic"):
        names.append("mlflow")
    run = tmp_path / NAME
    config = tracked(corpus, store_dir, run, "tensorboard", *names)
    config["description"] = f"with {CANARY}"
    config["tracking"]["project"] = "lab"
    config["tracking"]["tags"] = ["a", ODD_CANARY]
    environ = {**places(tmp_path), **SECRETS}
    done = run_cli("train", write_config(tmp_path / "c.yaml", config), **environ)
    assert "lost" not in done.stderr and "lacks" not in done.stderr, done.stderr
    assert stream(run) == stream(plain)
    expected = recorded(run)
    assert sorted(expected) == list(range(21)) and {"val/loss", "train/loss", "optim/lr"} <= set(expected[10])
    assert same_in_single_precision(tensorboard_points(run), expected)
    if "wandb" in names:
        assert wandb_points(run) == expected
        (described,) = [record.run for record in wandb_records(run) if record.HasField("run")][:1]
        assert (described.project, described.display_name, described.run_group) == ("lab", NAME, "g")
        assert list(described.tags) == ["a", "***"]
        held = {update.key: json.loads(update.value_json) for update in described.config.update}
        assert held["model"]["hidden_size"] == 32 and held["description"] == "with ***"
    if "trackio" in names:
        assert trackio_points(tmp_path / "trackio" / "lab.db", NAME) == expected
    if "mlflow" in names:
        check_mlflow(environ["MLFLOW_TRACKING_URI"], run, expected)
    for path in [*tmp_path.rglob("*")]:
        if (
            path.is_file()
            and path not in (run / "config.yaml", tmp_path / "c.yaml")
            and "checkpoints" not in path.parts
        ):
            content = path.read_bytes()
            for secret in (CANARY, ODD_CANARY, KEY):
                assert secret.encode() not in content, path
    if "wandb" in names:
        check_sync_is_idempotent(run, ["wandb"], environ)


def check_mlflow(uri: str, run: Path, expected: dict[int, dict[str, float]]) -> None:
    from mlflow import MlflowClient

    assert mlflow_points(uri, run_id(run)) == expected
    held = MlflowClient(tracking_uri=uri).get_run(run_id(run))
    assert held.info.status == "FINISHED" and held.info.run_name == NAME
    assert held.data.params["model.hidden_size"] == "32" and held.data.params["description"] == "with ***"
    assert held.data.tags["trainway.group"] == "g" and held.data.tags["a"] == "true"


def check_sync_is_idempotent(run: Path, names: list[str], environ: dict[str, str]) -> None:
    done = run_cli("runs", "sync", run, "--json", "--to", ",".join(names), **environ)
    found = {item["tracker"]: (item["state"], item["steps_to"]) for item in json.loads(done.stdout)}
    assert found == dict.fromkeys(names, ("complete", None))


class Silent:
    """A server that takes connections and never says a word."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.taken: list[socket.socket] = []
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        with suppress(OSError):
            while True:
                self.taken.append(self._listening.accept()[0])

    def close(self) -> None:
        for connection in (*self.taken, self._listening):
            connection.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_servers_that_never_answer_reach_no_step(
    corpus: Path, store_dir: Path, tmp_path: Path, plain: Path
) -> None:
    names = [name for name in ("wandb", "mlflow") if installed(name)]
    server, run = Silent(), tmp_path / "run"
    environ = {"MLFLOW_TRACKING_URI": server.url, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    config = write_config(tmp_path / "c.yaml", tracked(corpus, store_dir, run, *names, wait_s=0))
    try:
        done = run_cli("train", config, **environ)
    finally:
        server.close()
    assert stream(run) == stream(plain)
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    for name in names:
        assert f"complete it with: trainway runs sync {run} --to {name}" in done.stderr
    if "wandb" in names:
        # the command that it names does what it says, here with what needs no server
        done = run_cli("runs", "sync", run, "--to", "wandb", WANDB_MODE="offline")
        assert wandb_points(run) == recorded(run), done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_gone_on_without_a_gap_or_a_double(corpus: Path, store_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy")
    run, environ = tmp_path / "run", places(tmp_path)
    config = write_config(
        tmp_path / "c.yaml", tracked(corpus, store_dir, run, "wandb", "mlflow", "trackio", total_steps=STEPS)
    )
    process = launch(config, **environ)

    def all_hold_something() -> bool:
        if not (run / "tracker-mlflow.json").exists() or not list((tmp_path / "trackio").glob("*.db")):
            return False
        if "id" not in (run / "tracker-mlflow.json").read_text():
            return False
        with suppress(Exception):  # a table that is not there yet
            held = mlflow_points(environ["MLFLOW_TRACKING_URI"], run_id(run))
            return len(held) > 20 and len(trackio_points(tmp_path / "trackio" / "trainway.db", "run")) > 20
        return False

    wait_for(all_hold_something, process, SERVER_S)
    kill_all(process)
    run_cli("train", config, **environ)
    expected = recorded(run)
    assert sorted(expected) == list(range(STEPS + 1))
    assert wandb_points(run) == expected, "offline, the directory is written anew"
    for found in (
        mlflow_points(environ["MLFLOW_TRACKING_URI"], run_id(run)),
        trackio_points(tmp_path / "trackio" / "trainway.db", "run"),
    ):
        assert {step: set(row) for step, row in found.items()} == {
            step: set(row) for step, row in expected.items()
        }
        # steps that were taken twice show the times of the first attempt, and everything else is the same
        assert all(
            row[name] == value for step, row in expected.items() for name, value in found[step].items()
            if not name.startswith("perf/")
        )  # fmt: skip
    check_sync_is_idempotent(run, ["wandb", "mlflow", "trackio"], environ)


class Server:
    """MLflow's own server on a database in `folder`."""

    def __init__(self, program: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._program, self._folder = program, folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = f"sqlite:///{self._folder / 'server.db'}"
        command = [
            self._program,
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self._port),
            "--workers",
            "1",
        ]
        # what this environment says of Python is not for the server's
        environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        log = (self._folder / "server.log").open("ab")
        self._process = subprocess.Popen(
            [*command, "--backend-store-uri", store],
            stdout=log,
            stderr=log,
            env=environ,
            start_new_session=True,
        )
        end = time.monotonic() + SERVER_S
        while not self._answers():
            assert time.monotonic() < end, (self._folder / "server.log").read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            kill_all(self._process)

    def _answers(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
            return bool(response.status == 200)
        return False


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    program = os.environ.get("TRAINWAY_MLFLOW") or shutil.which("mlflow")
    if (
        program is None
        or "server" not in subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    ):
        pytest.skip("needs the program mlflow with its server (TRAINWAY_MLFLOW)")
    server = Server(program, tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mlflows_server_killed_and_started_again(
    corpus: Path, store_dir: Path, tmp_path: Path, server: Server
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    config = tracked(corpus, store_dir, run, "mlflow", wait_s=1, total_steps=STEPS)
    process = launch(write_config(tmp_path / "c.yaml", config), MLFLOW_TRACKING_URI=server.url)

    def holds_something() -> bool:
        if (
            not (run / "tracker-mlflow.json").exists()
            or "id" not in (run / "tracker-mlflow.json").read_text()
        ):
            return False
        return len(mlflow_points(server.url, run_id(run))) > 20

    wait_for(holds_something, process, SERVER_S)
    server.kill()
    at = metrics(run)[-1]["step"]
    assert process.wait(600) == 0
    assert isinstance(at, int) and at < STEPS, "the run was over before the server was killed"
    untracked = tracked(corpus, store_dir, other, total_steps=STEPS)
    run_cli("train", write_config(tmp_path / "other.yaml", untracked))
    assert stream(run) == stream(other)
    log = (tmp_path / "launch.log").read_text()
    assert log.count("MLflow is lost") == 1
    assert f"complete it with: trainway runs sync {run} --to mlflow" in log
    assert run_cli("runs", "sync", run, check=4, MLFLOW_TRACKING_URI=server.url).stdout.startswith(
        f"{run}: mlflow is not complete: "
    )
    server.start()
    held = mlflow_points(server.url, run_id(run))
    assert 20 < len(held) < STEPS + 1
    done = run_cli("runs", "sync", run, MLFLOW_TRACKING_URI=server.url)
    assert f"{run}: mlflow is complete, sent up to step {STEPS}" in done.stdout
    assert mlflow_points(server.url, run_id(run)) == recorded(run)
    check_sync_is_idempotent(run, ["mlflow"], {"MLFLOW_TRACKING_URI": server.url})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mlflow_is_back_before_the_run_ends(
    corpus: Path, store_dir: Path, tmp_path: Path, server: Server
) -> None:
    run = tmp_path / "run"
    config = tracked(corpus, store_dir, run, "mlflow", total_steps=2 * STEPS)
    process = launch(write_config(tmp_path / "c.yaml", config), MLFLOW_TRACKING_URI=server.url)
    log = tmp_path / "launch.log"
    wait_for(lambda: "MLflow: http" in log.read_text(), process, SERVER_S)
    server.kill()
    wait_for(lambda: "MLflow is lost" in log.read_text(), process, SERVER_S)
    server.start()
    assert process.wait(600) == 0
    text = log.read_text()
    assert text.count("MLflow is lost") == text.count("MLflow is back") == 1 and "lacks" not in text
    assert mlflow_points(server.url, run_id(run)) == recorded(run)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mlflow_keeps_one_of_equal_points(tmp_path: Path, server: Server) -> None:
    """What sending again after a lost answer relies on."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(tracking_uri=server.url)
    made = client.create_run("0").info.run_id
    for _ in range(2):
        client.log_batch(
            made, metrics=[Metric("train/loss", 0.1 + 0.2, 1000 + step, step) for step in range(5)]
        )
    assert mlflow_points(server.url, made) == {step: {"train/loss": 0.1 + 0.2} for step in range(5)}
