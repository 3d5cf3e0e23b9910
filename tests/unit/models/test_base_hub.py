"""Models of the Hub: what is downloaded, what works without a network, and what a user reads when it cannot be had."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.base_models import save, tiny_model
from tests.fakes_hub import FakeHub, serve
from trainway.errors import ConfigError, DataError, EnvironmentFault
from trainway.models import base_hub
from trainway.models.base import find_base

FIRST, SECOND = "a" * 40, "b" * 40
NAME = "someone/tiny"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = save(tiny_model("llama"), tmp_path_factory.mktemp("model"), max_shard_size="40KB")
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert len([name for name in found if name.endswith(".safetensors")]) >= 2
    return found


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    others = {
        "pytorch_model.bin": b"pickle", "original/model.safetensors": b"x", "consolidated.safetensors": b"x" * 99,
        "modeling_tiny.py": b"raise SystemExit(9)", "README.md": b"read me", "chat_template.jinja": b"{{ messages }}",
    }  # fmt: skip
    with serve(FakeHub()) as server:
        server.models[NAME] = {FIRST: files | others}
        for key in base_hub.TOKEN_VARIABLES:
            monkeypatch.delenv(key, raising=False)
        use_endpoint(monkeypatch, server.url)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of the Hub's library
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5)
        yield server


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """As HF_ENDPOINT does, which is read when the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )


def find(tmp_path: Path, name: str = NAME, **settings: Any) -> Any:
    return find_base(name, cache=tmp_path / "cache", **settings)


def test_only_what_is_needed_is_downloaded(hub: FakeHub, tmp_path: Path, files: dict[str, bytes]) -> None:
    reports: list[tuple[str, int, int]] = []
    base = find(tmp_path, report=lambda *report: reports.append(report))
    assert base.revision == FIRST and base.source == NAME and base.notes == ()
    assert {path.name for path in base.directory.iterdir()} == {*files, "chat_template.jinja"}
    wanted = (
        sum(len(data) for name, data in files.items())
        + len(b"{{ messages }}")
        - len(files["model.safetensors.index.json"])
    )
    assert ("downloading someone/tiny", 0, wanted) in reports and reports[-1][1:] == (wanted, wanted)


def test_a_second_start_downloads_nothing_and_a_commit_asks_nothing(hub: FakeHub, tmp_path: Path) -> None:
    first = find(tmp_path)
    hub.requests.clear()
    assert find(tmp_path).identity == first.identity
    assert all("/resolve/" not in path or path.endswith("index.json") for path, _ in hub.requests)
    hub.requests.clear()
    assert find(tmp_path, revision=FIRST).identity == first.identity
    assert hub.requests == []


def test_the_newest_commit_is_taken_and_told_apart(
    hub: FakeHub, tmp_path: Path, files: dict[str, bytes]
) -> None:
    first = find(tmp_path)
    other = {path.name: path.read_bytes() for path in save(tiny_model("qwen2"), tmp_path / "other").iterdir()}
    hub.models[NAME][SECOND] = other
    second = find(tmp_path)
    assert (second.revision, second.config.model_type) == (SECOND, "qwen2")
    assert first.identity != second.identity
    assert find(tmp_path, revision=FIRST).identity == first.identity


