"""Faults of a machine and of a run, injected one by one: the doctor names each, with its cure."""

from __future__ import annotations

import importlib.util
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.doctor_material import (
    H200,
    TOKEN,
    Place,
    documented_cures,
    gpu_xml,
    http_date,
    place,
    shards,
    smi_xml,
    ticking,
)
from tests.hub_server import Account, HubServer, serve_hub
from trainway.doctor import data, disk, gpu, logins, machine, needs, network, torch_build, versions
from trainway.doctor.checks import examine
from trainway.doctor.findings import Finding, Subject, bounded, ok
from trainway.doctor.model import check_model
from trainway.doctor.torch_build import TorchFacts
from trainway.run_dir import RunDir

Findings = Iterable[Finding]
CLOSED = "http://127.0.0.1:9"
GPU_TORCH = TorchFacts("2.13.0+cu128", "12.8", True, "2.27.3", ("sm_90", "sm_100"), ((9, 0),))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with place(tmp_path, monkeypatch) as made:
        yield made


@contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


# machine


def old_python(here: Place) -> Findings:
    return machine.check_python((3, 10, 12))


def fewer_cores_than_processes(here: Place) -> Findings:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        return list(machine.check_cores(machine.probe_cores(), ranks=2))
    finally:
        os.sched_setaffinity(0, before)


def plan_takes_nearly_all_memory(here: Place) -> Findings:
    return machine.check_memory(100 << 30, 95 << 30)


def plan_takes_more_memory_than_there_is(here: Place) -> Findings:
    # R4's machines have some 200 GB for each GPU; the smallest rented ones do not
    config = here.config("engine=zero3", "cpu_offload=all", model={"hidden_size": 8192, "num_layers": 64})
    return machine.check_memory(64 << 30, needs.host_needs(config, 1, 1, on_cpu=False))


def hardly_any_open_files(here: Place) -> Findings:
    with limited(resource.RLIMIT_NOFILE, 200):
        return list(machine.check_limits(machine.probe_limits(), infiniband=False))


def few_open_files(here: Place) -> Findings:
    with limited(resource.RLIMIT_NOFILE, 1024):
        return list(machine.check_limits(machine.probe_limits(), infiniband=False))


def locked_memory_limited_beside_infiniband(here: Place) -> Findings:
    with limited(resource.RLIMIT_MEMLOCK, 65536):
        return list(machine.check_limits(machine.probe_limits(), infiniband=True))


def core_dumps_onto_the_disk(here: Place) -> Findings:
    return machine.check_limits(machine.Limits(65536, None, None, "core"), infiniband=False)


def clock_two_minutes_ahead(here: Place) -> Findings:
    hub = here.hub()
    hub.date = http_date(-120)
    return machine.check_clock(network.ask(hub.url).skew_s, "that of the Hub")


def clock_an_hour_behind(here: Place) -> Findings:
    hub = here.hub()
    hub.date = http_date(3600)
    return machine.check_clock(network.ask(hub.url).skew_s, "that of the Hub")


def file_server_with_another_clock(here: Place) -> Findings:
    now = time.time()
    here.monkeypatch.setattr(machine.time, "time", lambda: now + 40)
    return machine.check_file_clock(machine.probe_file_clock(here.path), here.path)


def processes_of_an_earlier_run(here: Place) -> Findings:
    started = here.process("-m", "trainway", "train", "old.yaml")
    other = here.process("somebody who looks: of children of its own it would be silent")
    found = [item for item in machine.probe_leftovers(own=other.pid) if item.pid == started.pid]
    return machine.check_leftovers(found)


HOLD = """
import sys, time
from pathlib import Path
from trainway.checkpoint.lock import run_lock
from trainway.run_dir import RunDir
with run_lock(RunDir(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(600)
"""


