"""The boot of an experiment: every stage once, nothing twice, damage named, an interruption gone on from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.conftest import run_cli, stream, tiny, write_config
from trainway.config.load import load_config

STAGES = ["directories", "shards", "tokenizer", "configs", "prepare", "train"]
NAME = "exp-1"


def write_text(path: Path, size: int) -> Path:
    """Real text: modules of Python and of the libraries installed beside it, one record each, up to `size` bytes."""
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    written = 0
    with path.open("w") as file:
        for source in (source for root in roots for source in sorted(root.rglob("*.py"))):
            data = source.read_bytes()
            if not data.isascii() or not 100 < len(data) < 200_000 or b"\0" in data:
                continue
            file.write(json.dumps({"text": data.decode()}) + "\n")
            written += len(data)
            if written >= size:
                return path
    pytest.skip(f"only {written} bytes of source are installed here")


def config_file(path: Path, **more: object) -> Path:
    config = tiny(Path("x"), Path("x"), Path("x"), total_steps=6)
    del config["run_dir"]
    config["data"] = {"val_ratio": 0.1}
    config["schedule"] = {"warmup_steps": 2}
    config["checkpoint"] = {"save_every": 3}
    config["eval"] = {"every": 10, "max_tokens": 4000, "num_samples": 0}
    return write_config(path, {**config, **more})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "input.jsonl", 1_000_000)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A directory with a configuration, the input and a volume on which everything is done."""
    home = tmp_path_factory.mktemp("home")
    config_file(home / "tiny.yaml")
    (home / "volume").mkdir()
    states, _ = boot(home, text, "--experiment", NAME)
    assert states == dict.fromkeys(STAGES, "done")
    return home


def command(home: Path, text: Path | None, *words: object) -> list[str]:
    given = ["--input", str(text)] if text else []
    head = [
        "orchestrate",
        "--mode",
        "cloud",
        "--root",
        str(home / "volume"),
        "--config",
        str(home / "tiny.yaml"),
    ]
    return [*head, *given, "--train-shard-lines", "40", "--json", *map(str, words)]


def boot(
    home: Path, text: Path | None, *words: object, check: int = 0, **environ: str
) -> tuple[dict[str, str], str]:
    """(state of each stage, what was said) of one call."""
    done = run_cli(*command(home, text, *words), check=check, OMP_NUM_THREADS="1", **environ)
    stages = json.loads(done.stdout)["stages"] if done.stdout else []
    return {item["stage"]: item["state"] for item in stages}, done.stderr


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    """The same with a volume of its own; the paths in its configurations are still right."""
    shutil.copytree(home, tmp_path / "home", symlinks=True)
    for file in (tmp_path / "home/volume/runs" / NAME).glob("*.yaml"):
        file.write_text(file.read_text().replace(str(home), str(tmp_path / "home")))
    return tmp_path / "home"


def test_the_layout_of_the_volume(home: Path) -> None:
    volume = home / "volume"
    for folder in ("datasets/train", "datasets/val", "artifacts/tokenizer", "runs", "cache"):
        assert (volume / folder / NAME).is_dir(), folder
    assert (volume / "hf_cache").is_dir()
    shards = list((volume / "datasets/train" / NAME).glob("shard-*.jsonl"))
    manifest = json.loads((volume / "datasets/train" / NAME / "manifest.json").read_text())
    assert len(shards) == len(manifest["shards"]) > 1
    assert (volume / "artifacts/tokenizer" / NAME / "tokenizer.json").is_file()
    assert (volume / "runs" / NAME / "checkpoints/latest/model/model.safetensors").is_file()


def test_nothing_of_the_input_is_lost(home: Path, text: Path) -> None:
    def texts(files: list[Path]) -> list[str]:
        return sorted(json.loads(line)["text"] for file in files for line in file.open())

    written = sorted((home / "volume/datasets").rglob("shard-*.jsonl"))
    assert {path.parent.parent.name for path in written} == {"train", "val"}
    assert texts(written) == texts([text])


