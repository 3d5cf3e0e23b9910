"""A job file becomes a checked job, or an error that names the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainway.errors import ConfigError
from trainway.jobs.load import job_name, load_job

RUNPOD = """\
name: first
config: runpod_1b
target: runpod
gpus:
  - {name: H100 SXM, count: 8, max_price: 3.5}
  - A100 80GB
settings:
  train.total_steps: 1000
  optim: {lr: 1e-3}
env: {NCCL_DEBUG: INFO}
secrets: {HF_TOKEN: hf}
limits: {hours: 4, dollars: 100}
upload:
  - chats.jsonl
  - {path: more, to: data/more}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def error_of(folder: Path, text: str, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_job(written(folder, text), words)
    return str(caught.value)


def test_a_job_of_all_kinds_of_settings(tmp_path: Path) -> None:
    job = load_job(written(tmp_path, RUNPOD), ["limits.hours=2.5", "gpus=[L40S]", "at_end.machine=stop"])
    spec = job.spec
    assert [gpu.name for gpu in spec.gpus] == ["L40S"]
    assert [(item.path, item.to) for item in spec.upload] == [("chats.jsonl", ""), ("more", "data/more")]
    assert (spec.limits.hours, spec.limits.dollars, spec.limits.stall_minutes) == (2.5, 100, 30)
    assert job.config.train.total_steps == 1000 and job.config.optim.lr == 1e-3
    assert job.folder == str(tmp_path)


def test_the_orders_hold_what_the_machine_needs_and_no_secret(tmp_path: Path) -> None:
    orders = load_job(written(tmp_path, RUNPOD)).orders
    assert (orders.root, orders.job, orders.ender, orders.awaits_upload) == (
        "/workspace",
        "first",
        "runpod",
        True,
    )
    # seen from the volume's root, which is where the stages run
    assert orders.config["run_dir"] == "runs/first" and orders.config["data"]["store_dir"] == "cache/first"
    assert orders.config["name"] == "first"
    assert "HF_TOKEN" not in orders.model_dump_json() and "hf" not in orders.model_dump_json().split('"')
    assert type(orders).model_validate_json(orders.model_dump_json()) == orders


def test_toml_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(
        'name = "first"\nconfig = "m3_medium"\ntarget = "local"\n[settings]\ntrain.total_steps = 7\n'
    )
    assert load_job(path).config.train.total_steps == 7


def test_a_configuration_beside_the_job_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: m3_medium\ntrain: {total_steps: 9}\n")
    job = load_job(written(tmp_path, "name: a\nconfig: mine.yaml\ntarget: local\n"))
    assert job.config.train.total_steps == 9
    assert job.orders.root == str(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("targt: runpod", "job.yaml:3: targt is not a setting of a job; did you mean target?"),
        ("target: moon", "job.yaml:3: target is 'moon'"),
        ("target: local\nlimits: {hours: -1}", "job.yaml:4: limits.hours is -1"),
        ("target: local\nlimits: {hour: 1}", "job.yaml:4: limits.hour is not a setting of a job\ndid you mean limits.hours?"),
        ("target: local\ngpus: [{name: L40S, cuont: 2}]", "job.yaml:4: gpus.0.cuont is not a setting"),
        ("target: local\nenv: {2BAD: x}", "job.yaml:4: env.2BAD"),
        ("target: local\nname: twice", "job.yaml:4: 'name' is set twice"),
        ("target: local\nsettings: {optim.lrr: 1}", "optim.lrr"),
        ("target: local\nport: [0]", "job.yaml:4: port is not a setting of a job\ndid you mean ports?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_its_line(tmp_path: Path, line: str, said: str) -> None:
    assert said in error_of(tmp_path, f"name: a\nconfig: m3_medium\n{line}\n")


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    text = error_of(tmp_path, "name: A B\nconfig: m3_medium\ntarget: local\nnodes: 0\nlimits: {dollars: x}\n")
    assert "3 settings of the job are wrong" in text
    assert "job.yaml:1: name" in text and "job.yaml:4: nodes is 0" in text and "limits.dollars is 'x'" in text


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    text = error_of(tmp_path, "name: a\n")
    assert "config is not set" in text and "target is not set" in text


@pytest.mark.parametrize("name", ["a\n", "a b", "$(touch x)", "-a", "a-", "A", "a" * 46, "a.b", "ä", ""])
def test_names_are_labels_of_dns(tmp_path: Path, name: str) -> None:
    from trainway.config.files import yaml_text

    text = yaml_text({"name": name, "config": "m3_medium", "target": "local"})
    assert "name is" in error_of(tmp_path, text)


def test_a_word_of_the_command_line_that_is_none(tmp_path: Path) -> None:
    assert "'hours' is not a setting of the job" in error_of(tmp_path, RUNPOD, "hours")
    assert "command line: limits.hours is 'x'" in error_of(tmp_path, RUNPOD, "limits.hours=x")


def test_the_name_of_a_job_by_its_file(tmp_path: Path) -> None:
    assert job_name(str(written(tmp_path, RUNPOD))) == "first"
    assert job_name("first") == "first"
    with pytest.raises(ConfigError, match="has no `name`"):
        job_name(str(written(tmp_path, "target: local\n")))


BASE = {
    "runpod": "name: a\nconfig: runpod_1b\ntarget: runpod\ngpus: [L40S]\n",
    "kubernetes": "name: a\nconfig: runpod_1b\ntarget: kubernetes\ngpus: [L40S]\n",
    "ssh": "name: a\nconfig: runpod_1b\ntarget: ssh\nssh: {host: box}\n",
    "local": "name: a\nconfig: m3_medium\ntarget: local\n",
}


@pytest.mark.parametrize(
    ("target", "line", "said"),
    [
        (
            "runpod",
            "kubernetes: {kind: jobset}",
            "job.yaml:5: kubernetes.kind is set, and the target is runpod",
        ),
        ("local", "image: x:1", "image is set, and the target is local"),
        ("ssh", "volume: {size_gb: 10}", "volume is set, and the target is ssh"),
        ("runpod", "image: some/thing", "`latest` is another image tomorrow"),
        ("runpod", "image: some/thing:latest", "`latest` is another image tomorrow"),
        ("runpod", "image: host:5000/thing", "`latest` is another image tomorrow"),
        ("runpod", "root: /tmp/x", "erased with the machine"),
        ("kubernetes", "root: /root", "erased with the machine"),
        ("runpod", "root: /var/tmp/x", "erased with the machine"),
        ("runpod", "root: relative", "erased with the machine"),
        ("runpod", "env: {HF_TOKEN: hello}", "env.HF_TOKEN looks like a secret"),
        ("runpod", "env: {PLAIN: hf_abcdefghijklmnopqrstuvwxyz}", "env.PLAIN looks like a secret"),
        ("runpod", "env: {MY_API_KEY: x}", "env.MY_API_KEY looks like a secret"),
        ("runpod", "secrets: {A: hf_abcdefghijklmnopqrstuvwxyz}", "secrets.A holds a value"),
        ("runpod", "secrets: {A: b}\nenv: {A: c}", "A is in env and in secrets"),
        ("runpod", "inputs: [x.jsonl]", "inputs are given without boot"),
        ("runpod", "upload: [{path: x, to: ../y}]", "upload goes to '../y'"),
        ("runpod", "upload: [{path: x, to: /etc}]", "upload goes to '/etc'"),
        ("runpod", "volume: {id: v, size_gb: 5}", "volume has an id and a size"),
        ("ssh", "nodes: 2", "ssh.host is one machine"),
        ("ssh", "gpus: [{name: L40S, max_price: 1}]", "max_price is set, and the target is ssh"),
        ("ssh", "gpus: [L40S, H100]", "candidates are tried at RunPod alone"),
        ("kubernetes", "at_end: {machine: keep}", "at_end.machine is keep"),
    ],
)
def test_rules_between_settings(tmp_path: Path, target: str, line: str, said: str) -> None:
    text = error_of(tmp_path, BASE[target] + line + "\n")
    assert said in text
    assert "hf_abcdefghijklmnopqrstuvwxyz" not in text  # a secret is not repeated


@pytest.mark.parametrize("target", BASE)
def test_the_same_without_that_line_is_right(tmp_path: Path, target: str) -> None:
    assert load_job(written(tmp_path, BASE[target])).spec.target == target


@pytest.mark.parametrize("image", ["a/b:1", "host:5000/b:1", "b@sha256:" + "0" * 64])
def test_pinned_images(tmp_path: Path, image: str) -> None:
    load_job(written(tmp_path, BASE["runpod"] + f"image: {image}\n"))


def test_runpod_without_a_gpu_and_ssh_without_a_host(tmp_path: Path) -> None:
    assert "no GPU is named" in error_of(tmp_path, "name: a\nconfig: runpod_1b\ntarget: runpod\n")
    assert "ssh.host is not set" in error_of(tmp_path, "name: a\nconfig: runpod_1b\ntarget: ssh\n")
