"""ZeRO by DeepSpeed: every rank holds some of each gradient and optimiser state (zero2), or of each weight too (zero3).

DeepSpeed flattens weights and cuts them anywhere; what of a parameter lies here is an interval of its elements.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainway.checkpoint.adapter import saved_pieces
from trainway.checkpoint.optimizer_state import optimizer_slots, read_optimizer
from trainway.checkpoint.pieces import Part, Piece
from trainway.checkpoint.snapshot import MODEL_DIR, Snapshot
from trainway.checkpoint.weights import load_model
from trainway.config.schema import RunConfig
from trainway.engines.ds_config import ds_config
from trainway.engines.hooks import without_hooks
from trainway.engines.precision import Precision
from trainway.engines.single import exchange_pieces
from trainway.engines.world import World
from trainway.engines.zero_parts import ZeroParts, partition
from trainway.errors import ConfigError, EnvironmentFault
from trainway.models.load import allocate
from trainway.optim import build_optimizers, set_learning_rates

INSTALL = "pip install ninja && pip install --no-build-isolation 'deepspeed>=0.19.8'"
"""After torch, which its setup imports."""
OLDEST = (0, 19, 8)
"""Before, a gradient that is not finite could pass for one of norm 1."""

_open_engines: list[Any] = []
"""Of this process: a student's and a discriminator's, say."""


class DeepSpeedLearner:
    """DeepSpeed's engine around `module`, a summed loss over `model` on the meta device.

    The optimiser is ours; it steps when DeepSpeed says so, if the step is accepted. Under bf16 the model itself is
    bf16, and the fp32 weights that the optimiser keeps are what is filled, saved and loaded. After `pieces` have been
    given values, `publish` takes them to the model.
    """

    def __init__(
        self, config: RunConfig, module: nn.Module, model: PreTrainedModel, world: World, precision: Precision
    ):
        settings = ds_config(config, world.world_size, precision, on_gpu=world.device.type == "cuda")
        deepspeed = _import_deepspeed(world)
        if not _open_engines:
            world.closing.callback(_leave, deepspeed)  # before any engine's, and so called after them
        _check(deepspeed, settings, config)
        self.model, self.world = model, world
        self.is_sharded = config.engine.name == "zero3"
        linear = nn.functional.linear  # zero3 puts its own there
        model.tie_weights()  # on the meta device tied weights may still be two
        # made while parameters have their shapes: vectors have no weight decay
        (self._optimizer,) = build_optimizers(model.named_parameters(), config.optim)
        order = [[_name(model, p) for p in group["params"]] for group in self._optimizer.param_groups]
        if precision == "bf16":
            _cast(module, torch.bfloat16)
        if self.is_sharded:
            partition(deepspeed, module, settings, world.device)
        else:
            allocate(module, model, device=world.device)
        with_room = dict(model.named_parameters())
        for group, names in zip(self._optimizer.param_groups, order, strict=True):
            group["params"] = [with_room[name] for name in names]

        self._engine, *_ = deepspeed.initialize(model=module, optimizer=self._optimizer, config=settings)
        self.module: nn.Module = self._engine
        self._gathered = deepspeed.zero.GatheredParameters
        self._parts = ZeroParts(self._engine.optimizer, model, world, sharded=self.is_sharded)
        self.pieces: dict[str, Piece] = self._parts.pieces
        self._take_step = self._optimizer.step
        self._optimizer.step = self._step_if_accepted  # type: ignore[assignment,method-assign,unused-ignore]
        self._accept: Callable[[float], bool] | None = None
        self._norm: float | None = None
        self._accepted = False
        _open_engines.append(self._engine)
        world.closing.callback(_close, self._engine, linear)

    def micro_step(self, *, sync: bool) -> AbstractContextManager[Any]:
        self._engine.set_gradient_accumulation_boundary(sync)
        return nullcontext()

    def backward(self, loss: Tensor, *, scale: float) -> None:
        # DeepSpeed averages over the ranks; our losses are sums, so the mean is turned back into one.
        self._engine.backward(loss * (scale * self.world.world_size), scale_wrt_gas=False)

    def step(self, lr_factor: float, max_norm: float, accept: Callable[[float], bool]) -> float:
        zero = self._engine.optimizer
        zero.clip_grad = max_norm
        set_learning_rates([self._optimizer], lr_factor)
        self._accept, self._norm = accept, None
        self._engine.step()
        if self._norm is None:  # a gradient is not finite: DeepSpeed has left the step out by itself
            self._norm = float("inf")
            accept(self._norm)
        return self._norm

    def whole(self) -> AbstractContextManager[Any]:
        if not self.is_sharded:
            return nullcontext()
        context = ExitStack()
        context.enter_context(self._gathered(list(self.model.parameters())))
        context.enter_context(without_hooks(self.model))
        return context

    def publish(self) -> None:
        """Take new values of `pieces` to the weights that the model computes with. All ranks call it together."""
        self._parts.publish()

    def snapshot(self) -> Snapshot:
        part = Part(self.world.rank, self.world.world_size)
        written = self._parts.written()
        slots = optimizer_slots([self._parts.view_state(self._optimizer)], written)
        return Snapshot(saved_pieces(self.model, written), slots, part)

    def read(self, directory: Path, *, weights_only: bool = False) -> None:
        load_model(self.model, directory / MODEL_DIR, self.pieces)
        self.publish()
        if weights_only:
            return
        view = self._parts.view_state(None)
        states = self._parts.new_state()
        read_optimizer([view], self.pieces, directory, states.room)
        self._parts.take_state(self._optimizer, view, states, str(directory))

    def reset(self) -> None:
        self._optimizer.state.clear()

    def exchange(self, other: Mapping[str, Tensor]) -> None:
        exchange_pieces(self.pieces, other)
        self.publish()

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def _step_if_accepted(self, closure: Any = None) -> None:
        """The optimiser's `step`, which DeepSpeed calls for one part of the weights after another."""
        assert self._accept is not None
        if self._norm is None:
            self._norm = float(self._engine.optimizer._global_grad_norm)  # device→host sync
            self._accepted = self._accept(self._norm)
        if self._accepted:
            self._take_step()


