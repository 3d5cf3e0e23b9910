"""The catalogue of GPUs: found by every name that people and drivers use, and refused with the nearest."""

from __future__ import annotations

import itertools

import pytest

from trainway.errors import ConfigError
from trainway.planning.arithmetic import peak_flops
from trainway.planning.gpus import GPUS, find_gpu, gpu_of_device


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("H100", "H100"),
        ("h100-80", "H100"),
        ("nvidia H100 80GB HBM3", "H100"),
        ("h100_pcie", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("a100", "A100-80"),
        ("A100-80", "A100-80"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100 80GB PCIe", "A100-80 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("5090", "RTX 5090"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA B200", "B200"),
        ("AMD Instinct MI300X OAM", "MI300X"),
    ],
)
def test_found_by_every_usual_name(name: str, found: str) -> None:
    assert find_gpu(name).name == found
    device = gpu_of_device(name)
    assert device is not None and device.name == found


def test_no_name_stands_for_two() -> None:
    names = [known.lower() for gpu in GPUS for known in {gpu.name, *gpu.aliases}]
    assert len(names) == len(set(names))
    for gpu in GPUS:
        for known in (gpu.name, *gpu.aliases):
            assert find_gpu(known) is gpu and gpu_of_device(known) is gpu, known


def test_a_misspelt_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        find_gpu("H1000")
    assert caught.value.what == "there is no GPU 'H1000' in the catalogue"
    assert "H100" in caught.value.why
    assert "H200" in caught.value.fix and "or cpu" in caught.value.fix
    with pytest.raises(ConfigError):
        find_gpu("")


def test_figures_of_the_data_sheets() -> None:
    dense = {gpu.name: gpu.bf16_flops / 1e12 for gpu in GPUS}
    assert (dense["A100-80"], dense["H100"], dense["H200"], dense["H100 PCIe"]) == (312, 989, 989, 756)
    assert (dense["B200"], dense["L4"], dense["L40S"], dense["RTX 4090"]) == (2250, 121, 362, 165)
    for gpu in GPUS:
        # a data sheet's gigabytes are at least what a driver gives in GiB, and no more than a tenth above
        sheet = {"A100-40": 40, "H200": 141, "B200": 192, "MI300X": 192, "RTX PRO 6000": 96, "H100 NVL": 94}
        if gpu.name in sheet:
            assert 0.9 * sheet[gpu.name] <= gpu.memory_gib <= sheet[gpu.name]
        assert gpu.fp32_flops < gpu.bf16_flops
        assert gpu.peak_flops("bf16") == gpu.peak_flops("fp16") == gpu.bf16_flops
        assert gpu.peak_flops("fp32") == gpu.fp32_flops
        assert gpu.node_gpus == 8
        assert gpu.memory_bytes == round(gpu.memory_gib * 2**30)
    fast = [gpu for gpu in GPUS if gpu.link_gb_s > 100]
    assert {gpu.name for gpu in fast} == {"A100-40", "A100-80", "H100", "H200", "B200", "MI300X"}
    for one, other in itertools.pairwise(("L4", "A40", "A100-80", "H100", "H200", "B200")):
        assert find_gpu(one).bandwidth_gb_s < find_gpu(other).bandwidth_gb_s


def test_the_cpu_is_this_machine() -> None:
    cpu = find_gpu("cpu")
    assert cpu.is_cpu and cpu.memory_gib > 0.5
    assert cpu.peak_flops("fp32") == 0


def test_peaks_by_a_drivers_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA GeForce RTX 3090") == 71e12
    assert peak_flops("NVIDIA Tesla T4") is None
    assert peak_flops("cpu") is None
