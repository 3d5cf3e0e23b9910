"""How long a student takes to answer: each token reads the weights and the keys and values of its batch (no torch)."""

from __future__ import annotations

import math

from trainway.config.schema import RunConfig
from trainway.planning.facts import Model
from trainway.planning.gpus import Gpu

BANDWIDTH_SHARE = 0.6
"""Of the data sheet's bandwidth that decoding reaches."""
PREFILL_SHARE = 0.4
"""Of the peak that prompts and large batches reach."""
VLLM_TOKEN_S, TRANSFORMERS_LAYER_S = 2e-3, 1e-3
"""What starting the work of one token costs: vLLM by recorded graphs, transformers kernel by kernel for each block."""
ALL_REDUCE_S = 2 * 20e-6
"""Of each block, when a model is spread over GPUs."""
HANDOVER_GB_S = 4.0
"""At which the student's weights reach the servers through files in memory."""


def cache_bytes_per_answer(model: Model, length: float, size: int) -> float:
    """Keys and values of one sequence of `length` tokens; sliding attention keeps its window."""
    kept = sum(count * min(length, window or length) for window, count in model.windows.items())
    return 2 * model.shape.num_kv_heads * model.shape.head_dim * size * kept


def answer_seconds(
    config: RunConfig,
    model: Model,
    gpu: Gpu,
    world_size: int,
    precision: str,
    *,
    prompts: int,
    prompt: float,
    answer: float,
    cache_bytes: float,
) -> float:
    """Seconds until all answers of a step are written, `num_per_prompt` to each of `prompts`, with the hand-over of
    weights to a server. `prompt`, `answer`: mean tokens; `cache_bytes`: of one copy of the student."""
    rollout = config.rollout
    served = rollout.engine == "vllm"
    spread = min(rollout.tensor_parallel, world_size) if served else 1
    copies = max(1, world_size // spread)
    size = 4 if precision == "fp32" else 2
    each = math.ceil(prompts * rollout.num_per_prompt / copies)
    kept = cache_bytes_per_answer(model, prompt + answer, size)
    batch = min(each, rollout.batch_size * spread)
    if served:
        batch = min(batch, max(1, int(cache_bytes // kept)))
    peak = gpu.peak_flops(precision) * spread
    bandwidth = gpu.bandwidth_gb_s * 1e9 * spread * BANDWIDTH_SHARE
    read = size * _weights_read(model, batch) + batch * cache_bytes_per_answer(
        model, prompt + answer / 2, size
    )
    busy = max(read / bandwidth, 2.0 * model.counts.matmul * batch / (peak * PREFILL_SHARE))
    starting = VLLM_TOKEN_S if served else TRANSFORMERS_LAYER_S * model.num_layers
    starting += ALL_REDUCE_S * model.num_layers * (spread > 1)
    prefill = math.ceil(prompts / copies) * prompt * 2.0 * model.counts.matmul / (peak * PREFILL_SHARE)
    handover = size * model.counts.total / (HANDOVER_GB_S * 1e9) if served else 0.0
    return math.ceil(each / batch) * answer * (busy + starting) + prefill + handover


def _weights_read(model: Model, batch: int) -> float:
    """Weights that one token of each of `batch` answers meets: of a mixture, the experts that any of them chose."""
    return sum((1 - (1 - share) ** batch) * count for share, count in model.read_by.items())