def _import_deepspeed(world: World) -> Any:
    # 1) before the import, which looks for devices by itself 2) what it takes a launcher to have set
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    try:
        import deepspeed  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise EnvironmentFault(
            "engine.name is zero2 or zero3, and DeepSpeed is not installed", f"{error}", INSTALL
        ) from error
    if tuple(int(part) for part in deepspeed.__version__.split("+")[0].split(".")[:3]) < OLDEST:
        raise EnvironmentFault(
            f"DeepSpeed {deepspeed.__version__} is too old",
            f"Trainway needs {'.'.join(map(str, OLDEST))} or newer",
            INSTALL,
        )
    # A shared-memory sum for inference, which would be compiled for two minutes and is never called in training.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # it calls collectives by names that torch has renamed, thousands of times
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    # It warns of every optimiser that is not its own; what a user could cause we say ourselves.
    deepspeed.utils.logger.setLevel("ERROR")
    return deepspeed


def _check(deepspeed: Any, settings: dict[str, Any], config: RunConfig) -> None:
    """Let DeepSpeed look at the configuration before anything is allocated. Raises ConfigError."""
    deepspeed.init_distributed(verbose=False)
    try:
        deepspeed.runtime.config.DeepSpeedConfig(settings)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(
            f"DeepSpeed refuses its configuration, which {config.engine.ds_config} is a part of",
            " ".join(str(error).split()),
            "correct that file",
        ) from error


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Give the floating-point parameters another type; buffers, such as frequencies of positions, keep theirs."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _name(model: nn.Module, wanted: Tensor) -> str:
    return next(name for name, parameter in model.named_parameters() if parameter is wanted)


def _close(engine: Any, linear: Any) -> None:
    _open_engines.remove(engine)
    engine.destroy()
    nn.functional.linear = linear


def _leave(deepspeed: Any) -> None:
    # After the hooks and buffers of all engines: DeepSpeed's process groups, and the world's along with them. What is left
    # to the end of the interpreter may be destroyed in another order, and ends in an abort.
    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()
