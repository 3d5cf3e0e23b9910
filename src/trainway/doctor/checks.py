"""The checks in their order: all of them for `trainway doctor`, the quick ones before a paid run."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

from trainway.config.load import load_config
from trainway.config.schema import RunConfig
from trainway.doctor import data, disk, gpu, logins, machine, needs, network, torch_build, versions
from trainway.doctor.findings import (
    PAID_VARIABLE,
    Finding,
    Subject,
    bounded,
    failures,
    fault,
    is_paid,
    ok,
    without_secrets,
)
from trainway.doctor.model import check_model
from trainway.errors import EnvironmentFault, ExitCode, UserError
from trainway.launch.local import under_launcher

Check = Callable[[], Iterable[Finding]]
Progress = Callable[[str, int, int], None]
T = TypeVar("T")

LIMIT_S = 60.0
"""Of a check that asks a disk or a server."""
LONG_S = 240.0
"""Of one that imports torch or hashes data."""


def examine(
    source: str | None,
    settings: Sequence[str] = (),
    *,
    paid: bool = False,
    git: bool = False,
    environ: Mapping[str, str] = os.environ,
    progress: Progress = lambda what, done, total: None,
) -> list[Finding]:
    """All findings about this machine, and about the run that `source` and `settings` describe, if they do.

    A configuration that is wrong is a finding itself, and the machine is looked at all the same. No finding holds a
    secret, and none of the checks waits for ever.

    Args:
        paid: what lies on the machine's own disk is lost with it; RUNPOD_POD_ID in the environment says so too.
        git: look for Git and an SSH key as well.
        progress: told (name, checks done, checks in all).
    """
    paid = paid or is_paid(environ)
    found, config = _configuration(source, settings)
    gpus = _asked(lambda: gpu.probe_gpus())
    torch = _asked(lambda: torch_build.probe_torch(environ))
    facts = gpus or gpu.GpuFacts(fault="nvidia-smi does not answer")
    ranks = needs.ranks_here(config, facts, environ) if config else max(1, len(facts.gpus))
    subject = Subject(environ, config, ranks, paid)
    checks = _checks(subject, facts, torch or torch_build.TorchFacts(fault="it does not answer"), git)
    for number, (name, limit_s, check) in enumerate(checks):
        progress(name, number, len(checks))
        found += bounded(name, check, limit_s)
    progress("done", len(checks), len(checks))
    return without_secrets(found, environ)


def cheap_checks(config: RunConfig, environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """What takes a second and no torch: the disk, whether the output survives, the data by sizes, the tokens."""
    subject = Subject(environ, config, paid=is_paid(environ))
    checks: tuple[tuple[str, Check], ...] = (
        *_disk_checks(subject, config),
        ("data", partial(data.check_data, config, environ, hashes=False)),
        ("logins", partial(_check_logins, subject, _hub(subject))),
    )
    found = [finding for name, check in checks for finding in bounded(name, check, LIMIT_S)]
    return without_secrets(found, environ)


def refuse_unready(source: str, settings: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
    """On a rented pod, and before any rank starts there: raise EnvironmentFault that names every failure.

    Ranks and other machines pass: the first process of a pod has looked already.
    """
    if not is_paid(environ) or under_launcher(environ):
        return
    found = cheap_checks(load_config(source, settings).config, environ)
    _refuse(
        found,
        "on this paid machine",
        f"`trainway doctor` shows each by itself; {PAID_VARIABLE}=0 goes on regardless",
    )


def refuse_logins(config: RunConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Before anything is rented: raise EnvironmentFault that names every login, permission or model that is missing."""
    subject = Subject(environ, config)
    found = bounded("logins", partial(_check_logins, subject, _hub(subject)), LIMIT_S)
    _refuse(without_secrets(found, environ), "with the logins of this job", "then start it again")


def _refuse(found: Sequence[Finding], where: str, last: str) -> None:
    wrong = failures(found)
    if not wrong:
        return
    count = "one thing is" if len(wrong) == 1 else f"{len(wrong)} things are"
    raise EnvironmentFault(
        f"{count} wrong {where}: {'; '.join(finding.what for finding in wrong)}",
        "; ".join(dict.fromkeys(finding.why for finding in wrong if finding.why)),
        " | ".join([*dict.fromkeys(finding.fix for finding in wrong if finding.fix), last]),
    )


def exit_code(findings: Iterable[Finding]) -> ExitCode:
    return ExitCode.ENVIRONMENT if failures(findings) else ExitCode.DONE


def _configuration(source: str | None, settings: Sequence[str]) -> tuple[list[Finding], RunConfig | None]:
    if source is None:
        return [], None
    try:
        loaded = load_config(source, settings)
    except UserError as error:
        return [fault("config", error)], None
    return [ok("config", f"{loaded.source_name}: every setting is valid")], loaded.config


