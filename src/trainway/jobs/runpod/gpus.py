"""The names under which RunPod rents the GPUs of Trainway's catalogue."""

from __future__ import annotations

from trainway.errors import ConfigError
from trainway.planning.gpus import find_gpu

TYPE_IDS = (
    "NVIDIA A100-SXM4-40GB",
    "NVIDIA A100 80GB PCIe",
    "NVIDIA A100-SXM4-80GB",
    "NVIDIA H100 PCIe",
    "NVIDIA H100 NVL",
    "NVIDIA H100 80GB HBM3",
    "NVIDIA H200",
    "NVIDIA B200",
    "NVIDIA L4",
    "NVIDIA L40S",
    "NVIDIA GeForce RTX 3090",
    "NVIDIA GeForce RTX 4090",
    "NVIDIA GeForce RTX 5090",
    "NVIDIA A40",
    "NVIDIA RTX A6000",
    "NVIDIA RTX 6000 Ada Generation",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
    "AMD Instinct MI300X OAM",
)
"""As GET /catalog/gpus calls them; `up` looks there before it asks for one."""


def gpu_type_id(name: str) -> str:
    """RunPod's id for a GPU by any of its names; an id of RunPod's is itself.

    Raises ConfigError for one that is not in the catalogue, or that RunPod does not rent.
    """
    for type_id in TYPE_IDS:
        if name.strip().lower() in (type_id.lower(), type_id.partition(" ")[2].lower()):
            return type_id
    gpu = find_gpu(name)
    for type_id in TYPE_IDS:
        if find_gpu(type_id).name == gpu.name:
            return type_id
    raise ConfigError(
        f"{name} is not to be had at RunPod",
        "it rents " + ", ".join(dict.fromkeys(find_gpu(type_id).name for type_id in TYPE_IDS)),
        "name one of those, or use another target",
    )
