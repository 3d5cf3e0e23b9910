"""From a job file and `key=value` words to a checked Job: the configuration resolved for the job's machine, no rule broken."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from trainway.config.files import config_values
from trainway.config.load import load_config, raise_all
from trainway.config.schema import RunConfig
from trainway.config.source import Setting, parse_scalar, preset_names, read_file
from trainway.errors import ConfigError
from trainway.jobs.hub import settle_release
from trainway.jobs.orders import Ender, Orders
from trainway.jobs.rules import broken_by_run, broken_rules
from trainway.jobs.spec import JobSpec
from trainway.jobs.target import Job

ROOTS = {"runpod": "/workspace", "kubernetes": "/workspace", "ssh": "~/trainway", "local": "."}
"""The volume where the job file does not say: of a rented machine, of a home directory, of this directory."""
OF_THE_JOB = ("settings of the job are wrong", "correct them")
ENDERS: dict[str, Ender] = {"runpod": "runpod"}


def load_job(source: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read a .yaml or .toml job file; `overrides`: `key=value` words over it, e.g. `limits.hours=2`.

    Raises ConfigError naming every wrong setting at once, each with its file and line; of the run's configuration too.
    """
    path = Path(source)
    settings = [*read_file(path), *(_word(word) for word in overrides)]
    spec, origins = _validate(settings, str(path))
    raise_all(list(broken_rules(spec, origins)), *OF_THE_JOB)
    config = _run_config(spec, path.parent)
    raise_all(list(broken_by_run(spec, config, origins)), *OF_THE_JOB)
    root = spec.root or ROOTS[spec.target]
    if spec.target == "local":
        root = str((path.parent / Path(root).expanduser()).absolute())
    settled, release = settle_release(config, spec.at_end.release)
    orders = Orders(
        job=spec.name,
        config=config_values(settled),
        root=root,
        boot=spec.boot,
        inputs=spec.inputs,
        nodes=spec.nodes,
        processes=spec.processes,
        awaits_upload=bool(spec.upload),
        limits=spec.limits,
        release=release,
        sync=spec.sync,
        machine=spec.at_end.machine,
        ender="command" if spec.ssh.end_command else ENDERS.get(spec.target, "exit"),
        end_command=spec.ssh.end_command,
    )
    return Job(spec, config, orders, str(path.parent.absolute()))


def job_name(word: str) -> str:
    """The name of a job: the word itself, or what the job file of that path says.

    Raises ConfigError for a file without a name.
    """
    if not word.endswith((".yaml", ".yml", ".toml")):
        return word
    named = [setting.value for setting in read_file(Path(word)) if setting.path == ("name",)]
    if not named or not isinstance(named[0], str):
        raise ConfigError(f"{word} has no `name`", "every job is called something", "add `name: my-job`")
    return named[0]


def _word(word: str) -> Setting:
    key, equals, value = word.removeprefix("--").partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z][\w.-]*", key):
        raise ConfigError(
            f"{word!r} is not a setting of the job",
            "it is KEY=VALUE",
            "e.g. `limits.hours=2` or `target=local`",
        )
    return Setting(tuple(key.split(".")), parse_scalar(value), "command line")


def _validate(settings: Sequence[Setting], name: str) -> tuple[JobSpec, dict[str, str]]:
    nested: dict[str, Any] = {}
    origins: dict[str, str] = {}
    problems: list[ConfigError] = []
    for setting in settings:
        path, unknown = _place(setting)
        if unknown is not None:
            problems.append(unknown)
            continue
        target = nested
        for part in path[:-1]:
            inner = target.setdefault(part, {})
            if not isinstance(inner, dict):  # a lower layer has a plain value where this one has a table
                inner = target[part] = {}
            target = inner
        target[path[-1]] = setting.value
        origins[".".join(path)] = setting.origin
    try:
        spec = JobSpec.model_validate(nested)
    except ValidationError as error:
        problems += [_wrong(dict(item), origins, name) for item in error.errors(include_url=False)]
    raise_all(problems, *OF_THE_JOB)
    return spec, origins


def _place(setting: Setting) -> tuple[tuple[str, ...], ConfigError | None]:
    """Where a setting goes in the job, its table's own keys (which may have dots) in one piece; or what is wrong."""
    model: type[BaseModel] = JobSpec
    path: list[str] = []
    for depth, part in enumerate(setting.path):
        field = model.model_fields.get(part.replace("-", "_"))
        if field is None:
            written = ".".join(setting.path)
            known = [".".join([*path, name]) for name in model.model_fields]
            near = difflib.get_close_matches(written, known, n=1)
            return (), ConfigError(
                f"{setting.origin}: {written} is not a setting of a job",
                f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}",
                "correct it, or put a setting of the run under `settings:`" if depth == 0 else "correct it",
            )
        path.append(part.replace("-", "_"))
        rest = setting.path[depth + 1 :]
        if rest and get_origin(field.annotation) is dict:
            return (*path, ".".join(rest)), None
        inner = field.annotation
        if not rest or not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return (*path, *rest), None
        model = inner
    raise AssertionError("a setting has a path")


def _wrong(item: Mapping[str, Any], origins: Mapping[str, str], name: str) -> ConfigError:
    """One of pydantic's errors with the line that it is about."""
    place = [str(part) for part in item["loc"]]
    key = ".".join(place)
    origin = next(
        (origins[head] for end in range(len(place), 0, -1) if (head := ".".join(place[:end])) in origins),
        name,
    )
    if item["type"] == "missing":
        return ConfigError(f"{origin}: {key} is not set", "every job says it", f"add `{key}: ...`")
    if item["type"] == "extra_forbidden":
        return ConfigError(f"{origin}: {key} is not a setting of a job", "", "correct it")
    message = (
        str(item["msg"]).replace("Input should be ", "").replace("String should match", "text that matches")
    )
    return ConfigError(
        f"{origin}: {key} is {item['input']!r}",
        f"it must be {message.removeprefix('a valid ')}",
        "correct it",
    )


def _run_config(spec: JobSpec, folder: Path) -> RunConfig:
    """The run's configuration with its places on the job's volume, seen from its root."""
    source = spec.config
    if source.replace("-", "_") not in preset_names():
        source = str(folder / source)
    loaded = load_config(source, spec.settings, environ={})
    places: dict[str, Any] = {
        "name": spec.name,
        "run_dir": str(PurePosixPath("runs") / spec.name),
        "data.store_dir": str(PurePosixPath("cache") / spec.name),
    }
    ours = {key: value for key, value in places.items() if key not in loaded.explicit or key == "name"}
    return load_config(source, {**spec.settings, **ours}, environ={}).config
