"""The GPUs that a plan knows: memory, bandwidth, peak FLOP/s and links, from their makers' data sheets (no torch)."""

from __future__ import annotations

import difflib
import functools
import os
import re
from dataclasses import dataclass, replace

from trainway.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One type of GPU. Peaks are dense, never those of structured sparsity; bf16 sums in fp32."""

    name: str
    memory_gib: float
    """What the driver offers a program: a data sheet's 80 GB are 79.1 GiB of it with error correction."""
    bandwidth_gb_s: float
    bf16_flops: float
    fp32_flops: float
    """Without TF32, which Trainway does not turn on."""
    link_gb_s: float
    """Per GPU, to the others of its node, in one direction."""
    node_gpus: int
    """GPUs of the largest common machine."""
    aliases: tuple[str, ...] = ()
    host_gib: float = 0.0
    """Memory of the CPU that a rented machine has for each of its GPUs; 0 if unknown."""

    @property
    def memory_bytes(self) -> int:
        return round(self.memory_gib * 2**30)

    @property
    def is_cpu(self) -> bool:
        return self.name == CPU

    def peak_flops(self, precision: str) -> float:
        """FLOP/s of matrix products in fp32, or in bf16 or fp16; 0 for a CPU, where only a measurement tells."""
        return self.fp32_flops if precision == "fp32" else self.bf16_flops


CPU = "cpu"
PCIE_4, PCIE_5 = 32.0, 64.0
"""GB/s of sixteen lanes in one direction."""

GPUS: tuple[Gpu, ...] = (
    Gpu("A100-40", 39.4, 1555, 312e12, 19.5e12, 300, 8,
        ("A100 40GB", "A100 SXM 40GB", "A100-SXM4-40GB", "A100-PCIE-40GB"), 80),
    Gpu("A100-80 PCIe", 79.1, 1935, 312e12, 19.5e12, PCIE_4, 8, ("A100 PCIe", "A100 80GB PCIe", "A100-80GB-PCIe"), 117),
    Gpu("A100-80", 79.1, 2039, 312e12, 19.5e12, 300, 8,
        ("A100", "A100 SXM", "A100-80 SXM", "A100 80GB", "A100-SXM4-80GB", "A100 SXM4 80GB"), 117),
    Gpu("H100 PCIe", 79.1, 2000, 756e12, 51.2e12, PCIE_5, 8, ("H100 PCIe 80GB", "H100-80 PCIe", "H100 80GB PCIe"), 176),
    Gpu("H100 NVL", 93.1, 3938, 835e12, 60e12, PCIE_5, 8, ("H100 94GB",), 94),
    Gpu("H100", 79.1, 3350, 989e12, 66.9e12, 450, 8,
        ("H100 SXM", "H100-80", "H100 80GB", "H100 80GB HBM3", "H100 SXM5 80GB", "H100-SXM5-80GB"), 125),
    Gpu("H200", 139.8, 4800, 989e12, 66.9e12, 450, 8, ("H200 SXM", "H200-141", "H200 141GB"), 188),
    Gpu("B200", 178.4, 8000, 2250e12, 75e12, 900, 8, ("B200 SXM", "B200-180", "HGX B200"), 180),
    Gpu("L4", 22.0, 300, 121e12, 30.3e12, PCIE_4, 8, ("L4 24GB",), 50),
    Gpu("L40S", 44.4, 864, 362e12, 91.6e12, PCIE_4, 8, ("L40S 48GB",), 62),
    Gpu("RTX 3090", 23.6, 936, 71e12, 35.6e12, PCIE_4, 8, ("3090", "GeForce RTX 3090"), 24),
    Gpu("RTX 4090", 23.5, 1008, 165e12, 82.6e12, PCIE_4, 8, ("4090", "GeForce RTX 4090"), 41),
    Gpu("RTX 5090", 31.4, 1792, 209e12, 104.8e12, PCIE_5, 8, ("5090", "GeForce RTX 5090"), 60),
    Gpu("A40", 44.4, 696, 149.7e12, 37.4e12, PCIE_4, 8, ("A40 48GB",), 48),
    Gpu("RTX A6000", 47.4, 768, 154.8e12, 38.7e12, PCIE_4, 8, ("A6000",), 50),
    Gpu("RTX 6000 Ada", 47.4, 960, 364e12, 91.1e12, PCIE_4, 8, ("6000 Ada", "RTX 6000 Ada Generation"), 62),
    Gpu("RTX PRO 6000", 95.0, 1792, 503.8e12, 125e12, PCIE_5, 8,
        ("RTX PRO 6000 Blackwell", "PRO 6000 Blackwell", "RTX PRO 6000 Blackwell Server Edition",
         "RTX PRO 6000 Blackwell Workstation Edition"), 188),
    Gpu("MI300X", 191.5, 5300, 1307e12, 163.4e12, 448, 8, ("Instinct MI300X", "Instinct MI300X OAM"), 250),
)  # fmt: skip
"""Sources: NVIDIA's data sheets of each card, its Ampere, Ada and Blackwell architecture papers for GeForce and RTX
cards, AMD's for MI300X. `link_gb_s` is half of a data sheet's figure, which counts both directions. `host_gib` is what
RunPod gives with a GPU, of several machines the smaller."""

_MAKERS = {"nvidia", "amd"}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name, an alias, or a driver's name for it; `cpu` is this machine, of which only memory is known.

    Raises:
        ConfigError: there is none of that name; the nearest are named.
    """
    words = _words(name)
    if words == (CPU,):
        return replace(_CPU, memory_gib=_machine_memory() / 2**30)
    for gpu in GPUS:
        if any(words == _words(known) for known in (gpu.name, *gpu.aliases)):
            return gpu
    names = {known.lower(): gpu.name for gpu in GPUS for known in (gpu.name, *gpu.aliases)}
    near = difflib.get_close_matches(" ".join(words), names, n=6, cutoff=0.4)
    found = list(dict.fromkeys(names[close] for close in near))[:3]
    raise ConfigError(
        f"there is no GPU {name!r} in the catalogue",
        f"near it are {', '.join(found)}" if found else "none of that kind is known",
        f"use one of {', '.join(gpu.name for gpu in GPUS)}, or cpu",
    )


@functools.cache
def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU that a driver calls `device_name`, by the longest of our names in it; None for one not in the catalogue."""
    words = _words(device_name)
    if words == (CPU,):
        return _CPU
    best: tuple[int, Gpu] | None = None
    for gpu in GPUS:
        for known in (gpu.name, *gpu.aliases):
            size = len(_words(known))
            if _holds(words, _words(known)) and (best is None or size > best[0]):
                best = size, gpu
    return best[1] if best else None


@functools.cache
def _words(name: str) -> tuple[str, ...]:
    words = re.findall(r"[a-z0-9]+", name.lower())
    return tuple(word for word in words if word not in _MAKERS)


def _holds(words: tuple[str, ...], part: tuple[str, ...]) -> bool:
    return any(words[start : start + len(part)] == part for start in range(len(words) - len(part) + 1))


_CPU = Gpu(CPU, 0.0, 0.0, 0.0, 0.0, 0.0, 1)


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
