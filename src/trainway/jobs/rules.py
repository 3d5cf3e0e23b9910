"""What must hold between the settings of a job; each rule names the line that breaks it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath

from trainway.config.aliases import SECRETS
from trainway.config.schema import RunConfig
from trainway.errors import ConfigError
from trainway.jobs.hub import has_token, hub_repository
from trainway.jobs.spec import JobSpec
from trainway.masking import holds_token, is_secret_variable
from trainway.recipes.volume import ERASED

PAID = ("runpod", "kubernetes")
"""Targets whose machine is gone, with all that is on it, when the job is."""
OWN_SECTIONS = ("ssh", "runpod", "kubernetes")
MOST_VARIABLES = 40
"""RunPod takes 50; some are ours."""
_Where = Callable[[str], str]


def broken_rules(spec: JobSpec, origins: Mapping[str, str]) -> Iterator[ConfigError]:
    """Every rule that the job breaks. `origins`: file and line by dotted key."""

    def where(key: str) -> str:
        found = origins.get(key) or next((o for k, o in origins.items() if k.startswith(f"{key}.")), "")
        return f"{found}: " if found else ""

    yield from _sections(spec, origins, where)
    yield from _variables(spec, where)
    yield from _machine(spec, where)
    yield from _paths(spec, where)
    yield from _release(spec, origins, where)


def broken_by_run(spec: JobSpec, config: RunConfig, origins: Mapping[str, str]) -> Iterator[ConfigError]:
    """What the job and the settings of its run contradict each other in."""
    release, key = spec.at_end.release, "at_end.release.to"
    origin = f"{origins[key]}: " if key in origins else ""
    if config.release.push_to_hub and release.to is not None:
        yield ConfigError(
            f"{origin}{key} is {release.to}, and the run has release.push_to_hub",
            "a job releases to one place",
            "take one of the two out",
        )
    if config.release.push_to_hub and spec.target != "local" and not has_token(spec):
        yield ConfigError(
            "the run has release.push_to_hub, and no secret of the job holds a token of the Hub",
            "the machine could not upload the model",
            "add `secrets: {HF_TOKEN: NAME}`: the name of the secret, not its value",
        )
    if release.merge and not config.lora.enabled:
        yield ConfigError(
            f"{origin}at_end.release.merge is on, and the run trains the whole model",
            "there is no adapter to merge",
            "take it out",
        )
    if release.merge and config.lora.quantize != "none":
        yield ConfigError(
            f"{origin}at_end.release.merge is on, and lora.quantize is {config.lora.quantize}",
            "into what such an adapter is merged has to be said by name, when it is known how well it does",
            "release the adapter, and merge it later: trainway export RUN --merge-into dequantized",
        )


def _sections(spec: JobSpec, origins: Mapping[str, str], where: _Where) -> Iterator[ConfigError]:
    """A setting that this target would ignore is an error."""
    for section in OWN_SECTIONS:
        given = [key for key in origins if key == section or key.startswith(f"{section}.")]
        if given and section != spec.target:
            yield ConfigError(
                f"{where(section)}{given[0]} is set, and the target is {spec.target}",
                f"settings of {section} would be ignored",
                f"take them out, or set `target: {section}`",
            )
    if spec.target in ("local", "ssh"):
        for key in ("image", "volume", "disk_gb"):
            if any(name == key or name.startswith(f"{key}.") for name in origins):
                yield ConfigError(
                    f"{where(key)}{key} is set, and the target is {spec.target}",
                    "the machine is there already, with its own disk",
                    f"take {key} out",
                )
    if spec.target == "kubernetes" and "source" in origins:
        yield ConfigError(
            f"{where('source')}source is set, and the target is kubernetes",
            "nothing is installed in a pod: Trainway is what its image holds",
            "take it out, and build the image from that source (docs/kubernetes.md)",
        )
    if spec.inputs and not spec.boot:
        yield ConfigError(
            f"{where('inputs')}inputs are given without boot",
            "they are what the boot stages shard",
            "add `boot: true`",
        )
    if spec.target == "ssh" and not spec.ssh.host:
        yield ConfigError(
            f"{where('target')}the target is ssh, and ssh.host is not set", "", "add `ssh: {host: NAME}`"
        )
    if spec.target != "runpod" and any(gpu.max_price for gpu in spec.gpus):
        yield ConfigError(
            f"{where('gpus')}max_price is set, and the target is {spec.target}",
            "prices are compared at RunPod alone",
            "use `price`: what one GPU costs there in dollars per hour",
        )
    if spec.target == "runpod" and any(gpu.price for gpu in spec.gpus):
        yield ConfigError(
            f"{where('gpus')}price is set, and the target is runpod",
            "its catalogue says the price",
            "use max_price",
        )
    if spec.target != "runpod" and len(spec.gpus) > 1:
        yield ConfigError(
            f"{where('gpus')}{len(spec.gpus)} kinds of GPUs, and the target is {spec.target}",
            "candidates are tried at RunPod alone",
            "keep one",
        )


def _variables(spec: JobSpec, where: _Where) -> Iterator[ConfigError]:
    for name, value in spec.env.items():
        if is_secret_variable(name) or name.lower() in SECRETS or holds_token(value):
            yield ConfigError(  # the value is not repeated
                f"{where(f'env.{name}')}env.{name} looks like a secret",
                "the job file, the request and the provider's pages show what env holds",
                f"write `secrets: {{{name}: NAME}}`: the name of the secret, not its value",
            )
    for name in set(spec.env) & set(spec.secrets):
        yield ConfigError(f"{where(f'env.{name}')}{name} is in env and in secrets", "", "keep one of the two")
    for name, value in spec.secrets.items():
        if holds_token(value):
            yield ConfigError(
                f"{where(f'secrets.{name}')}secrets.{name} holds a value",
                "it takes the name of a secret",
                "revoke that value, then name the secret",
            )
    if len(spec.env) + len(spec.secrets) > MOST_VARIABLES:
        yield ConfigError(
            f"{where('env')}{len(spec.env) + len(spec.secrets)} variables",
            f"at most {MOST_VARIABLES}",
            "use fewer",
        )


def _machine(spec: JobSpec, where: _Where) -> Iterator[ConfigError]:
    image, _, digest = spec.image.partition("@")
    tag = image.rpartition("/")[2].partition(":")[2]
    if not digest and tag in ("", "latest"):
        yield ConfigError(
            f"{where('image')}image is {spec.image!r}",
            "`latest` is another image tomorrow",
            "write a tag, or a digest: NAME@sha256:...",
        )
    if spec.target == "runpod" and not spec.gpus:
        yield ConfigError(
            f"{where('target')}the target is runpod, and no GPU is named",
            "",
            "add e.g. `gpus: [{name: A100 80GB, count: 1}]`; `trainway plan` lists those that fit",
        )
    if spec.nodes > 1 and spec.target == "ssh":
        yield ConfigError(
            f"{where('nodes')}nodes is {spec.nodes}, and the target is ssh",
            "ssh.host is one machine",
            "use runpod or kubernetes, or start `trainway train` on each machine with MASTER_ADDR",
        )
    if spec.volume.id and spec.volume.size_gb:
        yield ConfigError(
            f"{where('volume')}volume has an id and a size",
            "the size is that of a new one",
            "keep one of the two",
        )
    if spec.target == "kubernetes" and spec.at_end.machine != "terminate":
        yield ConfigError(
            f"{where('at_end.machine')}at_end.machine is {spec.at_end.machine}, and the target is kubernetes",
            "its pods are gone when they end",
            "take it out",
        )
    if spec.target in PAID:
        root = PurePosixPath(spec.root or "/workspace")
        if not root.is_absolute() or any(root.is_relative_to(path) for path in ERASED):
            yield ConfigError(
                f"{where('root')}root is {spec.root}",
                "what is written there is erased with the machine",
                "use the volume: /workspace",
            )


def _paths(spec: JobSpec, where: _Where) -> Iterator[ConfigError]:
    for upload in spec.upload:
        to = PurePosixPath(upload.to)
        if to.is_absolute() or ".." in to.parts:
            yield ConfigError(
                f"{where('upload')}upload goes to {upload.to!r}",
                "it is seen from the volume's root and stays below it",
                "write e.g. `to: data`",
            )


def _release(spec: JobSpec, origins: Mapping[str, str], where: _Where) -> Iterator[ConfigError]:
    release, key = spec.at_end.release, "at_end.release"
    repo = hub_repository(release.to)
    if repo is None:
        for name in ("tag", "private", "licence", "base"):
            if f"{key}.{name}" in origins:
                yield ConfigError(
                    f"{where(f'{key}.{name}')}{key}.{name} is set, and the release goes to {release.to or 'no place'}",
                    "it belongs to a release to the Hub",
                    f"take it out, or set `{key}.to: hf://OWNER/NAME`",
                )
        return
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", repo):
        yield ConfigError(
            f"{where(f'{key}.to')}{key}.to is {release.to!r}",
            "it names no repository of the Hub",
            "write hf://OWNER/NAME",
        )
    if spec.target != "local" and not has_token(spec):
        yield ConfigError(
            f"{where(f'{key}.to')}{key}.to is {release.to}, and no secret holds a token of the Hub",
            "the machine could not upload the model",
            "add `secrets: {HF_TOKEN: NAME}`: the name of the secret, not its value",
        )
