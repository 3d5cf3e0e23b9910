"""The libraries: whether they are there, new enough, and fit each other."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainway.config.schema import RunConfig
from trainway.doctor.findings import Finding, failure, fault, listed, ok, warning
from trainway.errors import UserError
from trainway.launch.requirements import check_requirements

OPTIONAL = (
    "datasets",
    "deepspeed",
    "bitsandbytes",
    "vllm",
    "torchvision",
    "torchaudio",
    "flash-attn",
    "triton",
)
"""Packages that are no requirement, and do harm when they are there and do not fit."""


@dataclass(frozen=True)
class Clash:
    """Two packages that do not work together, and do not say so in their own requirements."""

    date: str
    one: str
    one_versions: str
    other: str
    other_versions: str
    why: str


CLASHES = (
    Clash(
        "2026-06", "transformers", ">=5", "peft", "<0.18",
        "peft before 0.18 imports HybridCache, which transformers 5 has no more",
    ),
    Clash(
        "2026-02", "transformers", "==5.1.0", "deepspeed", ">=0",
        "transformers 5.1.0 breaks under DeepSpeed; 5.2 does not",
    ),
)  # fmt: skip
"""The date says when it was last looked at."""


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """{package: version} of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def own_requirements() -> dict[str, str]:
    """{package: what Trainway asks for}, such as {"torch": ">=2.11"}; empty where it is not installed as a package."""
    try:
        stated = importlib.metadata.requires("trainway") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {_name(line): _range(line) for line in stated if "extra ==" not in line}


def stated_requirements(names: Iterable[str]) -> dict[str, list[str]]:
    """{package: the lines of its own requirements that hold without extras}."""
    found = {}
    for name in names:
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = [line for line in lines if "extra ==" not in line and "platform" not in line]
    return found


def check_libraries(required: Mapping[str, str], installed: Mapping[str, str]) -> Iterator[Finding]:
    """required: as of `own_requirements`."""
    missing = [name for name in required if name not in installed]
    old = [name for name in required if name in installed and not _fits(installed[name], required[name])]
    wanted = " ".join(f"'{name}{required[name]}'" for name in [*missing, *old])
    if missing:
        yield failure(
            "libraries",
            f"{'a library is' if len(missing) == 1 else f'{len(missing)} libraries are'} not installed: {listed(missing)}",
            "training imports them",
            f"pip install {wanted}",
        )
    if old:
        shown = [f"{name} {installed[name]}, needs {required[name]}" for name in old]
        yield failure(
            "libraries",
            f"{'a library is' if len(old) == 1 else f'{len(old)} libraries are'} too old: {'; '.join(shown)}",
            "Trainway calls what came with the newer ones",
            f"pip install --upgrade {wanted}",
        )
    if required and not missing and not old:
        yield ok("libraries", f"{len(required)} libraries, all as Trainway needs them")


def check_clashes(installed: Mapping[str, str], stated: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    """What does not fit: pairs of `CLASHES`, and what the packages themselves ask of each other."""
    found = False
    for clash in CLASHES:
        pair = (installed.get(clash.one), installed.get(clash.other))
        if (
            all(pair)
            and _fits(pair[0] or "", clash.one_versions)
            and _fits(pair[1] or "", clash.other_versions)
        ):
            found = True
            yield failure(
                "versions",
                f"{clash.one} {pair[0]} and {clash.other} {pair[1]} do not work together",
                f"{clash.why} (seen {clash.date})",
                f"pip install --upgrade {clash.one} {clash.other}",
            )
    for name, lines in stated.items():
        for line in lines:
            other, asked = _name(line), _range(line)
            if asked and other in installed and not _fits(installed[other], asked):
                found = True
                yield warning(
                    "versions",
                    f"{name} {installed.get(name, '')} asks for {other} {asked}, and {other} is {installed[other]}",
                    "libraries that were built for another version fail on import, or compute something else",
                    f"pip install --upgrade {name}"
                    if name not in ("torch", "trainway")
                    else f"pip install '{other}{asked}'",
                )
    if not found:
        yield ok("versions", "no two libraries are known to clash")


def check_engine(config: RunConfig) -> Iterator[Finding]:
    """Whether what the configuration asks for beside the requirements can be imported."""
    try:
        check_requirements(config)
    except UserError as error:
        if error.code == error.code.ENVIRONMENT:
            yield fault("engine", error)
            return
    if (
        config.recipe == "gad"
        and config.rollout.engine == "vllm"
        and not config.rollout.url
        and not importlib.util.find_spec("vllm")
    ):
        yield failure(
            "engine",
            "rollout.engine is vllm, and vLLM is not installed",
            "no rollout.url names a server that runs already",
            "pip install vllm in an environment of its own and set rollout.url, or use rollout.engine=transformers",
        )
    elif config.model.attention == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
        yield failure(
            "engine",
            "model.attention is flash_attention_2, and flash-attn is not installed",
            "transformers refuses to build the model without it",
            "pip install flash-attn --no-build-isolation, or use model.attention=auto",
        )
    else:
        yield ok("engine", f"what engine.name={config.engine.name} asks for is installed")


def release_numbers(text: str) -> tuple[int, ...]:
    """The release numbers of a version: 2.13.0+cu128 is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def _name(line: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", line)
    return re.sub(r"[._-]+", "-", match[0]).lower() if match else ""


def _range(line: str) -> str:
    """The versions that a line of requirements asks for, such as `<3.0,>=1.31.0`."""
    rest = re.sub(r"^[A-Za-z0-9._-]+\s*(\[[^\]]*\])?", "", line.partition(";")[0]).strip()
    return rest.strip("()").replace(" ", "")


def _fits(version: str, asked: str) -> bool:
    """Whether a version lies in `asked`; what is written otherwise than with <, >, = and numbers counts as fitting."""
    own = release_numbers(version)
    for part in filter(None, asked.split(",")):
        match = re.fullmatch(r"(>=|<=|==|!=|<|>)([0-9][0-9.]*)", part)
        if match is None:
            continue
        bound = release_numbers(match[2])
        width = max(len(own), len(bound))
        left, right = own + (0,) * (width - len(own)), bound + (0,) * (width - len(bound))
        verdict = {
            ">=": left >= right, "<=": left <= right, "==": left == right, "!=": left != right,
            "<": left < right, ">": left > right,
        }  # fmt: skip
        if not verdict[match[1]]:
            return False
    return True
