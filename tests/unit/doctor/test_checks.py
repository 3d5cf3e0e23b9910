"""What the doctor makes of a machine in order, and the finer points of each probe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doctor_material import TOKEN, Place, gpu_xml, place, shards, smi_xml
from trainway.config.load import load_config
from trainway.doctor import data, disk, gpu, logins, machine, needs, network, torch_build, versions
from trainway.doctor.checks import cheap_checks, refuse_unready
from trainway.doctor.disk import Mount, Room
from trainway.doctor.findings import Finding, Subject, is_paid, warning, without_secrets
from trainway.doctor.logins import Login
from trainway.doctor.torch_build import TorchFacts
from trainway.errors import EnvironmentFault
from trainway.planning.arithmetic import count_parameters


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with place(tmp_path, monkeypatch) as made:
        yield made


def levels(findings: object) -> list[str]:
    return [item.level for item in findings]  # type: ignore[attr-defined]


# findings


def test_no_secret_is_repeated() -> None:
    said = [
        warning(
            "hub",
            f"the server said {TOKEN}",
            "for key 0123456789abcdef",
            "curl -H 'Bearer xyz-secret https://a:b@hub",
        )
    ]
    (clean,) = without_secrets(said, {"WANDB_API_KEY": "0123456789abcdef"})
    assert clean.what == "the server said ***"
    assert clean.why == "for key ***"
    assert clean.fix == "curl -H 'Bearer *** https://***@hub"
    (own,) = without_secrets([warning("token", "a token: it is old", "", "export HF_TOKEN=...")], {})
    assert (own.what, own.fix) == ("a token: it is old", "export HF_TOKEN=...")


def test_what_counts_as_paid() -> None:
    assert not is_paid({})
    assert is_paid({"RUNPOD_POD_ID": "x"})
    assert is_paid({"TRAINWAY_PAID": "1"})
    assert not is_paid({"RUNPOD_POD_ID": "x", "TRAINWAY_PAID": "0"})


# GPUs


def test_a_healthy_machine_of_four(here: Place) -> None:
    facts = here.smi(smi_xml(*(gpu_xml(number) for number in range(4))))
    assert (facts.driver, facts.cuda, len(facts.gpus)) == ("570.124.06", "12.8", 4)
    assert facts.gpus[3].uuid == "GPU-3bf2-77"
    assert facts.gpus[0].total == 143771 * 2**20
    found = [*gpu.check_driver(facts, paid=True), *gpu.check_count(facts, {}, 4, ())]
    found += [*gpu.check_memory(facts, [0, 1, 2, 3], 100 << 30), *gpu.check_health(facts, [0, 1, 2, 3])]
    assert set(levels(found)) == {"ok"}
    assert found[0].what == "4 x NVIDIA H200; driver 570.124.06, which speaks CUDA up to 12.8"
    torch = TorchFacts("2.13.0+cu128", "12.8", True, "2.27.3", ("sm_90",), ((9, 0),) * 4)
    assert levels(torch_build.check_torch(torch, facts, ranks=4)) == ["ok", "ok", "ok"]


def test_drivers_of_other_ages_say_it_otherwise(here: Place) -> None:
    old = smi_xml(gpu_xml(events="hw_slowdown")).replace("clocks_event_reason", "clocks_throttle_reason")
    assert here.smi(old).gpus[0].slowed_by == ("hw_slowdown",)
    double = "<ecc_errors><volatile><double_bit><total>2</total></double_bit></volatile></ecc_errors>"
    volta = smi_xml(f"<gpu><product_name>V100</product_name>{double}</gpu>", cuda="11.0")
    assert here.smi(volta).gpus[0].uncorrected_errors == 2
    absent = smi_xml(gpu_xml(dram_uncorrectable="N/A"))
    assert here.smi(absent).gpus[0].uncorrected_errors == 0
    assert "cannot be read" in here.smi("<nvidia_smi_log>").fault
    assert here.smi("No devices were found\n", code=6).fault == ""


@pytest.mark.parametrize(
    ("told", "numbers"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        ("0,9,1", [0]),  # CUDA stops at the first that is not there
        ("GPU-1bf2,GPU-0", [1, 0]),  # by the beginning of a UUID
        ("1,1", [1]),
    ],
)
def test_what_cuda_visible_devices_leaves(told: str | None, numbers: list[int], here: Place) -> None:
    facts = here.smi(smi_xml(*(gpu_xml(number) for number in range(3))))
    environ = {} if told is None else {"CUDA_VISIBLE_DEVICES": told}
    assert gpu.visible_numbers(facts, environ) == numbers


def test_hidden_gpus_are_no_matter_of_the_cpu_build(here: Place) -> None:
    facts = here.smi(smi_xml())
    hidden = gpu.visible_facts(facts, {"CUDA_VISIBLE_DEVICES": ""})
    assert levels(torch_build.check_torch(TorchFacts("2.13.0+cpu"), hidden)) == ["ok"]
    built = TorchFacts("2.13.0+cu128", "12.8", fault="RuntimeError: No CUDA GPUs are available")
    assert levels(torch_build.check_torch(built, hidden)) == ["ok"]
    assert levels(torch_build.check_torch(built, facts)) == ["ok", "failure"]
    config = here.config()
    assert needs.on_cpu(Subject({"CUDA_VISIBLE_DEVICES": ""}, config), facts)
    assert not needs.on_cpu(Subject({}, config), gpu.GpuFacts(fault="it does not answer"))


def test_ranks_follow_the_gpus(here: Place) -> None:
    facts = here.smi(smi_xml(gpu_xml(0), gpu_xml(1)))
    assert needs.ranks_here(here.config(), facts, {}) == 2
    assert needs.ranks_here(here.config("engine=single"), facts, {}) == 1
    assert needs.used_gpus(here.config("engine.gpus=1"), facts, {}) == [1]
    assert needs.used_gpus(None, facts, {"CUDA_VISIBLE_DEVICES": "1"}) == [1]
    assert needs.ranks_here(here.config(), gpu.GpuFacts(), {}) == 1


@pytest.mark.parametrize(
    ("kernels", "capability", "runs"),
    [
        (("sm_80", "sm_90"), (9, 0), True),
        (("sm_80",), (8, 9), True),  # within a generation
        (("sm_80", "sm_90"), (10, 0), False),
        (("sm_80", "compute_90"), (10, 0), True),  # PTX
        (("sm_90a",), (9, 0), True),
        (("sm_100", "sm_120"), (12, 0), True),
        (("sm_90",), (8, 0), False),
    ],
)
def test_which_gpus_a_build_has_kernels_for(
    kernels: tuple[str, ...], capability: tuple[int, int], runs: bool, here: Place
) -> None:
    torch = TorchFacts("2.13.0", "12.8", True, "2.27", kernels, (capability,))
    found = list(torch_build.check_torch(torch, here.smi(smi_xml())))
    assert (found[1].level == "ok") is runs


def test_torch_is_asked_in_a_process_of_its_own() -> None:
    torch = torch_build.probe_torch(os.environ)
    import torch as real

    assert torch.version == real.__version__
    assert torch.cuda == (real.version.cuda or "")


# libraries


@pytest.mark.parametrize(
    ("version", "asked", "fits"),
    [
        ("5.17.0", ">=5.17", True),
        ("5.16.9", ">=5.17", False),
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.11.0", "==2.8.0", False),
        ("0.24.0", "<0.24.0,>=0.23.1", False),
        ("2026.11.15", ">=2025.10.22", True),
        ("3.0", "!=3.0", False),
        ("1.0", "==1.*", True),  # what cannot be read is not judged
    ],
)
def test_versions_are_compared_by_their_numbers(version: str, asked: str, fits: bool) -> None:
    found = list(versions.check_libraries({"some": asked}, {"some": version}))
    assert levels(found) == (["ok"] if fits else ["failure"])


def test_the_libraries_of_this_environment_fit() -> None:
    required = versions.own_requirements()
    assert required["torch"] == ">=2.11"
    found = [
        *versions.check_libraries(required, versions.installed_versions(required)),
        *versions.check_clashes(
            versions.installed_versions(required), versions.stated_requirements(required)
        ),
    ]
    assert levels(found) == ["ok", "ok"], found


# disks


def test_mounts_are_found_by_the_longest_place(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "27 1 254:0 / / rw - overlay overlay rw\n"
        f"30 27 0:1 / {tmp_path.resolve()} rw - ext4 /dev/vdb rw\n"
        f"31 27 0:2 / {tmp_path.resolve()}/my\\040volume rw master:1 - nfs4 server:/x rw\n"
        f"32 27 0:3 / {tmp_path.resolve()}/my\\040volume rw - fuse.juicefs j rw\n"
    )
    (tmp_path / "my volume").mkdir()
    assert disk.probe_mount(tmp_path / "my volume/runs/a", table) == Mount(
        f"{tmp_path.resolve()}/my volume", "fuse.juicefs"
    )
    assert disk.probe_mount(tmp_path / "my-volume", table).kind == "ext4"
    assert disk.probe_mount(Path("/etc"), table) == Mount("/", "overlay")


POD = {"RUNPOD_POD_ID": "abc"}


@pytest.mark.parametrize(
    ("path", "mount", "environ", "paid", "level"),
    [
        # X6
        ("/workspace/runs", Mount("/workspace", "fuse"), POD, True, "ok"),
        ("/root/runs", Mount("/", "overlay"), POD, True, "failure"),
        ("/data", Mount("/", "ext4"), POD, True, "failure"),  # the container's disk, however it is made
        ("/data", Mount("/", "ext4"), {}, True, "ok"),  # a rented machine with a disk
        ("/tmp/runs", Mount("/", "ext4"), {}, True, "failure"),
        ("/tmp/volume/runs", Mount("/tmp/volume", "nfs4"), POD, True, "ok"),
        ("/tmpfiles/runs", Mount("/", "ext4"), {}, True, "ok"),
        ("/dev/shm/runs", Mount("/dev/shm", "tmpfs"), {}, True, "failure"),
        ("/dev/shm/runs", Mount("/dev/shm", "tmpfs"), {}, False, "warning"),
        ("/tmp/runs", Mount("/", "ext4"), {}, False, "ok"),  # a laptop
        ("/app/runs", Mount("/", "overlay"), {}, False, "ok"),  # a container at home
    ],
)
def test_what_survives(path: str, mount: Mount, environ: dict[str, str], paid: bool, level: str) -> None:
    found = list(disk.check_survives(Path(path), mount, environ, paid=paid))
    assert levels(found) == [level]


def test_needs_on_one_disk_are_added_up() -> None:
    room = Room(1, 10 << 30, None)
    needs_here = [
        disk.Need(Path("a"), "checkpoints", 6 << 30),
        disk.Need(Path("b"), "prepared data", 5 << 30),
    ]
    (found,) = disk.judge_room(room, needs_here)
    assert (found.level, found.what) == ("failure", "a, b: 10.0 GiB are free, 11.0 GiB are needed")
    assert found.why == "checkpoints 6.0 GiB; prepared data 5.0 GiB"
    (found,) = disk.judge_room(room, needs_here[:1])
    assert found.level == "ok"


def test_nothing_is_created_or_left_behind(here: Place) -> None:
    # R3: never an empty data folder
    config = here.config()
    found = cheap_checks(config, {"HF_HUB_OFFLINE": "1", "HF_HOME": str(here.path / "hub")})
    assert [item.name for item in found if item.level == "failure"] == ["data"]
    assert list(here.path.iterdir()) == []


def test_the_room_that_checkpoints_need(here: Place) -> None:
    config = here.config("save_every=5", "keep_last=2", data={"train": ["none"]})
    one = needs.checkpoint_bytes(config)
    assert one is not None
    assert one == 12 * count_parameters(config.model, 32000).total
    assert needs.planned_disk(config) == 4 * one  # two kept, the best, and one while it is written
    assert needs.planned_disk(here.config("save_every=20")) == 2 * one
    assert needs.planned_disk(here.chats(model={"path": "org/unheard-of"})) is None
    adapters = load_config("gpt_oss_20b_lora").config
    assert needs.checkpoint_bytes(adapters) == 12 * 15_040_512
    found = needs.disk_needs(adapters, {"HF_HOME": str(here.path)})
    assert (found[2].path, found[2].num_bytes) == (here.path, 2 * 20_914_757_184)


def test_what_is_written_already_is_needed_no_more(here: Place) -> None:
    config = here.config()
    before = needs.disk_needs(config, {})[0].num_bytes
    here.write("run/checkpoints/step-5/weights", "0" * 1000)
    assert needs.disk_needs(config, {})[0].num_bytes == before - 1000


# network


def test_offline_nobody_is_asked() -> None:
    (found,) = network.check_hub(None, "https://nowhere.invalid", needed="the model a/b")
    assert found == Finding(
        "ok", "hub", "HF_HUB_OFFLINE is set: no network was asked, and logins were not tried"
    )


def test_a_hub_that_answers_has_a_clock(here: Place) -> None:
    hub = here.hub()
    answer = network.ask(hub.url)
    assert answer.status == 404
    assert answer.skew_s is not None
    assert abs(answer.skew_s) < 30
    assert levels(network.check_hub(answer, hub.url, needed="")) == ["ok"]
    assert "not an http address" in network.ask("file:///etc/passwd").fault


def test_the_route_to_the_first_node() -> None:
    (found,) = network.check_route({"MASTER_ADDR": "127.0.0.1"})
    assert found.level == "ok"
    assert found.what == "127.0.0.1 is reached over lo"
    assert list(network.check_route({})) == []


def test_every_obsolete_variable_is_named() -> None:
    # X11
    environ = {"TRANSFORMERS_CACHE": "/x", "NCCL_ASYNC_ERROR_HANDLING": "1", "NCCL_SOCKET_IFNAME": "lo"}
    found = list(network.check_variables(environ))
    assert [item.what for item in found] == ["NCCL_ASYNC_ERROR_HANDLING is set", "TRANSFORMERS_CACHE is set"]


# logins


@pytest.mark.parametrize(
    ("login", "repository", "may"),
    [
        (Login("ada", "write"), None, True),
        (Login("ada", "write"), "ada/model", True),
        (Login("ada", "read"), "ada/model", False),
        (Login("ada", "write"), "bob/model", False),
        (Login("ada", "write", {"lab": "write"}), "lab/model", True),
        (Login("ada", "write", {"lab": "read"}), "lab/model", False),
        (Login("ada", "fineGrained", {}, frozenset({"ada"})), "ada/model", True),
        (Login("ada", "fineGrained", {}, frozenset({"lab/model"})), "lab/model", True),
        (Login("ada", "fineGrained", {}, frozenset({"lab/other"})), "lab/model", False),
        (Login("ada", "fineGrained", {"lab": "admin"}), "lab/model", False),
    ],
)
def test_who_may_write(login: Login, repository: str | None, may: bool) -> None:
    # R59
    assert logins.may_write(login, repository) is may


def test_a_fine_grained_token_as_the_hub_describes_it(here: Place) -> None:
    scoped = [
        {"entity": {"type": "user", "name": "ada"}, "permissions": ["repo.content.read"]},
        {
            "entity": {"type": "model", "name": "lab/model"},
            "permissions": ["repo.content.read", "repo.write"],
        },
    ]
    token = {"displayName": "pod", "role": "fineGrained", "fineGrained": {"scoped": scoped}}
    hub = here.hub(name="ada", orgs=[], auth={"accessToken": token})
    login = logins.probe_login(TOKEN, {"HF_ENDPOINT": hub.url})
    assert (login.name, login.role, login.writable, login.fault) == ("ada", "fineGrained", {"lab/model"}, "")
    assert levels(logins.check_write(login, "lab/model", push=True)) == ["ok"]
    assert levels(logins.check_token(TOKEN, login, {}, needed="")) == ["ok"]


def test_where_the_token_comes_from(here: Place) -> None:
    # R59
    home = {"HF_HOME": str(here.path)}
    assert logins.find_token(home) is None
    here.write("token", f"{TOKEN}\n")
    assert logins.find_token(home) == TOKEN
    assert logins.find_token({**home, "HUGGINGFACEHUB_API_TOKEN": "other"}) == "other"
    assert logins.find_token({**home, "HUGGINGFACE_HUB_TOKEN": "x", "HF_TOKEN": "first"}) == "first"


def test_a_gated_model_whose_terms_were_accepted(here: Place) -> None:
    hub = here.hub()
    hub.models["org/model"] = {"1" * 40: {}}
    hub.gated.add("org/model")
    environ = {"HF_ENDPOINT": hub.url}
    assert levels(logins.check_access("org/model", TOKEN, environ)) == ["ok"]


def test_ways_to_log_in_to_a_tracker(here: Place) -> None:
    netrc = here.write(".netrc", "machine api.wandb.ai login user password 0123\n")

    def found(*trackers: str, **environ: str) -> list[str]:
        environ = {"HOME": str(here.path / "empty"), **environ}
        return levels(logins.check_trackers(trackers, environ, lambda name: object()))

    assert found("wandb") == ["failure"]
    assert found("wandb", WANDB_API_KEY="0" * 40) == ["ok"]
    assert found("wandb", WANDB_MODE="offline") == ["ok"]
    assert found("wandb", NETRC=str(netrc)) == ["ok"]
    assert found("wandb", NETRC=str(netrc), WANDB_BASE_URL="https://wandb.lab") == ["failure"]
    assert found("mlflow", MLFLOW_TRACKING_URI="./mlruns") == ["ok"]
    assert found("mlflow", MLFLOW_TRACKING_URI=here.hub().url) == ["ok"]
    assert found("mlflow", MLFLOW_TRACKING_URI="databricks://work") == ["ok"]
    assert found("trackio") == ["ok"]
    assert found("trackio", TRACKIO_SERVER_URL=f"{here.hub().url}?write_token=0123") == ["ok"]
    assert found("trackio", TRACKIO_SERVER_URL="http://127.0.0.1:9/") == ["failure"]
    assert found("trackio", TRACKIO_SPACE_ID="me/board", HF_HOME=str(here.path / "none")) == ["failure"]
    assert found("trackio", TRACKIO_SPACE_ID="me/board", HF_TOKEN="hf_x") == ["ok"]
    assert found("tensorboard") == []


def test_mlflows_database_needs_its_libraries() -> None:
    def found(uri: str) -> list[str]:
        environ = {"MLFLOW_TRACKING_URI": uri} if uri else {}
        missing = ("sqlalchemy",)
        return levels(
            logins.check_trackers(("mlflow",), environ, lambda name: None if name in missing else object())
        )

    assert found("sqlite:////tmp/runs.db") == found("postgresql://host/runs") == found("") == ["failure"]
    assert found("file:///tmp/mlruns") == found("./mlruns") == found("databricks") == ["ok"]


# data


def test_all_bad_shards_are_named(here: Place) -> None:
    # R14
    folder = shards(here.path / "shards", count=4)
    (folder / "shard-00000.jsonl").unlink()
    (folder / "shard-00002.jsonl").write_text("")
    config = here.config(data={"train": [str(folder)]})
    for hashes in (True, False):
        found = [item.what for item in data.check_data(config, {}, hashes=hashes) if item.level == "failure"]
        assert [what.split(":")[0].rpartition("/")[2] for what in found] == [
            "shard-00000.jsonl",
            "shard-00002.jsonl",
        ]


def test_whole_shards_and_absent_optional_sources(here: Place) -> None:
    # R16
    folder = shards(here.path / "shards")
    optional = {"path": str(here.path / "books.jsonl"), "optional": True}
    config = here.config(data={"train": [str(folder), optional]})
    found = list(data.check_data(config, {}, hashes=True))
    assert [item.what for item in found] == [
        f"{here.path}/books.jsonl is absent, and optional",
        "2 sources of data, all there",
    ]
    assert set(levels(found)) == {"ok"}


def test_datasets_of_the_hub_are_fetched_by_the_preparation(here: Place) -> None:
    config = here.chats(data={"train": ["org/chats"]})
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(here.path / "home")}
    assert levels(data.check_data(config, {}, hashes=True)) == ["ok"]
    assert levels(data.check_data(config, offline, hashes=True)) == ["failure"]
    here.write("home/hub/datasets--org--chats/refs/main", "")
    assert levels(data.check_data(config, offline, hashes=True)) == ["ok"]
    # pretraining reads files: what looks like a dataset is a directory that is missing
    assert levels(data.check_data(here.config(data={"train": ["org/chats"]}), {}, hashes=True)) == ["failure"]


# machine


@pytest.mark.parametrize(
    ("words", "trains"),
    [
        ("python -m trainway train c.yaml", True),
        ("/venv/bin/python /venv/bin/trainway train c.yaml", True),
        ("python -m trainway.launch.agent --nproc 2", True),
        ("python -m trainway doctor train.yaml", False),
        ("vim trainway", False),
        ("", False),
    ],
)
def test_which_command_lines_train(words: str, trains: bool) -> None:
    assert machine.is_training(words.split()) is trains


def test_a_finished_run_leaves_no_trace(here: Place) -> None:
    run = machine.RunDir(here.path / "run")
    assert list(machine.check_run(run)) == []
    here.write("run/run.lock", "{}")
    here.write("run/status.json", '{"state": "done", "step": 5}')
    assert levels(machine.check_run(run)) == ["ok"]


# before a paid run


def test_a_paid_run_is_refused_with_all_that_is_wrong(here: Place) -> None:
    # X6, R11
    path = here.write("c.yaml", "train: {total_steps: 5}\nschedule: {warmup_steps: 0}\nrun_dir: /tmp/run\n")
    words = [f"data.train={here.path}/none.jsonl", f"data.store_dir={here.path}/store"]
    environ = {"RUNPOD_POD_ID": "abc", "HF_HUB_OFFLINE": "1", "HF_HOME": str(here.path)}
    with pytest.raises(EnvironmentFault) as caught:
        refuse_unready(str(path), words, environ)
    what = caught.value.what
    assert what.startswith("2 things are wrong on this paid machine: ")
    assert "/tmp/run does not survive this machine" in what
    assert "none.jsonl is missing" in what
    assert "TRAINWAY_PAID=0" in caught.value.fix
    for passing in ({"TRAINWAY_PAID": "0"}, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}):
        refuse_unready(str(path), words, {**environ, **passing})
    refuse_unready(str(path), words, {})
