"""The tests' Hub is one for the real client: plain calls of HfApi upload to it, tag and bring back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from tests.hub_server import Account, HubServer, serve_hub

TOKEN = "hf_" + "aB3" * 12


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with serve_hub(HubServer(tmp_path / "hub", {TOKEN: Account("ada")})) as server:
        yield server


@pytest.mark.parametrize("part_bytes", [None, 100_000])
def test_a_folder_goes_up_and_comes_back(hub: HubServer, tmp_path: Path, part_bytes: int | None) -> None:
    api = HfApi(endpoint=hub.url, token=TOKEN)
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    files = {
        "README.md": b"---\nlicense: mit\n---\nhi\n",
        "sub/a.json": b"{}",
        "m.safetensors": os.urandom(250_001),
    }
    for name, data in files.items():
        (source / name).write_bytes(data)
    hub.multipart_bytes = part_bytes
    assert api.whoami()["name"] == "ada"
    api.create_repo("ada/m", private=True)
    commit = api.upload_folder(repo_id="ada/m", folder_path=source).oid
    api.create_tag("ada/m", tag="v1")
    assert [(tag.name, tag.target_commit) for tag in api.list_repo_refs("ada/m").tags] == [("v1", commit)]
    out = Path(api.snapshot_download("ada/m", revision="v1", local_dir=tmp_path / "out"))
    assert {name: (out / name).read_bytes() for name in files} == files
    assert {name: data for name, data in hub.files("ada/m", "v1").items() if name in files} == files
    assert api.upload_folder(repo_id="ada/m", folder_path=source).oid == commit  # nothing new
    (source / "sub/a.json").write_bytes(b"[]")
    assert api.upload_folder(repo_id="ada/m", folder_path=source).oid != commit
    # a private repository is nobody else's business, and the state lies on the disk
    with serve_hub(HubServer(hub.root, {TOKEN: Account("bob")})) as again:
        with pytest.raises(RepositoryNotFoundError):
            HfApi(endpoint=again.url, token=TOKEN).model_info("ada/m")
        assert again.files("ada/m", "v1") == hub.files("ada/m", "v1")


def test_it_refuses_as_the_hub_does(hub: HubServer) -> None:
    api = HfApi(endpoint=hub.url, token=TOKEN)
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("lab/m")
    assert caught.value.response.status_code == 403
    hub.accounts[TOKEN] = Account("ada", role="read")
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("ada/m")
    assert caught.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi(endpoint=hub.url, token="hf_" + "x" * 30).whoami()
    assert caught.value.response.status_code == 401