def test_both_configurations_load_to_the_run(home: Path) -> None:
    run = home / "volume/runs" / NAME
    loaded = {kind: load_config(run / f"training.{kind}", environ={}).config for kind in ("yaml", "toml")}
    assert loaded["yaml"] == loaded["toml"]
    trained = yaml.safe_load((run / "config.yaml").read_text())
    assert trained["train"]["total_steps"] == loaded["toml"].train.total_steps == 6
    assert loaded["toml"].run_dir == trained["run_dir"] == str(run)
    assert loaded["toml"].data.validation == (str(home / "volume/datasets/val" / NAME),)


def test_a_second_call_skips_everything_and_changes_nothing(home: Path, text: Path) -> None:
    def files() -> dict[str, tuple[int, int]]:
        volume = home / "volume"
        found = [path for path in volume.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}

    before = files()
    states, said = boot(home, text, "--experiment", NAME)
    assert states == dict.fromkeys(STAGES, "skipped")
    assert said.count("complete and verified") == 5  # of the directories there is nothing to verify
    assert files() == before


def test_what_is_there_is_reused_without_the_input(home: Path, text: Path) -> None:
    for words in (("--reuse-shards",), ()):
        states, _ = boot(home, None, "--experiment", NAME, *words)
        assert set(states.values()) == {"skipped"}
    states, _ = boot(home, text.with_name("deleted.jsonl"), "--experiment", NAME)
    assert set(states.values()) == {"skipped"}


@contextmanager
def flipped(path: Path, at: int) -> Iterator[bytes]:
    """One bit of a file of the volume, turned for a while."""
    before = path.read_bytes()
    data = bytearray(before)
    data[at] ^= 1
    path.write_bytes(data)
    try:
        yield bytes(data)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_flipped_bit_in_a_shard_is_named(home: Path, text: Path, part: str, reuse: bool) -> None:
    shard = sorted((home / "volume/datasets" / part / NAME).glob("shard-*"))[-1]
    with flipped(shard, 1000) as data:
        _, said = boot(home, None if reuse else text, "--experiment", NAME, check=3)
        assert shard.read_bytes() == data  # nothing was repaired or removed without a word
    assert str(shard) in said and "Traceback" not in said


@pytest.mark.parametrize(
    "damaged",
    [
        f"artifacts/tokenizer/{NAME}/tokenizer.json",
        f"cache/{NAME}/*/train-00000.bin",
        f"runs/{NAME}/checkpoints/step-6/model/model.safetensors",
    ],
)
def test_damage_of_other_stages_is_named(home: Path, text: Path, damaged: str) -> None:
    (path,) = (home / "volume").glob(damaged)
    with flipped(path, -2):
        _, said = boot(home, text, "--experiment", NAME, check=3)
    assert path.name in said


def test_other_input_and_other_settings_are_refused(home: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "something else"}\n')
    boot(home, other, "--experiment", NAME, check=3)
    _, said = boot(home, text, "--experiment", NAME, "--gzip", check=2)
    assert "gzip" in said
    before = (home / "volume/runs" / NAME / "training.yaml").read_bytes()
    _, said = boot(home, text, "--experiment", NAME, "optim.lr=1e-4", check=2)
    assert "optim.lr: 0.003 -> 0.0001" in said
    assert (home / "volume/runs" / NAME / "training.yaml").read_bytes() == before


def test_a_configuration_that_changes_before_training_is_kept(tmp_path: Path, text: Path) -> None:
    config_file(tmp_path / "tiny.yaml")
    (tmp_path / "volume").mkdir()
    boot(tmp_path, text, "--experiment", NAME, "--no-train")
    run = tmp_path / "volume/runs" / NAME
    before = {kind: (run / f"training.{kind}").read_text() for kind in ("yaml", "toml")}
    states, said = boot(tmp_path, text, "--experiment", NAME, "--no-train", "optim.lr=1e-4", "total_steps=9")
    assert states == {**dict.fromkeys(STAGES[:-1], "skipped"), "configs": "done"}
    assert "optim.lr: 0.003 -> 0.0001" in said and "train.total_steps: 6 -> 9" in said
    assert {kind: (run / f"training.{kind}.before").read_text() for kind in before} == before
    assert load_config(run / "training.toml", environ={}).config.optim.lr == 1e-4