def test_without_a_network_the_cache_is_used(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = find(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = find(tmp_path)
    assert (offline.identity, offline.revision) == (first.identity, FIRST)
    assert offline.notes == ("HF_HUB_OFFLINE is set: commit aaaaaaaaaaaa of the cache is used",)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    use_endpoint(monkeypatch, "http://127.0.0.1:9")  # nobody listens there
    cut_off = find(tmp_path)
    assert cut_off.identity == first.identity
    assert "cannot be reached (ConnectError): commit aaaaaaaaaaaa of the cache is used" in cut_off.notes[0]


def test_every_file_that_the_cache_lacks_is_named(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = find(tmp_path)
    shards = sorted(path.name for path in base.files)
    for name in ("tokenizer.json", shards[0], shards[1]):
        (base.directory / name).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFault) as error:
        find(tmp_path)
    assert error.value.what == "the model someone/tiny is not whole in the cache of the Hub"
    assert error.value.why == (
        f"HF_HUB_OFFLINE is set, and {base.directory} lacks tokenizer.json, {shards[0]}, {shards[1]}"
    )
    assert FIRST in error.value.fix
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(EnvironmentFault) as error:
        find(tmp_path)
    assert error.value.what == "the model someone/tiny is not in the cache of the Hub"
    assert "hf download someone/tiny" in error.value.fix


def test_no_network_and_an_empty_cache(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(EnvironmentFault, match="not in the cache of the Hub") as error:
        find(tmp_path)
    assert "the Hub cannot be reached (ConnectError)" in error.value.why


@pytest.mark.parametrize("key", base_hub.TOKEN_VARIABLES)
def test_a_gated_model_needs_a_token(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    hub.gated.add(NAME)
    hub.token = "hf_good"
    with pytest.raises(EnvironmentFault) as error:
        find(tmp_path)
    assert error.value.what == "the Hub refuses access to someone/tiny"
    for word in ("https://huggingface.co/someone/tiny", "HF_TOKEN", "hf auth login"):
        assert word in error.value.fix
    monkeypatch.setenv(key, "hf_bad")
    with pytest.raises(EnvironmentFault, match="refuses access") as error:
        find(tmp_path)
    assert "hf_bad" not in str(error.value)
    monkeypatch.setenv(key, "hf_good")
    assert find(tmp_path).revision == FIRST


def test_a_name_or_revision_that_does_not_exist(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        find(tmp_path, "someone/tyny")
    assert error.value.what == "the model someone/tyny was not found"
    assert str(Path("someone/tyny").absolute()) in error.value.why and "correct the name" in error.value.fix
    with pytest.raises(DataError, match="the model someone/tiny has no such revision"):
        find(tmp_path, revision="v9")


def test_a_connection_that_breaks_off_is_no_half_model(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = sorted(name for name in hub.models[NAME][FIRST] if name.startswith("model-"))[-1]
    hub.cut.add(last)
    with pytest.raises(EnvironmentFault) as error:
        find(tmp_path)
    assert error.value.what == "the download of the model someone/tiny broke off"
    assert error.value.why.endswith(f"still missing: {last}") and "start again" in error.value.fix
    hub.cut.clear()
    assert find(tmp_path).revision == FIRST


def test_no_room(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(base_hub.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(EnvironmentFault, match="no room for the model someone/tiny") as error:
        find(tmp_path)
    assert "HF_HOME" in error.value.fix
    assert not [path for path, _ in hub.requests if path.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("content", "what", "why"),
    [
        ({"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": b""}, "has no model.safetensors", "it has pytorch_model.bin instead"),
        ({"tiny.Q4_K_M.gguf": b""}, "has no config.json and no tokenizer.json and no model.safetensors", "it has tiny.Q4_K_M.gguf instead"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "has no config.json and no tokenizer.json and no model.safetensors", "it is an adapter"),
    ],
)  # fmt: skip
def test_a_repository_without_a_model(
    hub: FakeHub, tmp_path: Path, content: dict[str, bytes], what: str, why: str
) -> None:
    hub.models[NAME] = {FIRST: content}
    with pytest.raises(ConfigError) as error:
        find(tmp_path)
    assert error.value.what == f"the model someone/tiny {what}" and error.value.why == why


def test_a_repository_that_lacks_a_shard(hub: FakeHub, tmp_path: Path) -> None:
    last = sorted(name for name in hub.models[NAME][FIRST] if name.startswith("model-"))[-1]
    del hub.models[NAME][FIRST][last]
    with pytest.raises(DataError) as error:
        find(tmp_path)
    assert (error.value.what, error.value.why) == ("the model someone/tiny lacks files on the Hub", last)


@pytest.mark.parametrize("revision", [None, "main", "v1", FIRST[:12], "z" * 40])
def test_trusted_code_needs_a_commit(hub: FakeHub, tmp_path: Path, revision: str | None) -> None:
    with pytest.raises(ConfigError, match="of 40 hexadecimal digits"):
        find(tmp_path, revision=revision, trust_remote_code=True)
    assert hub.requests == []


def test_code_is_downloaded_only_when_it_is_trusted(hub: FakeHub, tmp_path: Path) -> None:
    assert not (find(tmp_path, revision=FIRST).directory / "modeling_tiny.py").exists()
    trusted = find(tmp_path, revision=FIRST, trust_remote_code=True)  # llama needs none of it
    assert (trusted.directory / "modeling_tiny.py").exists()
