"""PyTorch: whether it is there, fits the driver, has kernels for the GPUs, and computes on them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trainway.doctor.findings import Finding, failure, listed, ok, warning
from trainway.doctor.gpu import GpuFacts
from trainway.doctor.versions import release_numbers

ASK_S = 180.0
"""A first `import torch` from a network disk takes a minute."""
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


def check_torch(torch: TorchFacts, gpus: GpuFacts, ranks: int = 1) -> Iterator[Finding]:
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
    if torch.cuda and torch.available:
        yield from _check_nccl(torch, ranks)


def _check_nccl(torch: TorchFacts, ranks: int) -> Iterator[Finding]:
    if torch.nccl:
        yield ok("nccl", f"NCCL {torch.nccl}")
    elif ranks > 1:
        yield failure(
            "nccl",
            "this build of PyTorch has no NCCL",
            f"{ranks} processes exchange gradients by it",
            _build_for(torch.cuda),
        )


def _check_cuda(torch: TorchFacts, gpus: GpuFacts) -> Iterator[Finding]:
    fix = _build_for(gpus.cuda)
    if not torch.cuda:
        why = "training would take the CPU while the GPU is paid for"
        yield failure("torch-cuda", f"PyTorch is a CPU build, and there is {gpus.gpus[0].name}", why, fix)
        return
    built, spoken = release_numbers(torch.cuda), release_numbers(gpus.cuda)
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
    fitting = next((build for build in known if build <= release_numbers(cuda)[:2]), known[-1])
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
