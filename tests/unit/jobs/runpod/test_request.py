"""The body that is sent: exact, inert to every shell, without secrets; and the jobs that are refused before it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.fakes_runpod import FakeRunPod
from tests.unit.jobs.runpod.conftest import A100, H100, make_job, make_record
from trainway.errors import ConfigError
from trainway.jobs.orders import Orders
from trainway.jobs.runpod.gpus import TYPE_IDS, gpu_type_id
from trainway.jobs.runpod.source import local_source, source_archive, source_words
from trainway.jobs.runpod.target import RunPodTarget
from trainway.planning.gpus import find_gpu

NASTY = "$(touch x);'\"`touch y`\\ &|<>*?~#\t{a,b} \u00e9\u2028"
KEPT: dict[str, Any] = {"volume": {"size_gb": 100}}


def asked(tmp_path: Path, **settings: Any) -> Any:
    job = make_job(tmp_path, **settings)
    return RunPodTarget().request(job, make_record(job))


def test_the_whole_request(tmp_path: Path, home: Path) -> None:
    job = make_job(
        tmp_path, gpus=[{"name": "H100 SXM", "count": 2}, {"name": "A100 80GB"}], env={"NCCL_DEBUG": "INFO"},
        secrets={"HF_TOKEN": "hub"}, runpod={"data_centers": ["EU-RO-1"], "min_cuda": "12.8", "registry": "reg1"},
    )  # fmt: skip
    record = make_record(job)
    found = RunPodTarget().request(job, record)
    env = found["body"].pop("env")
    assert found == {
        "volume": {
            "path": "/network-volumes",
            "body": {"name": record.remote_name, "size": 100, "dataCenter": "EU-RO-1"},
        },
        "method": "POST",
        "path": "/pods",
        "body": {
            "name": record.remote_name,
            "image": "runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404",
            "args": """python3 -c 'import base64,os;exec(base64.b64decode(os.environ["TRAINWAY_BOOTSTRAP"]))'""",
            "disk": 50,
            "ports": ["22/tcp"],
            "mounts": {"network": [{"volumeId": "NEW", "path": "/workspace"}]},
            "dataCenterIds": ["EU-RO-1"],
            "startSsh": True,
            "startJupyter": False,
            "gpu": {"id": H100, "count": 2, "minCudaVersion": "12.8"},
            "cloud": "SECURE",
            "registry": "reg1",
        },
        "other_candidates": [{"gpu": {"id": A100, "count": 1, "minCudaVersion": "12.8"}}],
    }
    assert env.pop("TRAINWAY_BOOTSTRAP").isascii()
    orders = Orders.model_validate_json(env.pop("TRAINWAY_ORDERS"))
    assert orders == job.orders.model_copy(update={"ender": "runpod"})
    assert env == {
        "NCCL_DEBUG": "INFO",
        "HF_TOKEN": "{{ RUNPOD_SECRET_hub }}",
        "TRAINWAY_SOURCE": "trainway==1.0",
        "TRAINWAY_ORIGIN": "NEW",  # nothing is written for what is only shown
    }
    json.dumps(found)


def test_values_arrive_as_they_are(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, said: list[str]
) -> None:
    job = make_job(
        tmp_path, env={"NOTE": NASTY + "\n2"}, orders={"inputs": [NASTY], "config": {"name": NASTY}}, **KEPT
    )
    target.up(job, make_record(job), said.append)
    (body,) = fake.asked("POST", "/pods")
    assert body["env"]["NOTE"] == NASTY + "\n2"
    orders = Orders.model_validate_json(body["env"]["TRAINWAY_ORDERS"])
    assert orders.inputs == (NASTY,) and orders.config == {"name": NASTY}
    assert NASTY not in body["args"]


def test_the_orders_mean_nothing_to_a_shell(tmp_path: Path, home: Path) -> None:
    """The images write each variable, between quotes that its own quotes end, into a file that SSH shells read."""
    body = asked(tmp_path, orders={"inputs": [NASTY, "$(touch a)", "`touch b`", "; touch c;"]})["body"]
    folder = tmp_path / "shell"
    folder.mkdir()
    lines = [f'export {name}="{body["env"][name]}"' for name in sorted(body["env"])]
    (folder / "rc").write_text("\n".join(lines) + "\n")
    done = subprocess.run(["bash", "-c", ". ./rc; printf done"], cwd=folder, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("done", "") and [path.name for path in folder.iterdir()] == ["rc"]


def test_the_command_runs_the_bootstrap(tmp_path: Path, home: Path) -> None:
    """All of it, as a container would: the words of `args`, the variables, and no file of ours."""
    found = asked(tmp_path)["body"]
    env = {name: value for name, value in found["env"].items() if name != "TRAINWAY_ORDERS"}
    command = [sys.executable, "-I", *shlex.split(found["args"])[1:]]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith("KeyError: 'TRAINWAY_ORDERS'")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": "runpod/pytorch:latest"}, "image is"),
        ({"image": "registry:5000/pytorch"}, "image is"),
        ({"gpus": []}, "no GPU is named"),
        ({"gpus": ["L4", "MI300Z"]}, "there is no GPU 'MI300Z'"),
        ({"root": "/tmp/out"}, "root is /tmp/out"),
        ({"root": "/root"}, "root is /root"),
        ({"root": "work"}, "root is work"),
        ({"at_end": {"release": {"to": "/tmp/model"}}}, "at_end.release.to is /tmp/model"),
        ({"volume": {}}, "nothing that this job makes would outlive"),
        ({"volume": {"size_gb": 5}}, "volume.size_gb is 5"),
        ({"volume": {"size_gb": 5000}}, "volume.size_gb is 5000"),
        ({"volume": {}, "sync": "s3://b/x", "nodes": 2}, "there is no volume"),
        ({"nodes": 2, "runpod": {"registry": "r"}}, "runpod.registry is set"),
        ({"nodes": 2, "runpod": {"cloud": "COMMUNITY"}}, "runpod.cloud is COMMUNITY"),
        ({"nodes": 251}, "would not take this job"),
        ({"runpod": {"min_cuda": "12"}}, "would not take this job"),
        ({"env": {"RUNPOD_POD_ID": "x"}}, "env.RUNPOD_POD_ID is set"),
        ({"env": {"PUBLIC_KEY": "x"}}, "env.PUBLIC_KEY is set"),
        ({"env": {"NOTE": "{{ RUNPOD_SECRET_x }}"}}, "env.NOTE asks for a secret"),
        ({"env": {"NOTE": "a\0b"}}, "env.NOTE has a zero byte"),
        ({"env": {f"V{number}": "" for number in range(47)}}, "51 variables"),
        ({"source": "-r /etc/passwd"}, "source is"),
        ({"source": "no/such/wheel.whl"}, "source is"),
    ],
)
def test_refused_before_anything_is_asked(
    target: RunPodTarget, fake: FakeRunPod, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    job = make_job(tmp_path, **settings)
    record = make_record(job)
    with pytest.raises(ConfigError) as caught:
        target.request(job, record)
    assert message in caught.value.what and caught.value.code == 2
    assert fake.requests == []


@pytest.mark.parametrize(
    "value", ["hf_CANARYcanaryCANARYcanary", "sk-CANARYcanaryCANARYcanary", "a secret!", "x}} {{"]
)
def test_a_secret_s_value_is_refused_and_not_repeated(home: Path, tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match="not the name of a secret") as caught:
        asked(tmp_path, secrets={"HF_TOKEN": value})
    assert value not in str(caught.value)


def test_outputs_that_are_erased_when_that_is_meant(tmp_path: Path, home: Path) -> None:
    body = asked(tmp_path, volume={}, root="/tmp/out", runpod={"erased_outputs": True})["body"]
    assert "mounts" not in body and json.loads(body["env"]["TRAINWAY_ORDERS"])["root"] == "/tmp/out"


def test_every_gpu_that_runpod_rents_is_found_by_all_its_names() -> None:
    for type_id in TYPE_IDS:
        assert gpu_type_id(type_id) == type_id
        gpu = find_gpu(type_id)
        for name in (gpu.name, *gpu.aliases):
            assert find_gpu(gpu_type_id(name)).name == gpu.name
    assert gpu_type_id("H100 SXM") == H100 and gpu_type_id("a100 80gb") == A100
    assert gpu_type_id("RTX PRO 6000 Blackwell Workstation Edition").endswith("Workstation Edition")


def test_where_trainway_comes_from(tmp_path: Path, home: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "src" / "trainway" / "__pycache__").mkdir(parents=True)
    for name, text in {
        "pyproject.toml": '[project]\nname = "trainway"\n', "src/trainway/__init__.py": "", "README.md": "",
        "src/trainway/__pycache__/x.pyc": "x", "secret.env": "HF_TOKEN=CANARY",
    }.items():  # fmt: skip
        (tree / name).write_text(text)
    (tmp_path / "trainway-9.whl").write_bytes(b"wheel")
    job = make_job(tmp_path, source="tree")
    assert source_words(job) == "upload" and local_source(job) == tree
    archive = source_archive(tree)
    with tarfile.open(archive) as packed:
        assert packed.getnames() == [
            "trainway/README.md",
            "trainway/pyproject.toml",
            "trainway/src/trainway/__init__.py",
        ]
    assert source_archive(tree) == archive
    (tree / "README.md").write_text("more")
    assert source_archive(tree) != archive
    job = make_job(tmp_path, source="trainway-9.whl")
    assert (
        source_words(job) == "upload"
        and source_archive(tmp_path / "trainway-9.whl") == tmp_path / "trainway-9.whl"
    )
    for word in ("trainway==1.2", "trainway[hub]>=1.0,<2", "git+https://example.com/t.git@main"):
        assert source_words(make_job(tmp_path, source=word)) == word


def test_a_dry_run_needs_no_http(tmp_path: Path) -> None:
    code = (
        "import sys, trainway.jobs.runpod.target, trainway.jobs.runpod.request\nprint('httpx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