@pytest.mark.parametrize("part", ["train", "val"])
def test_shards_that_were_not_finished_are_not_reused(copy: Path, part: str) -> None:
    path = copy / "volume/datasets" / part / NAME / "manifest.json"
    path.write_text(path.read_text().replace('"complete": true', '"complete": false'))
    _, said = boot(copy, None, "--experiment", NAME, check=3)
    assert "are not complete" in said and str(path) in said and "--input" in said


def interrupted(home: Path, text: Path, after: str, name: int, *words: str) -> tuple[int, str]:
    """Run, send the signal when a line of standard error holds `after`; exit code and all that was said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trainway", *command(home, text, "--experiment", NAME, *words)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    lines, sent = [], False
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if after in line and not sent:
            process.send_signal(name)
            sent = True
    watchdog.cancel()
    assert sent, lines
    return process.wait(), "".join(lines)


@pytest.mark.parametrize(
    ("after", "name", "words"),
    [
        ("sharding /", signal.SIGTERM, ()),
        pytest.param("] shards: done", signal.SIGINT, (), marks=pytest.mark.slow),
        pytest.param("] directories: done", signal.SIGINT, (), marks=pytest.mark.slow),
        pytest.param("] shards: done", signal.SIGTERM, (), marks=pytest.mark.slow),
        pytest.param("] configs: done", signal.SIGTERM, (), marks=pytest.mark.slow),
        pytest.param("] prepare: done", signal.SIGTERM, (), marks=pytest.mark.slow),
        pytest.param("] step 0", signal.SIGTERM, (), marks=pytest.mark.slow),
        pytest.param("] prepare: done", signal.SIGTERM, ("--nproc", "2"), marks=pytest.mark.slow),
        pytest.param("] step 0", signal.SIGINT, ("--nproc", "2"), marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_call_is_gone_on_from(
    home: Path, tmp_path: Path, text: Path, after: str, name: int, words: tuple[str, ...]
) -> None:
    fresh = tmp_path / "home"
    (fresh / "volume").mkdir(parents=True)
    shutil.copy(home / "tiny.yaml", fresh / "tiny.yaml")
    code, said = interrupted(fresh, text, after, name, *words)
    assert code == 75, said
    assert "Traceback" not in said
    complete = [stage for stage in STAGES if f"] {stage}: done" in said]
    assert "train" not in complete
    left = [path for path in (fresh / "volume").rglob("*.tmp-*") if "checkpoints" not in str(path)]
    assert not left
    states, said = boot(fresh, text, "--experiment", NAME, *words)
    assert all(states[stage] == "skipped" for stage in complete), said
    assert states["train"] == "done"
    if words:
        return  # two ranks round otherwise
    assert stream(fresh / "volume/runs" / NAME) == stream(home / "volume/runs" / NAME)
    for path in sorted((home / "volume/datasets").rglob("shard-*")):
        relative = path.relative_to(home)
        assert (fresh / relative).read_bytes() == path.read_bytes(), relative


def test_the_environment_and_a_dotenv_choose_and_their_secrets_stay(tmp_path: Path, text: Path) -> None:
    config_file(tmp_path / "tiny.yaml")
    (tmp_path / "volume").mkdir()
    secret = "hf_" + "s3cret" * 5
    (tmp_path / ".env").write_text(
        f"export HUGGINGFACEHUB_API_TOKEN='{secret}'\nRUN_EXPERIMENT=from-file # not this\nSHARD_LINES=50\n"
        f"RUN_CONFIG={tmp_path / 'tiny.yaml'}\nTRAINWAY_ROOT={tmp_path / 'volume'}\n"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RUN_", "HF_"))}
    done = subprocess.run(
        [sys.executable, "-m", "trainway", "orchestrate", "--mode", "cloud", "--input", text, "--no-train"],
        cwd=tmp_path,
        env={
            **environ,
            "RUN_EXPERIMENT": "from-environment",
            "HF_DATASETS_CACHE": "/mine",
            "RUNPOD_POD_ID": "pod",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    volume = tmp_path / "volume"
    assert [path.name for path in (volume / "datasets/train").iterdir()] == ["from-environment"]
    manifest = json.loads((volume / "datasets/train/from-environment/manifest.json").read_text())
    assert manifest["settings"]["lines_per_shard"] == 50
    assert f"HF_HOME={volume / 'hf_cache'}" in done.stderr
    assert "HF_DATASETS_CACHE=/mine is kept as you set it" in done.stderr
    assert "HF_TOKEN is taken from HUGGINGFACEHUB_API_TOKEN" in done.stderr
    assert not (volume / "runs/from-environment/checkpoints").exists()
    assert ("is erased when the pod stops" in done.stderr) == str(tmp_path).startswith("/tmp/")
    assert secret not in done.stdout + done.stderr
    for path in volume.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_a_dataset_is_sharded_once(tmp_path: Path, text: Path) -> None:
    config_file(tmp_path / "tiny.yaml")
    (tmp_path / "volume").mkdir()
    (tmp_path / "dataset").mkdir()
    shutil.copy(text, tmp_path / "dataset/train.jsonl")
    words = ("--dataset", tmp_path / "dataset", "--experiment", "d", "--no-train")
    assert boot(tmp_path, None, *words)[0]["shards"] == "done"
    assert boot(tmp_path, None, *words)[0]["shards"] == "skipped"
    _, said = boot(tmp_path, None, "--dataset", tmp_path, *words[2:], check=2)
    assert "dataset was" in said


def test_given_validation_tokenizer_and_compressed_shards(home: Path, tmp_path: Path, text: Path) -> None:
    config_file(tmp_path / "tiny.yaml")
    (tmp_path / "volume").mkdir()
    held_out = tmp_path / "held.txt"
    held_out.write_text("A document\nof two lines.\n" * 30)
    bundle = home / "volume/artifacts/tokenizer" / NAME
    words = ("--validation", held_out, "--tokenizer-json", bundle / "tokenizer.json", "--gzip", "--no-train")
    states, _ = boot(tmp_path, text, "--experiment", "b", *words)
    assert states == dict.fromkeys(STAGES[:-1], "done")
    volume = tmp_path / "volume"
    assert sorted(path.name for path in (volume / "datasets/val/b").glob("shard-*")) == [
        "shard-00000.jsonl.gz"
    ]
    facts = json.loads((volume / "artifacts/tokenizer/b/bundle.json").read_text())
    assert facts["made_from"] == f"from {bundle / 'tokenizer.json'}"
    store = json.loads((volume / "cache/b/prepared.json").read_text())["store"]
    manifest = json.loads((volume / "cache/b" / store / "manifest.json").read_text())
    assert manifest["splits"]["val"]["documents"] == 1
    other = tmp_path / "other.json"
    other.write_text((bundle / "tokenizer.json").read_text().replace("<|pad|>", "<|other|>"))
    words = ("--validation", held_out, "--tokenizer-json", other, "--gzip", "--no-train")
    _, said = boot(tmp_path, text, "--experiment", "b", *words, check=2)
    assert "another tokenizer" in said


def test_shards_and_tokenizer_that_were_put_there(home: Path, tmp_path: Path, text: Path) -> None:
    config_file(tmp_path / "tiny.yaml")
    volume = tmp_path / "volume"
    (volume / "datasets/train/mine").mkdir(parents=True)
    shutil.copy(text, volume / "datasets/train/mine/a.jsonl")
    (volume / "artifacts/tokenizer/mine").mkdir(parents=True)
    published = home / "volume/artifacts/tokenizer" / NAME / "tokenizer.json"
    shutil.copy(published, volume / "artifacts/tokenizer/mine")
    environ = {"RUN_EXPERIMENT": "mine", "RUN_SHARD": "0"}
    states, said = boot(tmp_path, None, "--no-train", **environ)
    assert (states["shards"], states["tokenizer"], states["prepare"]) == ("skipped", "skipped", "done")
    assert "without a manifest" in said and "0.1 of the training documents are held out" in said
    (volume / "datasets/train/mine/a.jsonl").open("a").write('{"text": "one more"}\n')
    states, _ = boot(tmp_path, None, "--no-train", **environ)
    assert states["prepare"] == "done"  # what has no manifest may change, and is then prepared anew


@pytest.mark.parametrize(
    ("words", "environ", "code", "said"),
    [
        ([], {}, 3, "there are no shards"),
        (["--input", "none.jsonl"], {}, 3, "none.jsonl"),
        (["--root", "/no/such/volume"], {}, 4, "there is no directory /no/such/volume"),
        ([], {"TRAINWAY_ROOT": "/no/such/volume"}, 4, "--root DIR or TRAINWAY_ROOT"),
        (["--experiment", "../escape"], {}, 2, "--experiment is '../escape'"),
        ([], {"RUN_EXPERIMENT": "a b"}, 2, "RUN_EXPERIMENT is 'a b'"),
        ([], {"RUN_SHARD": "yes"}, 2, "RUN_SHARD is 'yes'"),
        ([], {"SHARD_LINES": "many"}, 2, "SHARD_LINES is 'many'"),
        (["--mode", "moon"], {}, 2, "--mode is 'moon'"),
        (["run_dir=/elsewhere"], {}, 2, "run_dir follows from"),
        (["optim.lrr=1"], {}, 2, "optim.lr"),
        (["--dataset", "a/b", "--input", "c"], {}, 2, "both given"),
        ([], {"RUN_SHARD": "1"}, 2, "nothing to shard"),
        ([], {"RUN_CONFIG": "runpod_9b"}, 2, "runpod_9b"),
        (["--env-file", "none.env"], {}, 2, "none.env"),
    ],
)
def test_what_cannot_work_ends_before_any_work(
    tmp_path: Path, words: list[str], environ: dict[str, str], code: int, said: str
) -> None:
    known = {
        "RUN_CONFIG": str(config_file(tmp_path / "tiny.yaml")),
        "TRAINWAY_ROOT": str(tmp_path / "volume"),
    }
    (tmp_path / "volume").mkdir()
    done = run_cli("orchestrate", *words, check=code, **{**known, **environ})
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("shard-*") if path.is_file()]


def test_an_input_too_small_to_validate_on_is_told_at_once(tmp_path: Path) -> None:
    config_file(tmp_path / "tiny.yaml")
    (tmp_path / "volume").mkdir()
    text = tmp_path / "one.txt"
    text.write_text("One document.\n")
    _, said = boot(tmp_path, text, "--no-train", "data.val_ratio=0.001", check=3)
    assert "no document fell to validation" in said and "tokenizer" not in said


@pytest.mark.slow
def test_two_nodes_on_one_volume(home: Path, tmp_path: Path, text: Path) -> None:
    """As in an Indexed Job: one node prepares, the other waits for it, and both train one run."""
    fresh = tmp_path / "home"
    (fresh / "volume").mkdir(parents=True)
    shutil.copy(home / "tiny.yaml", fresh / "tiny.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "NUM_NODES": "2"}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "trainway", *command(fresh, text, "--experiment", NAME)],
            env={**environ, "NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [node.communicate(timeout=200)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum("] shards: done" in text for text in said) == 1
    assert sum(f"another process has prepared {NAME}" in text for text in said) == 1
    for a, b in zip(stream(fresh / "volume/runs" / NAME), stream(home / "volume/runs" / NAME), strict=True):
        assert a[:2] == b[:2]
        assert a[2] == pytest.approx(b[2], rel=1e-5)


@pytest.mark.slow
def test_fifty_megabytes_of_real_text(tmp_path: Path) -> None:
    """The same at a size at which the seconds of a second call mean something: printed, for the log."""
    home = tmp_path / "home"
    (home / "volume").mkdir(parents=True)
    config_file(home / "tiny.yaml", tokenizer={"vocab_size": 4096, "sample_mib": 16})
    text = write_text(tmp_path / "input.jsonl", 50_000_000)
    states, _ = boot(home, text, "--experiment", NAME, "--train-shard-lines", 400)
    assert states == dict.fromkeys(STAGES, "done")
    done = run_cli(*command(home, text, "--experiment", NAME, "--train-shard-lines", 400))
    stages = json.loads(done.stdout)["stages"]
    assert {item["stage"]: item["state"] for item in stages} == dict.fromkeys(STAGES, "skipped")
    print({item["stage"]: item["seconds"] for item in stages})
    shard = sorted((home / "volume/datasets/train" / NAME).glob("shard-*"))[-1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    _, said = boot(home, text, "--experiment", NAME, "--train-shard-lines", 400, check=3)
    assert str(shard) in said
