"""The libraries: whether they are there, new enough, fit each other, and fit the driver of the GPUs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainway.config.schema import RunConfig
from trainway.doctor.findings import Finding, Subject, failure, fault, listed, ok, warning
from trainway.doctor.gpu import GpuFacts
from trainway.errors import UserError
from trainway.launch.requirements import check_requirements

ASK_S = 180.0
"""A first `import torch` from a network disk takes a minute."""
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
GPU_BUILD = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu{}"

_PROBE = """
import json, torch
cuda = torch.cuda
facts = {"version": torch.__version__, "cuda": torch.version.cuda, "available": cuda.is_available(), "fault": ""}
facts["kernels"], facts["capabilities"], facts["nccl"] = [], [], None
if torch.version.cuda:
    facts["nccl"] = ".".join(map(str, cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
if facts["available"]:
    facts["kernels"] = cuda.get_arch_list()
    facts["capabilities"] = [list(cuda.get_device_capability(i)) for i in range(cuda.device_count())]
if torch.version.cuda:
    try:
        for number in range(max(1, cuda.device_count())):
            (torch.ones(8, device=f"cuda:{number}") * 2).sum().item()
    except Exception as error:
        facts["fault"] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(facts))
"""


@dataclass(frozen=True)
class TorchFacts:
    """What `import torch` in a process of its own says. `fault`: why it could not be imported, or its first operation
    on a GPU failed."""

    version: str = ""
    cuda: str = ""
    """The CUDA that it was built with; empty for a CPU build."""
    available: bool = False
    nccl: str = ""
    kernels: tuple[str, ...] = ()
    """Architectures that it has kernels for, such as sm_90."""
    capabilities: tuple[tuple[int, int], ...] = ()
    """Of each GPU."""
    fault: str = ""


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


def probe_torch(environ: Mapping[str, str], python: str = sys.executable) -> TorchFacts:
    """Import torch in a process of its own, and compute on each GPU there."""
    try:
        asked = subprocess.run(
            [python, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=ASK_S,
            env=dict(environ),
            check=False,
        )
        if asked.returncode == 0:
            return _torch_facts(json.loads(asked.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return TorchFacts(fault=f"`import torch` took longer than {ASK_S:g} s")
    except (OSError, ValueError, IndexError) as error:
        return TorchFacts(fault=f"{type(error).__name__}: {error}")
    lines = asked.stderr.strip().splitlines()
    return TorchFacts(fault=lines[-1] if lines else f"python ends with {asked.returncode}")


def check_torch(torch: TorchFacts, gpus: GpuFacts) -> Iterator[Finding]:
    """Whether torch is there; what libraries say of its version is another check."""
    if not torch.version:
        missing = "No module named 'torch'" in torch.fault
        build = (
            _build_for(gpus.cuda)
            if gpus.gpus
            else "pip install torch --index-url https://download.pytorch.org/whl/cpu"
        )
        yield failure(
            "torch",
            "PyTorch is not installed" if missing else "PyTorch cannot be imported",
            torch.fault,
            build.replace("--force-reinstall ", "") if missing else build,
        )
        return
    kind = f"built for CUDA {torch.cuda}" if torch.cuda else "a build for the CPU"
    yield ok("torch", f"PyTorch {torch.version}, {kind}")
    if gpus.gpus:
        yield from _check_cuda(torch, gpus)


def check_nccl(torch: TorchFacts, ranks: int) -> Iterator[Finding]:
    if not torch.cuda or not torch.available:
        return
    if torch.nccl:
        yield ok("nccl", f"NCCL {torch.nccl}")
    elif ranks > 1:
        yield failure(
            "nccl",
            "this build of PyTorch has no NCCL",
            f"{ranks} processes exchange gradients by it",
            _build_for(torch.cuda),
        )


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


def check_engine(config: RunConfig, find: object = None) -> Iterator[Finding]:
    """Whether what the configuration asks for beside the requirements can be imported."""
    here = find if callable(find) else importlib.util.find_spec
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
        and not here("vllm")
    ):
        yield failure(
            "engine",
            "rollout.engine is vllm, and vLLM is not installed",
            "no rollout.url names a server that runs already",
            "pip install vllm in an environment of its own and set rollout.url, or use rollout.engine=transformers",
        )
    elif config.model.attention == "flash_attention_2" and not here("flash_attn"):
        yield failure(
            "engine",
            "model.attention is flash_attention_2, and flash-attn is not installed",
            "transformers refuses to build the model without it",
            "pip install flash-attn --no-build-isolation, or use model.attention=auto",
        )
    else:
        yield ok("engine", f"what engine.name={config.engine.name} asks for is installed")


def check_all(subject: Subject, torch: TorchFacts, gpus: GpuFacts) -> Iterator[Finding]:
    required = own_requirements()
    installed = installed_versions({*required, *OPTIONAL, "trainway"})
    yield from check_torch(torch, gpus)
    yield from check_nccl(torch, subject.ranks)
    yield from check_libraries(required, installed)
    yield from check_clashes(installed, stated_requirements(name for name in installed if name != "trainway"))


def _check_cuda(torch: TorchFacts, gpus: GpuFacts) -> Iterator[Finding]:
    fix = _build_for(gpus.cuda)
    if not torch.cuda:
        why = "training would take the CPU while the GPU is paid for"
        yield failure("torch-cuda", f"PyTorch is a CPU build, and there is {gpus.gpus[0].name}", why, fix)
        return
    built, spoken = _version(torch.cuda), _version(gpus.cuda)
    if gpus.cuda and built[:1] > spoken[:1]:
        yield failure(
            "torch-cuda",
            f"PyTorch is built for CUDA {torch.cuda}, and driver {gpus.driver} speaks CUDA {gpus.cuda}",
            "a driver runs what was built for its own major version or an older one",
            f"update the driver, or take a build that fits it: {fix}",
        )
        return
    bare = sorted(
        {f"sm_{major}{minor}" for major, minor in torch.capabilities if not _has_kernels(torch, major, minor)}
    )
    if bare:
        yield failure(
            "torch-cuda",
            f"PyTorch {torch.version} has no kernels for this GPU ({listed(bare)})",
            f"it was built for {listed(torch.kernels, 8)}",
            fix,
        )
    elif torch.fault or not torch.available:
        yield failure(
            "torch-cuda",
            "PyTorch cannot compute on the GPU",
            torch.fault or "torch.cuda.is_available() is false",
            f"restart the container or the machine; if that does not help: {fix}",
        )
    elif gpus.cuda and built[:2] > spoken[:2]:
        yield warning(
            "torch-cuda",
            f"PyTorch is built for CUDA {torch.cuda}, and driver {gpus.driver} speaks CUDA {gpus.cuda}",
            "CUDA's compatibility within a major version carries it; kernels that are compiled on the way may be refused",
            f"update the driver, or take a build that fits it: {fix}",
        )
    else:
        yield ok("torch-cuda", f"PyTorch computes on {len(torch.capabilities)} GPU(s) with CUDA {torch.cuda}")


def _has_kernels(torch: TorchFacts, major: int, minor: int) -> bool:
    """Kernels run on their own generation from their minor version on; PTX (compute_NN) on every later one."""
    for name in torch.kernels:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name)
        if match is None:
            continue
        kind, built = match[1], (int(match[2]), int(match[3]))
        if (kind == "sm" and built[0] == major and built[1] <= minor) or (
            kind == "compute" and built <= (major, minor)
        ):
            return True
    return not torch.kernels


def _build_for(cuda: str) -> str:
    """The command that installs a PyTorch for a driver that speaks `cuda`."""
    known = ((13, 0), (12, 8), (12, 6))
    fitting = next((build for build in known if build <= _version(cuda)[:2]), known[-1])
    return GPU_BUILD.format("".join(map(str, fitting)))


def _torch_facts(said: Mapping[str, object]) -> TorchFacts:
    kernels, capabilities = said["kernels"], said["capabilities"]
    assert isinstance(kernels, list) and isinstance(capabilities, list)
    return TorchFacts(
        version=str(said["version"]),
        cuda=str(said["cuda"] or ""),
        available=bool(said["available"]),
        nccl=str(said["nccl"] or ""),
        kernels=tuple(kernels),
        capabilities=tuple((int(one[0]), int(one[1])) for one in capabilities),
        fault=str(said["fault"]),
    )


def _name(line: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", line)
    return re.sub(r"[._-]+", "-", match[0]).lower() if match else ""


def _range(line: str) -> str:
    """The versions that a line of requirements asks for, such as `<3.0,>=1.31.0`."""
    rest = re.sub(r"^[A-Za-z0-9._-]+\s*(\[[^\]]*\])?", "", line.partition(";")[0]).strip()
    return rest.strip("()").replace(" ", "")


def _fits(version: str, asked: str) -> bool:
    """Whether a version lies in `asked`; what is written otherwise than with <, >, = and numbers counts as fitting."""
    own = _version(version)
    for part in filter(None, asked.split(",")):
        match = re.fullmatch(r"(>=|<=|==|!=|<|>)([0-9][0-9.]*)", part)
        if match is None:
            continue
        bound = _version(match[2])
        width = max(len(own), len(bound))
        left, right = own + (0,) * (width - len(own)), bound + (0,) * (width - len(bound))
        verdict = {
            ">=": left >= right, "<=": left <= right, "==": left == right, "!=": left != right,
            "<": left < right, ">": left > right,
        }  # fmt: skip
        if not verdict[match[1]]:
            return False
    return True


def _version(text: str) -> tuple[int, ...]:
    """The release numbers of a version: 2.13.0+cu128 is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()