def _checks(
    subject: Subject, facts: gpu.GpuFacts, torch: torch_build.TorchFacts, git: bool
) -> list[tuple[str, float, Check]]:
    """(name, limit in seconds, check) in the order in which they are made and told."""
    config, environ = subject.config, subject.environ
    hub = _hub(subject)
    found: list[tuple[str, float, Check]] = [
        ("python", LIMIT_S, partial(machine.check_python, sys.version_info[:3])),
        (
            "PyTorch",
            LIMIT_S,
            partial(torch_build.check_torch, torch, gpu.visible_facts(facts, environ), subject.ranks),
        ),
        ("libraries", LIMIT_S, _check_libraries),
        ("GPUs", LIMIT_S, partial(_check_gpus, subject, facts)),
        ("machine", LIMIT_S, partial(_check_machine, subject, facts)),
        ("network", LIMIT_S, partial(_check_network, subject, hub)),
        ("logins", LIMIT_S, partial(_check_logins, subject, hub)),
        ("secrets", LIMIT_S, lambda: logins.check_secrets(logins.probe_command_lines(), environ)),
    ]
    found += [(name, LIMIT_S, check) for name, check in _disk_checks(subject, config)]
    found.append(("disk speed", LIMIT_S, partial(_check_speed, subject)))
    if git:
        found.append(("git", LIMIT_S, partial(logins.check_git, environ, Path.home())))
    if config is not None:
        found += [
            ("run", LIMIT_S, partial(machine.check_run, machine.RunDir(needs.run_place(config)))),
            ("geometry", LIMIT_S, partial(needs.check_geometry, config, subject.ranks, environ)),
            ("engine", LIMIT_S, partial(versions.check_engine, config)),
            ("data", LONG_S, partial(data.check_data, config, environ, hashes=True)),
            ("model", LONG_S, partial(check_model, subject, config)),
        ]
    return found


def _check_libraries() -> Iterator[Finding]:
    required = versions.own_requirements()
    installed = versions.installed_versions({*required, *versions.OPTIONAL})
    yield from versions.check_libraries(required, installed)
    yield from versions.check_clashes(installed, versions.stated_requirements(installed))


def _check_gpus(subject: Subject, facts: gpu.GpuFacts) -> Iterator[Finding]:
    config, environ = subject.config, subject.environ
    yield from gpu.check_driver(facts, paid=subject.paid)
    yield from gpu.check_count(facts, environ, subject.ranks, config.engine.gpus if config else ())
    needed, advice = None, ""
    if config is not None and facts.gpus:
        try:
            everywhere = needs.world_size(config, subject.ranks, environ)
            needed, advice = needs.memory_needs(config, subject.ranks, everywhere)
        except UserError:
            needed = None  # the check of the geometry says why
    used = needs.used_gpus(config, facts, environ)
    yield from gpu.check_memory(facts, used, needed, advice)
    yield from gpu.check_health(facts, used)
    yield from disk.check_shared_memory(disk.probe_size(), subject.ranks, len(used))


def _check_machine(subject: Subject, facts: gpu.GpuFacts) -> Iterator[Finding]:
    needed = None
    if subject.config is not None:
        try:
            everywhere = needs.world_size(subject.config, subject.ranks, subject.environ)
            alone = needs.on_cpu(subject, facts)
            needed = needs.host_needs(subject.config, subject.ranks, everywhere, on_cpu=alone)
        except UserError:
            needed = None  # the check of the geometry says why
    yield from machine.check_machine(subject, needed)


def _hub(subject: Subject) -> Callable[[], network.Answer | None]:
    """The Hub's answer, for which it is asked once; None where HF_HUB_OFFLINE forbids it."""
    return cache(lambda: None if subject.offline else network.ask(network.endpoint(subject.environ)))


def _check_network(subject: Subject, hub: Callable[[], network.Answer | None]) -> Iterator[Finding]:
    answer = hub()
    yield from network.check_network(subject, answer, needs.from_the_hub(subject.config))
    yield from machine.check_clock(answer.skew_s if answer else None, "that of the Hub")


def _check_logins(subject: Subject, hub: Callable[[], network.Answer | None]) -> Iterator[Finding]:
    config, environ = subject.config, subject.environ
    token, answer = logins.find_token(environ), hub()
    login = None
    if token and answer is not None:
        # the Hub's own library would try a server that does not answer again and again
        login = logins.Login(fault=answer.fault) if answer.fault else logins.probe_login(token, environ)
    yield from logins.check_token(token, login, environ, needed=needs.from_the_hub(config))
    if config is None:
        return
    push = config.release.push_to_hub and not subject.offline
    writing = list(logins.check_write(login, needs.planned_repository(config), push=push))
    yield from writing
    if push and not failures(writing):
        yield from logins.check_push(config, environ)
    if answer is not None and not answer.fault:
        for name, kind in needs.hub_repositories(config):
            yield from logins.check_access(name, token, environ, kind)
    yield from logins.check_trackers(config.tracking.report_to, environ, importlib.util.find_spec)


def _disk_checks(subject: Subject, config: RunConfig | None) -> tuple[tuple[str, Check], ...]:
    environ = subject.environ
    places = {"HF_HOME": needs.hub_home(environ)}
    if config is not None:
        places = {"run_dir": needs.run_place(config), "data.store_dir": Path(config.data.store_dir), **places}
    output = places.get("run_dir", Path.cwd())
    return (
        ("disk: writing", partial(disk.check_writable, places)),
        ("disk: room", lambda: disk.check_room(needs.disk_needs(config, environ))),
        ("disk: survival", lambda: disk.check_survival([output], environ, paid=subject.paid)),
    )


def _check_speed(subject: Subject) -> Iterator[Finding]:
    config = subject.config
    output = disk.existing(needs.run_place(config) if config else Path.cwd())
    saved = needs.checkpoint_bytes(config) if config else None
    yield from disk.check_speed(disk.probe_speed(output), output, saved)
    yield from machine.check_file_clock(machine.probe_file_clock(output), output)


def _asked(probe: Callable[[], T]) -> T | None:
    """What a probe says, or None at its limit: each has one of its own, and this is for disks that hang below it."""
    held: list[T] = []

    def run() -> list[Finding]:
        held.append(probe())
        return []

    bounded("probe", run, LONG_S)
    return held[0] if held else None
