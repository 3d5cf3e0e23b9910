"""A run trained by the package itself goes to a Hub on loopback by the Hub's own client, whatever breaks on the way."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import once, run_cli, shared, tiny, write_config
from tests.hub_server import Account, HubServer, serve_hub
from trainway import train
from trainway.cli.app import main
from trainway.config.load import load_config
from trainway.doctor.logins import check_push
from trainway.errors import ConfigError, DataError, EnvironmentFault, ExitCode
from trainway.release import faults
from trainway.release.allowed import CARD, SUMS
from trainway.release.generate import generate_text
from trainway.release.publish import release

TOKEN = "hf_" + "aB3" * 12
READER = "hf_" + "Rd5" * 12
REPO = "ada/tiny-code"
CANARY = "Zq7-canary-Xv93kLm2"
"""A secret of no known kind."""
FILES = {
    ".gitattributes", CARD, SUMS, "config.json", "generation_config.json", "loss.png", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "training/config.yaml", "training/metrics.jsonl",
    "training/provenance.json", "training/report.json",
}  # fmt: skip
PARTS = (
    "GET .*/refs", "GET .*/tree", r"GET /api/models/[^/]+/[^/]+$", "POST .*/create", "xet-write-token", "POST .*/preupload",
    "POST .*/batch", "PUT /lfs-put", "POST /lfs-verify", "POST .*/commit/", "POST .*/tag/", "POST .*/validate-yaml",
)  # fmt: skip
"""Of an upload, by what the client asks for."""
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path, store_dir: Path) -> Path:
    """A run of 20 steps with a name that is no harmless word; made once."""
    path = shared(tmp_path_factory, "released") / "tiny <b>$(touch x);'"
    return once(path, lambda: train(load_config(tiny(corpus, store_dir, path), environ={}).config))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The run in a directory of the test's own."""
    copy = tmp_path / trained.name
    shutil.copytree(trained, copy, symlinks=True)
    return copy


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    accounts = {TOKEN: Account("ada"), READER: Account("ada", role="read")}
    with serve_hub(HubServer(tmp_path / "hub", accounts)) as server:
        for name in ("HUGGINGFACEHUB_API_TOKEN", "HUGGINGFACE_HUB_TOKEN", "PUSH_TO_HUB"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        hasty = SimpleNamespace(
            sleep=lambda seconds: None
        )  # neither the client nor we wait between two attempts
        monkeypatch.setattr(_http, "time", hasty)
        monkeypatch.setattr(faults, "time", hasty)
        yield server


def sums(files: dict[str, bytes]) -> dict[str, str]:
    return {
        name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != ".gitattributes"
    }


def assert_complete(hub: HubServer, tag: str = "v0.1", repo: str = REPO) -> dict[str, bytes]:
    """Every file at the tag is what SHA256SUMS says, and there is no other."""
    files = hub.files(repo, tag)
    assert set(files) == FILES
    lines = (line.split("  ", 1) for line in files[SUMS].decode().splitlines())
    told = {name: digest for digest, name in lines}
    assert sums(files) == {**told, SUMS: hashlib.sha256(files[SUMS]).hexdigest()}
    assert hub.tags(repo)[tag] == (hub.load(repo) or {})["main"]
    return files


def test_a_run_is_released_and_is_a_model_there(
    hub: HubServer, run: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["release", str(run), "--repo", REPO, "--tag", "v0.1", "--licence", "mit"]
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert hub.requests == []
    assert [path.name for path in (run / "releases").iterdir()] == [".lock"]
    assert f"would go to {hub.url}/{REPO} (private), tag v0.1: 12 files" in shown
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    files = assert_complete(hub)
    assert (told["state"], told["revision"], told["step"]) == ("released", hub.tags(REPO)["v0.1"], 20)
    # the dry run has said what went: by hash, by size, and the card word for word
    rows = [line.split(maxsplit=2) for line in shown.splitlines() if len(line.split(" ")[0]) == 64]
    assert {name: digest for digest, _, name in rows} == sums(files)
    assert {name: int(size.replace(",", "")) for _, size, name in rows} == {
        name: len(data) for name, data in files.items() if name != ".gitattributes"
    }
    card = files[CARD].decode()
    assert "\n".join(f"  {line}" for line in card.splitlines()) in shown
    assert "It was trained from scratch." in card and "license: mit" in card and "<b>" not in card
    assert (hub.load(REPO) or {})["private"] is True
    # the Hub's own client brings it back, and plain transformers says what the run says
    api = HfApi(endpoint=hub.url, token=TOKEN)
    out = Path(api.snapshot_download(REPO, revision="v0.1", local_dir=tmp_path / "out"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer("document 7: the def", return_tensors="pt")["input_ids"]
    said = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0][ids.shape[1] :])
    expected = generate_text(run, "document 7: the def", max_new_tokens=12)
    assert expected and said.removesuffix("<|eos|>") == expected
    # no place on this machine, no name of it, no command line
    texts = b"".join(data for name, data in files.items() if name != "model.safetensors")
    assert str(tmp_path.parent).encode() not in texts and b"hostname" not in texts and b"argv" not in texts
    # once more: nothing changes
    before, commit = len(hub.requests), hub.tags(REPO)["v0.1"]
    assert main(words) == 0
    again = capsys.readouterr().out
    assert f"nothing to do: {REPO} holds all of it" in again and f"revision: {commit}" in again
    assert {request.split()[0] for request in hub.requests[before:]} == {"GET"}
    shutil.rmtree(run / "releases")  # nor where this machine has forgotten it
    before = len(hub.requests)
    assert release(run, repo=REPO, tag="v0.1", licence="mit").state == "unchanged"
    assert {request.split()[0] for request in hub.requests[before:]} == {"GET"}


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_cut_at_random_points_it_is_complete_in_the_end_and_tagged_only_then(
    hub: HubServer, run: Path, times: int
) -> None:
    rng = random.Random(20261122)
    cuts, number = 0, 0
    hit: set[str] = set()
    while cuts < times:
        repo, number = f"ada/cut-{number}", number + 1
        while cuts < times:
            del hub.cuts[:]
            kind = rng.choice(["before", "after", "bytes"])
            if kind == "bytes":
                hub.cut(num_bytes=rng.randrange(1, 150_000))
            else:
                hub.cut(requests=rng.randrange(0, 20), after=kind == "after")
            try:
                release(run, repo=repo, tag="v1")
            except EnvironmentFault as error:
                told, cuts = error.fix, cuts + 1
            else:
                break  # the cut would have come later
            assert hub.is_cut and "run the same command again" in told
            hit |= {part for part in PARTS if re.search(part, hub.cuts[0])}
            if (state := hub.load(repo)) is not None:
                # the branch holds nothing yet, or all; a tag is there only where all is
                assert set(hub.files(repo)) in ({".gitattributes"}, FILES)
                assert not state["tags"] or assert_complete(hub, "v1", repo)
        hub.mend()
        told = release(run, repo=repo, tag="v1")
        assert told.revision == hub.tags(repo)["v1"]
        files = assert_complete(hub, "v1", repo)
        assert sums(files) == {file.path: file.sha256 for file in told.files}
        assert len((hub.load(repo) or {})["commits"]) == 2  # the empty one, and one
    assert len(hit) >= (6 if times == 20 else 1), hit


@pytest.mark.slow
def test_what_has_arrived_is_not_sent_again(hub: HubServer, run: Path) -> None:
    hub.force("POST .*/commit/", 400, "not today")
    with pytest.raises(ConfigError, match="does not take"):
        release(run, repo=REPO, tag="v0.1")
    assert sum(request.startswith("PUT ") for request in hub.requests) == 2  # weights and picture
    del hub.requests[:]
    release(run, repo=REPO, tag="v0.1")
    assert not [request for request in hub.requests if request.startswith("PUT ")]
    assert_complete(hub)


@pytest.mark.parametrize(
    ("pattern", "status", "more"),
    [
        ("POST .*/commit/", 500, {"times": 2}),
        ("POST .*/commit/", 504, {"after": True}),  # done, and the answer lost
        ("POST .*/tag/", 503, {"after": True}),
        pytest.param("POST .*/commit/", 412, {}, marks=pytest.mark.slow),
        pytest.param("POST /api/repos/create", 502, {"after": True}, marks=pytest.mark.slow),
        pytest.param(
            "GET .*/refs", 429, {"headers": {"Retry-After": "1"}, "times": 3}, marks=pytest.mark.slow
        ),
        pytest.param("PUT /lfs-put", 500, {"times": 2}, marks=pytest.mark.slow),
        pytest.param("POST .*/preupload", 408, {}, marks=pytest.mark.slow),
    ],
)
def test_a_fault_that_passes_is_waited_for(
    hub: HubServer, run: Path, pattern: str, status: int, more: dict[str, Any]
) -> None:
    hub.force(pattern, status, "try again", **more)
    assert release(run, repo=REPO, tag="v0.1").state == "released"
    assert_complete(hub)
    assert len((hub.load(REPO) or {})["commits"]) == 2


def foreign(hub: HubServer) -> None:
    hub.make(REPO, private=True, files={"pytorch_model.bin": b"x" * 50, "notes.txt": b"mine"})


def public(hub: HubServer) -> None:
    hub.make(REPO, private=False)


def tagged(hub: HubServer) -> None:
    commit = hub.make(REPO, private=True)
    hub.store(REPO, {**(hub.load(REPO) or {}), "tags": {"v0.1": commit}})


def reserved(hub: HubServer) -> None:
    hub.reserved.add(REPO)


def full(hub: HubServer) -> None:
    hub.quota_bytes = 10_000


def read_only(hub: HubServer) -> None:
    hub.accounts[TOKEN] = hub.accounts[READER]


def unknown(hub: HubServer) -> None:
    del hub.accounts[TOKEN]


def unpaid(hub: HubServer) -> None:
    hub.force("POST .*objects/batch", 402, "Payment required")


def too_large(hub: HubServer) -> None:
    hub.force("POST .*objects/batch", 413, "too large")


def card_refused(hub: HubServer) -> None:
    hub.force("POST /api/validate-yaml", 400, "bad")


REFUSALS: dict[Callable[[HubServer], None], tuple[str, str]] = {
    foreign: ("holds files that no release of Trainway has put there", "name another repository"),
    public: (f"{REPO} is public, and the release is private", "release.private=false"),
    tagged: ("has a tag v0.1 already, on another commit", "choose another --tag"),
    reserved: ("the name is taken", "choose another --repo"),
    full: ("ada has no room on the Hub", "free some storage there"),
    read_only: ("the token of ada is read-only", "write permission to ada/tiny-code"),
    unknown: ("the Hub refuses the token", "make a new one"),
    unpaid: ("ada has no room on the Hub", "take a larger plan"),
    too_large: ("a file is too large", "smaller shards"),
    card_refused: ("the Hub refuses the model card", "correct release.licence"),
}


@pytest.mark.parametrize("break_it", REFUSALS, ids=lambda fault: fault.__name__)
def test_what_would_fail_at_the_end_is_said_before_the_training(
    hub: HubServer,
    tmp_path: Path,
    corpus: Path,
    store_dir: Path,
    break_it: Callable[[HubServer], None],
    capsys: Capture,
) -> None:
    break_it(hub)
    config = {**tiny(corpus, store_dir, tmp_path / "run"), "release": {"push_to_hub": True, "repo": REPO}}
    assert main(["train", str(write_config(tmp_path / "c.yaml", config))]) == ExitCode.ENVIRONMENT
    told = [line.partition(": ") for line in capsys.readouterr().err.splitlines()[-3:]]
    assert [label for label, _, _ in told] == ["error", "why", "fix"]
    what, fix = REFUSALS[break_it]
    assert told[0][2].startswith("the release at the end of this run would fail: ") and what in told[0][2]
    assert fix in told[2][2] and told[2][2].endswith("or release.push_to_hub=false")
    assert not (tmp_path / "run").exists()


def test_without_a_login_or_a_network_nothing_is_trained(
    hub: HubServer, tmp_path: Path, corpus: Path, store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**tiny(corpus, store_dir, tmp_path / "run"), "release": {"push_to_hub": True, "repo": REPO}}
    loaded = load_config(config, environ={}).config
    hub.cut(requests=0)
    with pytest.raises(EnvironmentFault, match="the connection to the Hub broke off"):
        train(loaded)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(EnvironmentFault, match="there is no login of the Hub"):
        train(loaded)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFault, match="a release needs the Hub"):
        train(loaded)
    assert not (tmp_path / "run").exists()


def test_a_training_releases_by_itself_and_a_failure_leaves_the_run_whole(
    hub: HubServer, tmp_path: Path, corpus: Path, store_dir: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    settings = {"push_to_hub": True, "repo": REPO, "tag": "v1.0", "licence": "mit"}
    config = {**tiny(corpus, store_dir, run), "release": settings}
    path = write_config(tmp_path / "c.yaml", config)
    hub.force("POST .*/commit/", 403, "Private repository storage limit reached", times=9)
    assert main(["train", str(path)]) == ExitCode.ENVIRONMENT
    told = capsys.readouterr().err
    assert "error: the run is done and whole, and its release failed: ada has no room on the Hub" in told
    command = f"trainway release {run} --repo {REPO} --tag v1.0"
    assert f"fix: `{command}` completes it" in told
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert hub.tags(REPO) == {}
    hub.forced.clear()
    assert main(command.split()[1:]) == 0
    assert_complete(hub, "v1.0")
    # that the tag is there is no fault of a run that is done
    assert [found.level for found in check_push(load_config(config, environ={}).config, os.environ)] == ["ok"]
    # the same training once more: nothing to do, neither here nor there
    assert main(["train", str(path)]) == 0
    assert len((hub.load(REPO) or {})["commits"]) == 2
    assert json.loads((run / "provenance.json").read_text())["devices"] == {"name": "cpu", "count": 1}
    logging.getLogger("trainway").handlers.clear()


def test_a_second_release_replaces_the_first_and_keeps_its_tag(hub: HubServer, run: Path) -> None:
    first = release(run, repo=REPO, tag="v0.1")
    hub_files = hub.files(REPO)
    # as if the first one had had two shards; a file of the user's stays
    api = HfApi(endpoint=hub.url, token=TOKEN)
    for name in ("model-00001-of-00002.safetensors", "demo.gif"):
        api.upload_file(path_or_fileobj=b"GIF89a" * 9, path_in_repo=name, repo_id=REPO)
    second = release(run, repo=REPO, tag="v0.2", which=10)
    assert second.step == 10 and second.revision != first.revision
    assert set(hub.files(REPO)) == FILES | {"demo.gif"}
    assert sums(hub.files(REPO, "v0.1")) == sums(hub_files)
    assert hub.files(REPO)["model.safetensors"] != hub_files["model.safetensors"]
    with pytest.raises(EnvironmentFault, match=r"has a tag v0\.1 already, on another commit"):
        release(run, repo=REPO, tag="v0.1", which=10)


def test_a_secret_reaches_no_exported_byte(
    hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEAM_API_KEY", CANARY)
    with (run / "log.txt").open("a") as log:
        log.write(f"{CANARY} {TOKEN}\n")
    values = yaml.safe_load((run / "config.yaml").read_text())
    clean = (run / "config.yaml").read_text()
    for planted, kind in ((CANARY, "the value of TEAM_API_KEY"), (READER, "a token of the Hugging Face Hub")):
        values["description"] = f"with {planted} in it"
        (run / "config.yaml").write_text(yaml.safe_dump(values))
        for dry_run in (True, False):
            with pytest.raises(DataError) as caught:
                release(run, repo=REPO, tag="v0.1", dry_run=dry_run)
            assert (
                f"{CARD} (line " in caught.value.what
                and f"training/config.yaml (line 2): {kind}" in caught.value.what
            )
            assert planted not in str(caught.value)
        assert "POST" not in str(hub.requests)
        shutil.rmtree(run / "releases")
    (run / "config.yaml").write_text(clean)
    release(run, repo=REPO, tag="v0.1")
    stored = b"".join(path.read_bytes() for path in hub.root.rglob("*") if path.is_file())
    for secret in (CANARY, TOKEN, READER):
        assert secret.encode() not in hub.received
        assert secret.encode() not in stored
        assert not [
            path
            for path in (run / "releases").rglob("*")
            if path.is_file() and secret.encode() in path.read_bytes()
        ]


@pytest.mark.slow
def test_the_command_is_killed_and_goes_on(hub: HubServer, run: Path) -> None:
    """The real program, the real waiting."""
    import subprocess
    import sys

    hub.cut(requests=9)
    words = [sys.executable, "-m", "trainway", "release", str(run), "--repo", REPO, "--tag", "v0.1"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "again in" in line:
            break
    process.kill()
    process.wait()
    assert hub.tags(REPO) == {}
    hub.mend()
    assert f"ok: {hub.url}/{REPO}/tree/v0.1" in run_cli(*words[3:]).stdout
    assert_complete(hub)


@pytest.mark.slow
def test_of_two_ranks_one_releases_and_a_failure_has_its_exit_code(
    hub: HubServer, tmp_path: Path, corpus: Path, store_dir: Path
) -> None:
    run = tmp_path / "run"
    config = {**tiny(corpus, store_dir, run), "release": {"push_to_hub": True, "repo": REPO}}
    path = write_config(tmp_path / "c.yaml", config)
    hub.force("POST .*/tag/", 403, "no", times=1)
    done = run_cli("train", path, "--nproc", "2", check=ExitCode.ENVIRONMENT)
    assert done.stderr.count("its release failed: the token may not write") == 1
    assert hub.tags(REPO) == {}
    assert sum("whoami" in request for request in hub.requests) == 1  # the launching command has asked
    # the same training again: the run is done, and its release is completed
    again = run_cli("train", path, "--nproc", "2")
    assert "finished before" in again.stderr
    assert_complete(hub)
    assert len((hub.load(REPO) or {})["commits"]) == 2