def holding(here: Place) -> tuple[subprocess.Popen[str], RunDir]:
    run = RunDir(here.path / "run")
    command = [sys.executable, "-c", HOLD, str(run.path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    here.stack.callback(holder.wait)
    here.stack.callback(holder.kill)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder, run


def run_directory_in_use(here: Place) -> Findings:
    _, run = holding(here)
    return machine.check_run(run)


def stale_lock(here: Place) -> Findings:
    holder, run = holding(here)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    return machine.check_run(run)


# GPUs


def driver_and_its_library_differ(here: Place) -> Findings:
    said = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 570.124\n"
    return gpu.check_driver(here.smi(said, code=18), paid=True)


def driver_hangs(here: Place) -> Findings:
    here.monkeypatch.setattr(gpu, "ASK_S", 0.2)
    return gpu.check_driver(gpu.probe_gpus(("sleep", "60")), paid=False)


def device_files_without_nvidia_smi(here: Place) -> Findings:
    here.write("dev/nvidia0", "")
    return gpu.check_driver(gpu.probe_gpus(("no-such-program",), devices=here.path / "dev"), paid=False)


def paid_machine_without_a_gpu(here: Place) -> Findings:
    return gpu.check_driver(gpu.probe_gpus(("no-such-program",), devices=here.path), paid=True)


def fewer_gpus_than_processes(here: Place) -> Findings:
    facts = here.smi(smi_xml(gpu_xml(0), gpu_xml(1)))
    return gpu.check_count(facts, {}, needs.ranks_here(here.config("--nproc=4"), facts, {}), ())


def engine_names_a_gpu_that_is_hidden(here: Place) -> Findings:
    facts = here.smi(smi_xml(gpu_xml(0), gpu_xml(1)))
    return gpu.check_count(facts, {"CUDA_VISIBLE_DEVICES": "0"}, 1, (1,))


def unknown_visible_device(here: Place) -> Findings:
    facts = here.smi(smi_xml(gpu_xml(0), gpu_xml(1)))
    return gpu.check_count(facts, {"CUDA_VISIBLE_DEVICES": "0,7,1"}, 1, ())


def visible_device_named_twice(here: Place) -> Findings:
    facts = here.smi(smi_xml(gpu_xml(0), gpu_xml(1)))
    return gpu.check_count(facts, {"CUDA_VISIBLE_DEVICES": "0,0"}, 1, ())


def gpus_of_two_kinds(here: Place) -> Findings:
    return gpu.check_count(here.smi(smi_xml(gpu_xml(0), gpu_xml(1, name="NVIDIA A100"))), {}, 2, ())


def another_process_on_the_gpu(here: Place) -> Findings:
    return gpu.check_memory(here.smi(smi_xml(gpu_xml(used=20000, holders={4711: 19800}))), [0], 1 << 30)


def memory_held_by_another_container(here: Place) -> Findings:
    return gpu.check_memory(here.smi(smi_xml(gpu_xml(used=20000))), [0], None)


def no_room_beside_another_process(here: Place) -> Findings:
    return gpu.check_memory(here.smi(smi_xml(gpu_xml(used=90000, holders={4711: 89000}))), [0], 80 << 30)


def plan_larger_than_the_gpu(here: Place) -> Findings:
    config = here.config(model={"hidden_size": 4096, "num_layers": 32, "intermediate_size": 12288})
    needed, advice = needs.memory_needs(config, 1, 1)
    return gpu.check_memory(here.smi(smi_xml(gpu_xml(total=24000))), [0], needed, advice)


def gpu_with_memory_errors(here: Place) -> Findings:
    return gpu.check_health(here.smi(smi_xml(gpu_xml(dram_uncorrectable="3"))), [0])


def gpu_whose_repair_failed(here: Place) -> Findings:
    return gpu.check_health(here.smi(smi_xml(gpu_xml(remap_failure="Yes"))), [0])


def gpu_too_hot(here: Place) -> Findings:
    return gpu.check_health(here.smi(smi_xml(gpu_xml(events="hw_thermal_slowdown"))), [0])


def gpu_cut_into_instances(here: Place) -> Findings:
    return gpu.check_health(here.smi(smi_xml(gpu_xml(mig="Enabled"))), [0])


# PyTorch and the other libraries

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Block())
"""


def torch_missing(here: Place) -> Findings:
    here.write("blocked/sitecustomize.py", BLOCK)
    torch = torch_build.probe_torch({**os.environ, "PYTHONPATH": str(here.path / "blocked")})
    return torch_build.check_torch(torch, here.smi(smi_xml()))


def torch_broken(here: Place) -> Findings:
    here.write("torch/__init__.py", "raise OSError('libcudart.so.12: cannot open shared object file')")
    torch = torch_build.probe_torch({**os.environ, "PYTHONPATH": str(here.path)})
    return torch_build.check_torch(torch, here.smi(smi_xml()))


def cpu_build_beside_a_gpu(here: Place) -> Findings:
    torch = torch_build.probe_torch(os.environ)
    if torch.cuda:
        torch = TorchFacts("2.13.0+cpu")
    return torch_build.check_torch(torch, here.smi(smi_xml()))


def driver_too_old_for_torch(here: Place) -> Findings:
    torch = TorchFacts(
        "2.13.0+cu130", "13.0", fault="RuntimeError: The NVIDIA driver on your system is too old"
    )
    return torch_build.check_torch(torch, here.smi(smi_xml(driver="550.54.15", cuda="12.4")))


def driver_of_an_older_minor_version(here: Place) -> Findings:
    return torch_build.check_torch(GPU_TORCH, here.smi(smi_xml(driver="550.54.15", cuda="12.4")))


def torch_without_kernels_for_the_gpu(here: Place) -> Findings:
    # R4: B200 is sm_100, and builds for CUDA 12.6 end at sm_90
    torch = TorchFacts("2.11.0+cu126", "12.6", True, "2.26", ("sm_80", "sm_90"), ((10, 0),))
    return torch_build.check_torch(torch, here.smi(smi_xml(gpu_xml(name="NVIDIA B200"))))


def torch_cannot_compute(here: Place) -> Findings:
    torch = TorchFacts("2.13.0+cu128", "12.8", fault="RuntimeError: CUDA error: system not yet initialized")
    return torch_build.check_torch(torch, here.smi(smi_xml()))


def nccl_missing(here: Place) -> Findings:
    torch = TorchFacts("2.13.0", "12.8", True, "", ("sm_90",), ((9, 0), (9, 0)))
    return torch_build.check_torch(torch, here.smi(smi_xml(gpu_xml(0), gpu_xml(1))), ranks=2)


def library_missing(here: Place) -> Findings:
    return versions.check_libraries({"torch": ">=2.11", "peft": ">=0.19"}, {"torch": "2.13.0"})


def transformers_too_old(here: Place) -> Findings:
    return versions.check_libraries(versions.own_requirements(), {**installed(), "transformers": "5.2.0"})


def known_clash(here: Place) -> Findings:
    return versions.check_clashes({"transformers": "5.23.0", "peft": "0.17.1"}, {})


def torchvision_of_another_torch(here: Place) -> Findings:
    return versions.check_clashes(
        {"torch": "2.13.0+cu128", "torchvision": "0.23.0"}, {"torchvision": ["numpy", "torch==2.8.0"]}
    )


def installed() -> dict[str, str]:
    return versions.installed_versions(versions.own_requirements())


def without(here: Place, library: str) -> None:
    found = importlib.util.find_spec
    here.monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == library else found(name)
    )


def deepspeed_missing(here: Place) -> Findings:
    without(here, "deepspeed")
    return versions.check_engine(here.config("engine=zero3"))


def bitsandbytes_missing(here: Place) -> Findings:
    without(here, "bitsandbytes")
    return versions.check_engine(here.chats("lora.quantize=4bit"))


def vllm_missing(here: Place) -> Findings:
    without(here, "vllm")
    from trainway.config.load import load_config

    return versions.check_engine(load_config("gad_small", ["rollout.engine=vllm"]).config)


def flash_attention_missing(here: Place) -> Findings:
    without(here, "flash_attn")
    return versions.check_engine(here.chats("model.attention=flash_attention_2"))


# network


def obsolete_variable(here: Place) -> Findings:
    return network.check_variables({"TRANSFORMERS_CACHE": "/x"})  # X11


def infiniband_switched_off(here: Place) -> Findings:
    here.write("infiniband/mlx5_0", "")
    return network.check_variables({"NCCL_IB_DISABLE": "1"}, infiniband=here.path / "infiniband")


def unknown_interface(here: Place) -> Findings:
    return network.check_variables({"NCCL_SOCKET_IFNAME": "bond7"})


def unknown_first_node(here: Place) -> Findings:
    return network.check_route({"MASTER_ADDR": "no-such-host.invalid"})


def hub_unreachable(here: Place) -> Findings:
    return network.check_hub(network.ask(CLOSED), CLOSED, needed="")


def hub_unreachable_and_needed(here: Place) -> Findings:
    config = here.chats(model={"path": "org/model"})
    return network.check_hub(network.ask(CLOSED), CLOSED, needed=needs.from_the_hub(config))


# disks


def shared_memory_of_a_container(here: Place) -> Findings:
    return disk.check_shared_memory(disk.probe_size(here.disk("size=64m")), ranks=4, gpus=4)


def little_shared_memory(here: Place) -> Findings:
    return disk.check_shared_memory(disk.probe_size(here.disk("size=512m")), ranks=2, gpus=2)


def full_disk(here: Place) -> Findings:
    small = here.disk("size=8m")
    (small / "other").write_bytes(b"0" * (5 << 20))
    return disk.check_room(
        [
            disk.Need(small / "run", "checkpoints", 3 << 20),
            disk.Need(small / "cache", "prepared data", 1 << 20),
        ]
    )


def nearly_full_disk(here: Place) -> Findings:
    return disk.check_room([disk.Need(here.disk("size=8m"), "checkpoints", (8 << 20) - (1 << 19))])


def no_inodes(here: Place) -> Findings:
    return disk.check_room([disk.Need(here.disk("size=1m,nr_inodes=50"), "checkpoints", 1)])


def few_inodes(here: Place) -> Findings:
    return disk.check_room([disk.Need(here.disk("size=1m,nr_inodes=5000"), "checkpoints", 1)])


def output_read_only(here: Place) -> Findings:
    return disk.check_writable({"run_dir": here.disk("size=1m,ro") / "runs/mine"})


def output_without_any_room(here: Place) -> Findings:
    small = here.disk("size=64k")
    with open(small / "other", "wb", buffering=0) as file:
        try:
            while file.write(b"0" * 4096):
                pass
        except OSError:
            pass
    return disk.check_writable({"run_dir": small})


def slow_disk(here: Place) -> Findings:
    speed = disk.probe_speed(here.path, num_bytes=4 << 20, clock=ticking(2.0))
    return disk.check_speed(speed, here.path, 12 << 30)


def output_under_tmp_on_a_pod(here: Place) -> Findings:
    return disk.check_survival([Path("/tmp/runs")], {"RUNPOD_POD_ID": "abc"}, paid=True)


def output_in_memory(here: Place) -> Findings:
    return disk.check_survival([here.disk("size=1m") / "run"], {}, paid=False)


# logins


def token_expired(here: Place) -> Findings:
    environ = {"HF_ENDPOINT": here.hub().url, "HF_TOKEN": TOKEN[:-1] + "Z"}
    token = logins.find_token(environ)
    assert token is not None
    return logins.check_token(token, logins.probe_login(token, environ), environ, needed="")


def two_tokens(here: Place) -> Findings:
    environ = {"HF_TOKEN": TOKEN, "HUGGINGFACE_HUB_TOKEN": TOKEN[::-1]}
    return logins.check_token(TOKEN, None, environ, needed="")


def no_token_where_one_is_of_use(here: Place) -> Findings:
    environ = {"HF_HOME": str(here.path)}
    return logins.check_token(logins.find_token(environ), None, environ, needed="the model org/model")


def hub_breaks_off_while_the_token_is_tried(here: Place) -> Findings:
    login = logins.probe_login(TOKEN, {"HF_ENDPOINT": CLOSED})
    return logins.check_token(TOKEN, login, {}, needed="")


def access(role: str, **more: object) -> dict[str, object]:
    return {"accessToken": {"displayName": "pod", "role": role, **more}}


def token_read_only(here: Place) -> Findings:
    hub = here.hub(name="ada", auth=access("read"))
    login = logins.probe_login(TOKEN, {"HF_ENDPOINT": hub.url})
    return logins.check_write(login, "ada/model", push=True)


def token_of_someone_outside_the_organisation(here: Place) -> Findings:
    hub = here.hub(name="ada", auth=access("write"), orgs=[{"name": "lab", "roleInOrg": "read"}])
    login = logins.probe_login(TOKEN, {"HF_ENDPOINT": hub.url})
    return logins.check_write(login, "lab/model", push=True)


def push_without_a_token(here: Place) -> Findings:
    return logins.check_write(None, "ada/model", push=True)


def planned_release_whose_tag_is_taken(here: Place) -> Findings:
    hub = here.stack.enter_context(serve_hub(HubServer(here.path / "hub", {TOKEN: Account("ada")})))
    commit = hub.make("ada/model", private=True)
    hub.store("ada/model", {**(hub.load("ada/model") or {}), "tags": {"v0.1": commit}})
    config = here.config("release.push_to_hub=true", "release.repo=ada/model")
    return logins.check_push(config, {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN})


def gated_model_without_a_token(here: Place) -> Findings:
    hub = here.hub()
    hub.models["org/model"] = {"1" * 40: {}}
    hub.gated.add("org/model")
    return logins.check_access("org/model", None, {"HF_ENDPOINT": hub.url})


def gated_model_refused(here: Place) -> Findings:
    hub = here.hub()
    hub.models["org/model"] = {"1" * 40: {}}
    hub.gated.add("org/model")
    return logins.check_access("org/model", TOKEN[::-1], {"HF_ENDPOINT": hub.url})


def gated_dataset(here: Place) -> Findings:
    hub = here.hub()
    hub.datasets["org/chats"] = {"1" * 40: {}}
    hub.gated.add("org/chats")
    config = here.chats(data={"train": ["hf://org/chats[train[:1%]]"]})
    ((name, kind),) = needs.hub_repositories(config)
    return logins.check_access(name, None, {"HF_ENDPOINT": hub.url}, kind)


def model_that_does_not_exist(here: Place) -> Findings:
    return logins.check_access("org/no-model", None, {"HF_ENDPOINT": here.hub().url})


def wandb_without_a_key(here: Place) -> Findings:
    return logins.check_trackers(("wandb",), {"HOME": str(here.path)}, lambda name: object())


def wandb_not_installed(here: Place) -> Findings:
    return logins.check_trackers(("wandb",), {"WANDB_API_KEY": "0" * 40}, lambda name: None)


def mlflow_unreachable(here: Place) -> Findings:
    return logins.check_trackers(("mlflow",), {"MLFLOW_TRACKING_URI": CLOSED}, lambda name: object())


def mlflow_refuses_the_login(here: Place) -> Findings:
    hub = here.hub()  # any server that says 401
    environ = {"MLFLOW_TRACKING_URI": f"{hub.url}/api/whoami-v2?"}
    return logins.check_trackers(("mlflow",), environ, lambda name: object())


def mlflow_not_installed(here: Place) -> Findings:
    return logins.check_trackers(("mlflow",), {}, lambda name: None)


def mlflow_without_its_database(here: Place) -> Findings:
    environ = {"MLFLOW_TRACKING_URI": "sqlite:////srv/runs.db"}
    return logins.check_trackers(("mlflow",), environ, lambda name: object() if name == "mlflow" else None)


def trackio_not_installed(here: Place) -> Findings:
    return logins.check_trackers(("trackio",), {}, lambda name: None)


def trackio_unreachable(here: Place) -> Findings:
    return logins.check_trackers(("trackio",), {"TRACKIO_SERVER_URL": CLOSED}, lambda name: object())


def trackio_space_without_a_token(here: Place) -> Findings:
    environ = {"TRACKIO_SPACE_ID": "me/board", "HOME": str(here.path), "HF_HOME": str(here.path)}
    return logins.check_trackers(("trackio",), environ, lambda name: object())


def git_missing(here: Place) -> Findings:
    return logins.check_git({"PATH": str(here.path)}, here.path)


def no_ssh_key(here: Place) -> Findings:
    return logins.check_git(os.environ | {"SSH_AUTH_SOCK": ""}, here.path)


def token_on_a_command_line(here: Place) -> Findings:
    started = here.process("--token", TOKEN)
    lines = [(pid, words) for pid, words in logins.probe_command_lines() if pid == started.pid]
    return logins.check_secrets(lines, {})


def token_under_a_name_that_nobody_reads(here: Place) -> Findings:
    return logins.check_secrets([], {"HUGGINGFACE_TOKEN": TOKEN})


def token_as_the_name_of_a_variable(here: Place) -> Findings:
    return logins.check_secrets([], {TOKEN: ""})


# configuration, data and model


def misspelt_setting(here: Place) -> Findings:
    path = here.write("my.yaml", "train:\n  total_stepz: 5\n")
    return examine(str(path), [], environ={**os.environ, "HF_HUB_OFFLINE": "1"})


def batch_that_does_not_divide(here: Place) -> Findings:
    return needs.check_geometry(here.config("train.micro_batch_size=1"), 3, {})


def no_data_given(here: Place) -> Findings:
    return data.check_data(here.config(data={"train": []}), {}, hashes=True)


def data_missing(here: Place) -> Findings:
    here.write("corpus.json", "{}")
    return data.check_data(here.config(), {}, hashes=True)


def data_empty(here: Place) -> Findings:
    here.corpus("")
    return data.check_data(here.config(), {}, hashes=True)


def of_shards(here: Place, *, hashes: bool = True, **more: object) -> Findings:
    config = here.config(data={"train": [str(here.path / "shards")]})
    return data.check_data(config, {}, hashes=hashes, **more)  # type: ignore[arg-type]


def dataset_that_was_not_fetched(here: Place) -> Findings:
    config = here.chats(data={"train": ["org/chats"]})
    return data.check_data(config, {"HF_HUB_OFFLINE": "1", "HF_HOME": str(here.path)}, hashes=True)


def shard_altered(here: Place) -> Findings:
    path = shards(here.path / "shards") / "shard-00001.jsonl"
    path.write_bytes(path.read_bytes().replace(b"this", b"that"))  # as long as before
    return of_shards(here)


def shard_cut_off(here: Place) -> Findings:
    path = shards(here.path / "shards") / "shard-00001.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    return of_shards(here, hashes=False)


def shard_missing(here: Place) -> Findings:
    (shards(here.path / "shards") / "shard-00002.jsonl").unlink()
    return of_shards(here, hashes=False)


def more_shards_than_can_be_hashed(here: Place) -> Findings:
    shards(here.path / "shards")
    return of_shards(here, limit_s=0.0, clock=ticking(1.0))


def sharder_interrupted(here: Place) -> Findings:
    manifest = shards(here.path / "shards") / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    return of_shards(here)


def first_row_malformed(here: Place) -> Findings:
    here.corpus('{"text": 7}\n')
    return data.check_data(here.config(), {}, hashes=True)


def first_row_malformed_and_set_aside(here: Place) -> Findings:
    here.corpus('{"messages": []}\n')
    return data.check_data(here.chats("data.on_bad_record=quarantine"), {}, hashes=True)


def model_files_missing(here: Place) -> Findings:
    here.write("model/config.json", "{}")
    config = here.chats()
    return check_model(Subject({"HF_HUB_OFFLINE": "1"}, config), config)


# the doctor itself


def check_that_hangs(here: Place) -> Findings:
    def hang() -> list[Finding]:
        time.sleep(5)
        return [ok("late", "")]

    return bounded("disk: room", hang, 0.1)


def check_that_breaks(here: Place) -> Findings:
    def broken() -> list[Finding]:
        raise ZeroDivisionError("by zero")

    return bounded("machine", broken, 10)


Fault = tuple[Callable[[Place], Findings], str, str, str, str]

FAULTS: tuple[Fault, ...] = (
    (old_python, "failure", "python", "Python is 3.10.12", "python3.11 -m venv"),
    (fewer_cores_than_processes, "warning", "cpu", "1 cores for 2 processes", "at least 4 cores"),
    (plan_takes_nearly_all_memory, "warning", "memory", "the plan asks for 95.0 GiB", "more memory"),
    (plan_takes_more_memory_than_there_is, "failure", "memory", "64.0 GiB of memory are free", "cpu_offload=none"),
    (hardly_any_open_files, "failure", "open-files", "may open 200 files", "ulimit -n 65536"),
    (few_open_files, "warning", "open-files", "may open 1024 files", "ulimit -n 65536"),
    (locked_memory_limited_beside_infiniband, "warning", "locked-memory", "may lock 0 MiB", "ulimit -l unlimited"),
    (core_dumps_onto_the_disk, "warning", "core-dumps", "core file", "ulimit -c 0"),
    (clock_two_minutes_ahead, "warning", "clock", "s ahead of that of the Hub", "timedatectl set-ntp true"),
    (clock_an_hour_behind, "failure", "clock", "s behind that of the Hub", "timedatectl set-ntp true"),
    (file_server_with_another_clock, "warning", "file-clock", "get a time 40 s behind", "same time server"),
    (processes_of_an_earlier_run, "warning", "leftovers", "1 process of another training run", "kill "),
    (run_directory_in_use, "failure", "run-lock", "is in use", "choose another run_dir"),
    (stale_lock, "warning", "run-lock", "ended without a word", "the same command goes on"),
    (driver_and_its_library_differ, "failure", "driver", "does not answer", "restart the machine"),
    (driver_hangs, "failure", "driver", "does not answer", "restart the machine"),
    (device_files_without_nvidia_smi, "failure", "driver", "does not answer", "--gpus all"),
    (paid_machine_without_a_gpu, "failure", "driver", "shows no GPU", "nvidia.com/gpu"),
    (fewer_gpus_than_processes, "failure", "gpus", "4 processes are asked for, with 2 GPUs", "engine.nproc=2"),
    (engine_names_a_gpu_that_is_hidden, "failure", "gpus", "engine.gpus names 1", "nvidia-smi -L"),
    (unknown_visible_device, "failure", "visible-devices", "CUDA_VISIBLE_DEVICES names 7", "unset CUDA_VISIBLE"),
    (visible_device_named_twice, "failure", "visible-devices", "names a GPU twice: 0,0", "name each once"),
    (gpus_of_two_kinds, "warning", "gpu-kinds", f"NVIDIA A100, {H200}", "engine.gpus=0,1"),
    (another_process_on_the_gpu, "warning", "gpu-memory", "GPU 0: 120.9 GiB of 140.4 GiB are free", "kill 4711"),
    (memory_held_by_another_container, "warning", "gpu-memory", "are free", "look on the host"),
    (no_room_beside_another_process, "failure", "gpu-memory", "the plan asks for 80.0 GiB", "kill 4711"),
    (plan_larger_than_the_gpu, "failure", "gpu-memory", "of 23.4 GiB are free, and the plan asks for", "saves"),
    (gpu_with_memory_errors, "failure", "gpu-health", "GPU 0: 3 uncorrected errors", "--gpu-reset -i 0"),
    (gpu_whose_repair_failed, "failure", "gpu-health", "a repair of its memory has failed", "take another"),
    (gpu_too_hot, "warning", "gpu-health", "it is too hot", "cooling"),
    (gpu_cut_into_instances, "warning", "gpu-health", "(MIG)", "nvidia-smi -i 0 -mig 0"),
    (torch_missing, "failure", "torch", "PyTorch is not installed", "pip install torch --index-url"),
    (torch_broken, "failure", "torch", "PyTorch cannot be imported", "whl/cu128"),
    (cpu_build_beside_a_gpu, "failure", "torch-cuda", f"CPU build, and there is {H200}", "whl/cu128"),
    (driver_too_old_for_torch, "failure", "torch-cuda", "CUDA 13.0, and driver 550.54.15 speaks CUDA 12.4", "whl/cu126"),
    (driver_of_an_older_minor_version, "warning", "torch-cuda", "12.8, and driver 550.54.15 speaks", "update the driver"),
    (torch_without_kernels_for_the_gpu, "failure", "torch-cuda", "no kernels for this GPU (sm_100)", "whl/cu128"),
    (torch_cannot_compute, "failure", "torch-cuda", "cannot compute on the GPU", "restart the container"),
    (nccl_missing, "failure", "nccl", "no NCCL", "whl/cu128"),
    (library_missing, "failure", "libraries", "not installed: peft", "pip install 'peft>=0.19'"),
    (transformers_too_old, "failure", "libraries", "transformers 5.2.0, needs >=5.17", "--upgrade 'transformers>=5.17'"),
    (known_clash, "failure", "versions", "transformers 5.23.0 and peft 0.17.1", "--upgrade transformers peft"),
    (torchvision_of_another_torch, "warning", "versions", "asks for torch ==2.8.0", "--upgrade torchvision"),
    (deepspeed_missing, "failure", "engine", "DeepSpeed is not installed", "--no-build-isolation"),
    (bitsandbytes_missing, "failure", "engine", "bitsandbytes is not installed", "trainway[qlora]"),
    (vllm_missing, "failure", "engine", "vLLM is not installed", "rollout.engine=transformers"),
    (flash_attention_missing, "failure", "engine", "flash-attn is not installed", "model.attention=auto"),
    (obsolete_variable, "warning", "obsolete-variable", "TRANSFORMERS_CACHE", "use HF_HOME"),
    (infiniband_switched_off, "warning", "infiniband", "InfiniBand", "unset NCCL_IB_DISABLE"),
    (unknown_interface, "failure", "interface", "NCCL_SOCKET_IFNAME is bond7", "unset NCCL_SOCKET_IFNAME"),
    (unknown_first_node, "failure", "first-node", "no-such-host.invalid is unknown", "MASTER_ADDR"),
    (hub_unreachable, "warning", "hub", "cannot be reached", "HF_HUB_OFFLINE=1"),
    (hub_unreachable_and_needed, "failure", "hub", "needs the model org/model", "HF_HUB_OFFLINE=1"),
    (shared_memory_of_a_container, "failure", "shared-memory", "has 64 MiB", "--shm-size=16g"),
    (little_shared_memory, "warning", "shared-memory", "has 512 MiB", "--shm-size=16g"),
    (full_disk, "failure", "disk-space", "3 MiB are free, 4 MiB are needed", "checkpoint.keep_last"),
    (nearly_full_disk, "warning", "disk-space", "8 MiB are free, about 8 MiB", "checkpoint.keep_last"),
    (no_inodes, "failure", "inodes", "more files can be made", "du --inodes"),
    (few_inodes, "warning", "inodes", "more files can be made", "du --inodes"),
    (output_read_only, "failure", "writable", "run_dir: ", "mount -o remount,rw"),
    (output_without_any_room, "failure", "writable", "run_dir: ", "choose another run_dir"),
    (slow_disk, "warning", "disk-speed", "at 2 MB/s; a checkpoint of 12.0 GiB takes about", "checkpoint.async_save"),
    (output_under_tmp_on_a_pod, "failure", "survives", "/tmp/runs does not survive", "TRAINWAY_RUNS_DIR=/workspace"),
    (output_in_memory, "warning", "survives", "does not survive a restart", "put run_dir on a disk"),
    (token_expired, "failure", "token", "expired, revoked or mistyped", "hf auth login"),
    (two_tokens, "warning", "token", "HF_TOKEN, HUGGINGFACE_HUB_TOKEN hold different", "unset all but HF_TOKEN"),
    (no_token_where_one_is_of_use, "warning", "token", "no token of the Hub", "export HF_TOKEN"),
    (hub_breaks_off_while_the_token_is_tried, "warning", "token", "could not be tried", "see to the network"),
    (token_read_only, "failure", "token-write", "the token of ada is read-only", "write permission to ada/model"),
    (token_of_someone_outside_the_organisation, "failure", "token-write", "may not write there", "lab/model"),
    (push_without_a_token, "failure", "token-write", "no valid token", "release.push_to_hub=false"),
    (planned_release_whose_tag_is_taken, "failure", "push", "has a tag v0.1 already", "choose another --tag"),
    (gated_model_without_a_token, "failure", "access", "refuses access to org/model", "accept its terms"),
    (gated_model_refused, "failure", "access", "refuses access to org/model", "HF_TOKEN"),
    (gated_dataset, "failure", "access", "refuses access to org/chats", "accept its terms"),
    (model_that_does_not_exist, "failure", "access", "org/no-model was not found", "correct the name"),
    (wandb_without_a_key, "failure", "wandb", "there is no key", "export WANDB_API_KEY"),
    (wandb_not_installed, "failure", "wandb", "not installed", "pip install 'trainway[wandb]'"),
    (mlflow_unreachable, "failure", "mlflow", "127.0.0.1:9 cannot be reached", "MLFLOW_TRACKING_URI"),
    (mlflow_refuses_the_login, "failure", "mlflow", "refuses the login", "MLFLOW_TRACKING_PASSWORD"),
    (mlflow_not_installed, "failure", "mlflow", "not installed", "pip install 'trainway[mlflow]'"),
    (mlflow_without_its_database, "failure", "mlflow", "sqlalchemy and alembic", "pip install 'trainway[mlflow]'"),
    (trackio_not_installed, "failure", "trackio", "not installed", "pip install 'trainway[trackio]'"),
    (trackio_unreachable, "failure", "trackio", "cannot be reached", "TRACKIO_SERVER_URL"),
    (trackio_space_without_a_token, "failure", "trackio", "no token", "HF_TOKEN"),
    (git_missing, "failure", "git", "Git is not installed", "apt-get install -y git"),
    (no_ssh_key, "warning", "ssh-key", "no SSH key", "ssh-keygen -t ed25519"),
    (token_on_a_command_line, "warning", "secrets", "stands on the command line of process", "revoke this one"),
    (token_under_a_name_that_nobody_reads, "warning", "secrets", "HUGGINGFACE_TOKEN is set", 'HF_TOKEN="$HUGGINGFACE'),
    (token_as_the_name_of_a_variable, "warning", "secrets", "the name of an environment variable", "unset it"),
    (misspelt_setting, "failure", "config", "there is no setting 'train.total_stepz'", "train.total_steps"),
    (batch_that_does_not_divide, "failure", "geometry", "8 is not divisible by 1 rows x 3 ranks", "=6 or 9"),
    (no_data_given, "failure", "data", "data.train is empty", "data.train=corpus.jsonl"),
    (data_missing, "failure", "data", "corpus.jsonl is missing", "correct the path"),
    (data_empty, "failure", "data", "the file is empty", "restore it"),
    (dataset_that_was_not_fetched, "failure", "data", "org/chats is no file here", "trainway prepare"),
    (shard_altered, "failure", "data", "shard-00001.jsonl: the shard was altered", "make the shards again"),
    (shard_cut_off, "failure", "data", "shard-00001.jsonl: the shard was altered", "make the shards again"),
    (shard_missing, "failure", "data", "shard-00002.jsonl: the shard is missing", "restore it"),
    (more_shards_than_can_be_hashed, "warning", "data-hashes", "3 of 3 shards", "trainway prepare"),
    (sharder_interrupted, "warning", "data-complete", "has not finished", "trainway data shard"),
    (first_row_malformed, "failure", "first-row", "the first row of 1 file", "trainway data validate"),
    (first_row_malformed_and_set_aside, "warning", "first-row", "the first row of 1 file", "quarantine"),
    (model_files_missing, "failure", "model-files", "files are missing", "hf download"),
    (check_that_hangs, "failure", "unanswered", "disk: room: no answer within 0.1 s", "nvidia-smi"),
    (check_that_breaks, "warning", "broken-check", "machine: could not be looked at", "by hand"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("inject", "level", "name", "what", "fix"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS]
)
def test_fault_is_named_with_its_cure(
    inject: Callable[[Place], Findings], level: str, name: str, what: str, fix: str, here: Place
) -> None:
    found = list(inject(here))
    matching = [item for item in found if (item.level, item.name) == (level, name)]
    assert matching, found
    item = matching[0]
    assert what in item.what
    assert fix in item.fix
    assert item.why
    cures = documented_cures()[name, level]
    assert not cures or any(cure in item.fix for cure in cures), (item.fix, cures)
    # one fault is one finding: nothing else is blamed
    others = [item for item in found if item.level == "failure" and item.name != name]
    assert others == []
    assert TOKEN not in repr(found)
