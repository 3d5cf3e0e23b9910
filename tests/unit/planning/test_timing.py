"""Seconds of a step: against published tokens per second, against counts by hand, against measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.config.test_load import load
from tests.unit.planning.test_measured import ONE
from trainway.config.schema import LoraConfig, RunConfig
from trainway.planning.facts import Model
from trainway.planning.geometry import resolve_geometry
from trainway.planning.gpus import find_gpu
from trainway.planning.measured import Measurement
from trainway.planning.published import published_shape
from trainway.planning.rollout_time import answer_seconds, cache_bytes_per_answer
from trainway.planning.timing import (
    HIDDEN,
    HOST_ADAM_GB_S,
    HOST_LINK_GB_S,
    LAUNCH_S,
    LINK_SHARE,
    Job,
    efficiency,
    gad_step,
    recomputing,
    supervised_step,
)


def model_of(name: str, lora: LoraConfig | None = None) -> Model:
    shape = published_shape(name)
    assert shape is not None
    return Model(shape, lora or LoraConfig())


def job(config: RunConfig, model: Model, gpu: str, ranks: int = 1, nodes: int = 1, fill: float = 1.0) -> Job:
    geometry = resolve_geometry(config, ranks)
    return Job(config, model, geometry, find_gpu(gpu), nodes, "bf16", fill)


def sft(name: str, **sections: object) -> RunConfig:
    base = {"recipe": "sft", "model": {"path": name}, "schedule": {"warmup_steps": 0}}
    train = {"total_steps": 10, "seq_len": 4096, "micro_batch_size": 4, "grad_accum_steps": 4}
    return RunConfig.model_validate({**base, "train": train, **sections})


def speed(config: RunConfig, model: Model, gpu: str, ranks: int = 1) -> float:
    """Tokens per second and GPU of the arithmetic alone."""
    work = efficiency(config, model, find_gpu(gpu), (), ranks, "bf16")
    assert work is not None and work.kind == "modelled"
    step = supervised_step(job(config, model, gpu, ranks), work)
    return step.tokens / step.parts["arithmetic"] / ranks


@pytest.mark.parametrize(
    ("name", "ranks", "lora", "seq_len", "published"),
    [
        ("openai/gpt-oss-20b", 8, False, 4096, 13_100),  # NeMo AutoModel, all parameters
        ("meta-llama/Llama-3.1-8B-Instruct", 1, True, 512, 12_500),  # NeMo AutoModel, LoRA
        ("meta-llama/Llama-3.1-8B-Instruct", 1, False, 8192, 6_700),  # torchtitan, compiled
    ],
)
def test_published_tokens_per_second_come_out(
    name: str, ranks: int, lora: bool, seq_len: int, published: float
) -> None:
    train = {"total_steps": 10, "seq_len": seq_len, "micro_batch_size": 8, "grad_accum_steps": 4}
    config = sft(name, lora={"enabled": lora}, train=train)
    model = model_of(name, config.lora)
    assert 0.87 * published < speed(config, model, "H100", ranks) < 1.05 * published


def test_a_pretraining_of_a_billion_on_one_gpu() -> None:
    # llm-foundry: 1.3B 45.5k tokens/s on H100 and 20.5k on A100; this one is smaller by a fifth
    config = load("runpod_1b")
    from trainway.planning.model_shape import find_shape

    model = Model(find_shape(config), config.lora)
    assert 45_500 < speed(config, model, "H100") < 1.4 * 45_500
    assert 20_500 < speed(config, model, "A100-80") < 1.4 * 20_500


def test_recomputation_costs_its_share() -> None:
    full = {"total_steps": 1, "activation_checkpointing": "full"}
    assert recomputing(sft("x", train=full)) == pytest.approx(6 / 8)
    assert recomputing(sft("x", train=full, lora={"enabled": True})) == pytest.approx(4 / 6)
    assert recomputing(sft("x")) == 1.0


def test_no_step_is_faster_than_the_program_that_starts_it() -> None:
    config = load("sft_small", ["total_steps=10"])
    model = model_of("HuggingFaceTB/SmolLM2-135M-Instruct")
    work = efficiency(config, model, find_gpu("B200"), (), 1, "bf16")
    assert work is not None
    step = supervised_step(job(config, model, "B200"), work)
    assert step.seconds == pytest.approx(4 * 30 * LAUNCH_S)


NAME = "meta-llama/Llama-3.1-8B-Instruct"
TOTAL = 8_030_261_248


def traffic(engine: dict[str, object], gpu: str = "H100", ranks: int = 8, nodes: int = 1, **sections: object) -> float:  # fmt: skip
    config = sft(NAME, engine=engine, **sections)
    model = model_of(NAME, config.lora)
    work = efficiency(config, model, find_gpu(gpu), (), ranks, "bf16")
    assert work is not None
    return supervised_step(job(config, model, gpu, ranks, nodes), work).parts.get("communication", 0.0)


def test_traffic_is_counted_from_what_each_engine_moves() -> None:
    # H100: 450 GB/s each way, at LINK_SHARE; a ring of 8 sends 7/8; 4 micro-batches a step
    second = 450e9 * LINK_SHARE / (7 / 8)
    assert traffic({"name": "ddp"}) == pytest.approx(2 * 4 * TOTAL / second)
    assert traffic({"name": "fsdp"}) == pytest.approx(4 * (2 * 2 + 4) * TOTAL / second)
    assert traffic({"name": "fsdp", "reshard_after_forward": False}) == pytest.approx(4 * 6 * TOTAL / second)
    assert traffic({"name": "zero3"}) == pytest.approx(4 * 8 * TOTAL / second)
    assert traffic({"name": "zero2"}) == pytest.approx((4 * 4 + 2) * TOTAL / second)
    assert traffic({"name": "single"}, ranks=1) == 0.0
    # adapters of rank 16 on q, k, v, o alone have gradients
    adapters = 32 * 16 * (2 * 8192 + 2 * (4096 + 1024))
    assert traffic({"name": "ddp"}, lora={"enabled": True}) == pytest.approx(8 * adapters / second)


def test_between_nodes_the_slowest_link_counts() -> None:
    within, across = traffic({"name": "fsdp"}, ranks=16), traffic({"name": "fsdp"}, ranks=16, nodes=2)
    assert across == pytest.approx(within * 450 / 50)
    pcie = traffic({"name": "fsdp"}, "L40S", ranks=16, nodes=2)
    assert pcie == pytest.approx(across * 50 / 3)
    hybrid = traffic({"name": "fsdp", "sharding": "hybrid", "shard_ranks": 8}, ranks=16, nodes=2)
    assert traffic({"name": "fsdp"}) < hybrid < across / 2


def test_the_shorter_of_arithmetic_and_traffic_is_mostly_hidden() -> None:
    config = sft(NAME, engine={"name": "fsdp"})
    model = model_of(NAME)
    work = efficiency(config, model, find_gpu("H100"), (), 8, "bf16")
    assert work is not None
    step = supervised_step(job(config, model, "H100", 8), work)
    arithmetic, moved = step.parts["arithmetic"], step.parts["communication"]
    assert step.seconds == pytest.approx(max(arithmetic, moved) + (1 - HIDDEN) * min(arithmetic, moved))


def test_an_optimiser_in_the_cpus_memory_is_added() -> None:
    config = sft(NAME, engine={"name": "zero3", "cpu_offload": "optimizer"})
    model = model_of(NAME)
    work = efficiency(config, model, find_gpu("H100"), (), 8, "bf16")
    assert work is not None
    step = supervised_step(job(config, model, "H100", 8), work)
    own = TOTAL / 8
    assert step.parts["offload"] == pytest.approx(
        own * 6 / HOST_LINK_GB_S / 1e9 + own * 28 / HOST_ADAM_GB_S / 1e9
    )


def measured(**changes: object) -> Measurement:
    return replace(ONE, **changes)  # type: ignore[arg-type]


def test_a_measurement_replaces_the_published_share() -> None:
    config = sft(NAME)
    model, h200 = model_of(NAME), find_gpu("H200")
    own = measured(parameters=TOTAL, trainable=TOTAL, seq_len=4096)
    work = efficiency(config, model, h200, [own], 1, "bf16")
    assert work is not None
    assert (work.kind, work.covers_all) == ("measured", True)
    assert work.mfu == pytest.approx(0.5)
    assert work.source == "bench of 2026-11-20: pretrain of 8.03B, 1 x NVIDIA H200, single"
    step = supervised_step(job(config, model, "H200"), work)
    assert step.seconds == pytest.approx(step.flops / (989e12 * 0.5))
    # recomputation that the measured run did not do is taken off
    full = config.model_copy(
        update={"train": config.train.model_copy(update={"activation_checkpointing": "full"})}
    )
    less = efficiency(full, model, h200, [own], 1, "bf16")
    assert less is not None and less.mfu == pytest.approx(0.5 * 6 / 8)
    # of another number of ranks it says nothing about traffic
    several = efficiency(config, model, h200, [own], 8, "bf16")
    assert several is not None and not several.covers_all
    assert "communication" in supervised_step(job(config, model, "H200", 8), several).parts
    other = efficiency(config, model, find_gpu("H100"), [own], 1, "bf16")
    assert other is not None and other.kind == "modelled"


def test_a_cpu_is_known_by_measurement_alone() -> None:
    config, cpu = load("cpu_small"), find_gpu("cpu")
    from trainway.planning.model_shape import find_shape

    model = Model(find_shape(config), config.lora)
    assert efficiency(config, model, cpu, (), 1, "fp32") is None
    own = measured(
        device="cpu", precision="fp32", parameters=5_868_800, trainable=5_868_800, seq_len=256,
        flops_per_step=1e12, step_s=10.0, gemm_flops=2e11,
    )  # fmt: skip
    work = efficiency(config, model, cpu, [own], 1, "fp32")
    assert work is not None and work.mfu == pytest.approx(0.5)
    step = supervised_step(replace(job(config, model, "H100"), gpu=cpu, precision="fp32"), work)
    assert step.seconds == pytest.approx(step.flops / 1e11)


# ---- gad


def test_a_step_of_gad_counts_each_pass() -> None:
    config = load("gad_7b", ["warmup_steps=10", "adversarial_steps=10"])
    model = model_of("Qwen/Qwen2.5-7B-Instruct")
    work = efficiency(config, model, find_gpu("H200"), (), 8, "bf16")
    assert work is not None
    one = job(config, model, "H200", 8, fill=0.5)
    steps = {stage: gad_step(one, work, stage, 60e9) for stage in ("seqkd", "warmup", "adversarial")}
    length, prompts = 1792, 256
    forward, training = model.forward_flops(length), model.training_flops(length)
    head = model.counts.embedding
    assert training == pytest.approx(3 * forward)
    judged = prompts * 9 * length
    assert steps["seqkd"].flops == pytest.approx(prompts * length * training)
    assert list(steps["seqkd"].parts) == ["student"]
    discriminator = judged * (forward - 2 * head + training - 6 * head)
    assert steps["warmup"].flops == pytest.approx(discriminator + prompts * length * training)
    # the student's answers once more, with the reference's pass over them
    policy = prompts * 8 * length * (training + forward)
    assert steps["adversarial"].flops == pytest.approx(discriminator + policy)
    assert list(steps["adversarial"].parts) == ["rollout", "score", "discriminator", "student"]
    assert steps["adversarial"].parts["rollout"] == steps["warmup"].parts["rollout"]
    assert steps["adversarial"].seconds == pytest.approx(sum(steps["adversarial"].parts.values()))
    without = load("gad_7b", ["kl_coef=0"])
    cheaper = gad_step(replace(one, config=without), work, "adversarial", 60e9)
    assert steps["adversarial"].flops - cheaper.flops == pytest.approx(prompts * 8 * length * forward)


def test_keys_and_values_of_an_answer() -> None:
    qwen = model_of("Qwen/Qwen2.5-7B-Instruct")
    assert cache_bytes_per_answer(qwen, 1000, 2) == 2 * 4 * 128 * 2 * 28 * 1000
    oss = model_of("openai/gpt-oss-20b")  # half of its layers keep 128 tokens
    assert cache_bytes_per_answer(oss, 1000, 2) == 2 * 8 * 64 * 2 * (12 * 1000 + 12 * 128)


def test_answers_are_bound_by_what_they_read() -> None:
    config = load("gad_7b")
    model = model_of("Qwen/Qwen2.5-7B-Instruct")

    def seconds(
        gpu: str, prompts: int = 256, answer: float = 768, cache: float = 60e9, engine: str = ""
    ) -> float:
        own = load("gad_7b", [f"rollout.engine={engine}"]) if engine else config
        return answer_seconds(
            own, model, find_gpu(gpu), 8, "bf16", prompts=prompts, prompt=1024, answer=answer, cache_bytes=cache
        )  # fmt: skip

    assert seconds("H200") < seconds("H100") < seconds("A100-80") < seconds("L40S")
    assert seconds("H200", answer=1536) > 1.8 * seconds("H200", answer=768)
    assert seconds("H200", prompts=1024) > 1.5 * seconds("H200")
    assert seconds("H200", cache=3e9) > seconds("H200")  # fewer at once, more waves
    assert seconds("H200", engine="transformers") > seconds("H200")
