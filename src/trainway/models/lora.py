"""Low-rank adapters in a frozen model: put in, checked to have landed, what they begin with, checked to learn."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from trainway.checkpoint.adapter import (
    ADAPTER_NAME,
    base_name,
    is_adapter_tensor,
    saved_name,
)
from trainway.checkpoint.pieces import Piece
from trainway.checkpoint.snapshot import Snapshot
from trainway.config.schema import LoraConfig
from trainway.errors import ConfigError, EnvironmentFault
from trainway.models.load import InitialWeights
from trainway.models.lora_targets import Target, find_targets, peft_modules

if TYPE_CHECKING:
    import peft


@dataclass(frozen=True)
class Landed:
    """What of a model is trained."""

    trainable: int
    """Parameters; so is `total`, which counts adapters too."""
    total: int
    places: tuple[str, ...]
    """Kinds of places that an adapter or a trained copy is at: `24 x self_attn.q_proj (r 8)`."""

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        places = ", ".join(self.places)
        return f"trainable {self.trainable:,} of {self.total:,} parameters ({share:.2g} %): {places}"


def inject_lora(
    model: PreTrainedModel,
    lora: LoraConfig,
    base: str | None = None,
    revision: str | None = None,
    *,
    task: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM",
) -> Landed:
    """Put adapters into `model` in place, in fp32 and trainable, and freeze everything else.

    Meant for a model on the meta device: nothing is allocated, and `AdaptedWeights` gives the values.

    Args:
        base: the model to start from as the user named it, a Hub id or a path, and its `revision`; for the adapter's
            configuration, by which others find the base.
        task: what the model does, in peft's words; for the configuration too.

    Raises:
        ConfigError: a name that lands nowhere (the nearest ones are listed) or on what can have no adapter, or
            settings that contradict each other.
        EnvironmentFault: peft has put adapters elsewhere.
    """
    import peft  # takes its time, and only runs with adapters need it

    targets = find_targets(model, lora)
    config = peft.LoraConfig(
        task_type=task,
        base_model_name_or_path=base,
        revision=revision,
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it
        lora_dropout=lora.dropout,
        target_modules=peft_modules(model, lora),
        target_parameters=list(lora.target_parameters) or None,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=list(lora.modules_to_save) or None,
    )
    inject(model, config)
    return landed(model, targets)


def inject(model: PreTrainedModel, config: peft.LoraConfig) -> None:
    """Put the adapters that peft's configuration describes into `model`, in fp32 and trainable, all else frozen."""
    import peft

    with warnings.catch_warnings():
        # peft looks for patterns among modules alone; `find_targets` has checked them
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
        peft.inject_adapter_in_model(config, model, ADAPTER_NAME, low_cpu_mem_usage=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


# ---- that all of them landed


def landed(model: PreTrainedModel, targets: Sequence[Target]) -> Landed:
    """Check that the trained parameters of `model` are exactly those of `targets`, each once, in fp32.

    Raises:
        EnvironmentFault: something is missing, or trained beside them.
    """
    expected = {name: shape for target in targets for name, shape in target.shapes.items()}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {saved_name(name): tuple(parameter.shape) for name, parameter in trained.items()}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} was not asked for" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    problems += [f"{name} is {p.dtype}" for name, p in trained.items() if p.dtype != torch.float32]
    if len(found) != len(trained):
        problems.append(f"{len(trained) - len(found)} have a name twice")
    if problems:
        shown = "; ".join(sorted(problems)[:6])
        rest = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise EnvironmentFault(
            f"peft {version('peft')} has not put the adapters where the settings say",
            shown + rest,
            "experts belong in lora.target_parameters, by the names they have here; else try the pinned peft",
        )
    places = Counter(
        (re.sub(r"^.*\.\d+\.", "", target.name), f"r {target.rank}" if target.rank else "whole")
        for target in targets
    )
    return Landed(
        trainable=sum(parameter.numel() for parameter in trained.values()),
        total=sum(_count(parameter) for parameter in model.parameters()),
        places=tuple(f"{count} x {place} ({kind})" for (place, kind), count in places.items()),
    )


def _count(parameter: nn.Parameter) -> int:
    packed = getattr(parameter, "quant_state", None)  # two numbers of 4 bits in a byte
    return parameter.numel() if packed is None else math.prod(packed.shape)


# ---- what they begin with


@dataclass(frozen=True)
class AdaptedWeights:
    """The base's weights, and of each adapter those of peft's default: a function of `seed` and its name alone.

    A is uniform(-1/sqrt(in), 1/sqrt(in)) (He et al. 2015 with a = sqrt(5)), B is zero: the adapted model begins as its
    base. DoRA's magnitudes are the norms of the base's rows; each takes one whole matrix in memory.
    """

    base: InitialWeights
    """Knows the weights by their names in the base model; asked for some of them more than once."""
    seed: int

    @torch.no_grad()
    def __call__(self, pieces: Iterable[tuple[str, Piece]]) -> None:
        self.base(self._base_pieces(pieces))

    def _base_pieces(self, pieces: Iterable[tuple[str, Piece]]) -> Iterator[tuple[str, Piece]]:
        """Fills the adapters on the way, and hands the rest on: pieces are taken one at a time."""
        widths: dict[str, int] = {}
        for name, piece in pieces:
            if not is_adapter_tensor(name):
                yield base_name(name), piece
                continue
            module, _, kind = name.removesuffix(".weight").removesuffix(f".{ADAPTER_NAME}").rpartition(".")
            match kind:
                case "lora_A":
                    widths[module] = piece.shape[1]
                    piece.copy_from(self._uniform(saved_name(name), piece.shape))
                case "lora_B":
                    piece.copy_from(torch.zeros(piece.shape))
                case _:
                    matrix = torch.empty(*piece.shape, widths[module])
                    self.base([(f"{module}.weight", Piece.whole(matrix))])
                    piece.copy_from(torch.linalg.norm(matrix, dim=1))

    def _uniform(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        digest = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)


# ---- that they learn


def check_gradients(
    model: nn.Module, snapshot: Snapshot, total: Callable[..., list[float]] = lambda *values: [*values]
) -> None:
    """Check that the first step has reached every adapter: no moment of the optimiser is missing, zero or not finite.

    For the snapshot after the first step that was taken. A has no gradient yet while B is zero; everything else has.
    An expert that saw no token leaves zeros in parts of a tensor only. `total` sums its arguments over the ranks, each
    of which holds a part; all ranks call this together.

    Raises:
        ConfigError: names the adapters that learn nothing.
    """
    moments: dict[str, float] = {}
    for slot_name, slot in snapshot.slots.items():
        name = slot_name.partition("/")[2]
        for piece in slot.tensors.values():
            if piece.shape == slot.shape:  # a mean of gradients or of their squares, not a count
                moments[name] = moments.get(name, 0.0) + piece.tensor.detach().double().abs().sum().item()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    present = total(*(float(name in moments) for name in names))
    sums = total(*(moments.get(name, 0.0) for name in names))
    problems = []
    for name, there, size in zip(names, present, sums, strict=True):
        if not there:
            problems.append(f"{name} has none")
        elif not math.isfinite(size):
            problems.append(f"that of {name} is not finite")
        elif size == 0 and ".lora_A." not in name:
            problems.append(f"that of {name} is zero")
    if problems:
        rest = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ConfigError(
            f"{len(problems)} of {len(names)} trained tensors got no gradient in the first step",
            "; ".join(problems[:6]) + rest,
            "take modules that this model does not use out of lora.target_modules and lora.target_parameters",
        )
