"""The table of docs/plan.md: what each preset takes, by its plan."""

from __future__ import annotations

BEGIN = "<!-- made by `python scripts/references.py` -->"
END = "<!-- end -->"
GIB = 2**30

TARGETS: tuple[tuple[str, str, int, int, int | None], ...] = (
    ("m3_medium", "RTX 4090", 1, 1, None),
    ("runpod_1b", "A100-80", 1, 1, None),
    ("runpod_2b", "A100-80", 1, 1, None),
    ("runpod_4b", "A100-80", 1, 1, None),
    ("runpod_4b", "H200", 8, 1, None),
    ("sft_small", "L4", 1, 1, 10_000),
    ("lora_small", "L4", 1, 1, 10_000),
    ("lora_default", "RTX 4090", 1, 1, 10_000),
    ("lora_default", "L40S", 1, 1, 10_000),
    ("gpt_oss_20b_full", "H100 PCIe", 4, 1, 10_000),
    ("gpt_oss_20b_full", "H200", 8, 1, 10_000),
    ("gpt_oss_20b_lora", "H200", 4, 1, 990),
    ("gad_small", "L4", 1, 1, 10_000),
    ("gad_3b", "H100", 8, 1, 282_000),
    ("gad_7b", "H200", 8, 1, 282_000),
    ("gad_14b", "H200", 8, 2, 282_000),
    ("gad_235b", "B200", 8, 1, 282_000),
)
"""Preset, GPU, GPUs of a node, nodes, rows of an epoch where the preset counts in epochs."""


def table() -> str:
    """Rows of the table, by the shipped prices and without any measurement of this machine."""
    from trainway.config.load import load_config
    from trainway.planning.gpus import find_gpu
    from trainway.planning.plan import make_plan
    from trainway.planning.plan_text import dollars, duration, hours, size

    lines = [
        "| preset | parameters | GPUs | GiB of each | fits | step | rows of an epoch | hours | dollars |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, gpu, num_gpus, num_nodes, rows in TARGETS:
        config = load_config(name, environ={}).config
        plan = make_plan(
            config, gpu=find_gpu(gpu), num_gpus=num_gpus, num_nodes=num_nodes, rows_per_epoch=rows
        )
        assert plan.step_s is not None and plan.hours is not None and plan.dollars is not None
        where = f"{num_gpus} x {gpu}" + f" x {num_nodes} nodes" * (num_nodes > 1)
        need = f"{plan.headroom.peak_bytes / GIB:.1f} of {plan.gpu.memory_gib:g}"
        cells = [
            f"`{name}`", size(plan.parameters.total), where, need, "yes" if plan.fits else "no",
            duration(plan.step_s), f"{rows:,}" if rows else "", hours(plan.hours), dollars(plan.dollars),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render(page: str) -> str:
    """The page with the table as it should be. Raises ValueError when the page has no place for it."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"
