"""Where adapters go: every place in a model that the settings name, or an error that says which name lands nowhere."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainway.config.lora_rules import contradictions
from trainway.config.schema import LoraConfig
from trainway.errors import ConfigError

ALL_LINEAR = "all-linear"
_REGEX = re.compile(r"[^\w.-]")


class Target(NamedTuple):
    """A place that gets an adapter, or a module that is trained whole (rank 0)."""

    name: str
    """Of the module, or of the parameter where the module has several."""
    rank: int
    shapes: dict[str, tuple[int, ...]]
    """Of the tensors trained there, by their names in peft's files."""


def find_targets(model: PreTrainedModel, lora: LoraConfig) -> list[Target]:
    """Every place in a plain `model` that `lora` names.

    Raises:
        ConfigError: as `inject_lora`.
    """
    _check_settings(lora)
    copies = _find_copies(model, lora)
    modules = _find_modules(model, lora, copies)
    parameters = _find_parameters(model, lora)
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, setting):
            _compiled(f"lora.{setting}", pattern)
            if not any(_fits(pattern, name) for name in (*modules, *parameters)):
                raise _nowhere(f"lora.{setting}", pattern, [*modules, *parameters])

    def rank_of(name: str) -> int:
        return next((rank for pattern, rank in lora.rank_pattern.items() if _fits(pattern, name)), lora.r)

    targets = [_module_target(name, module, rank_of(name), lora) for name, module in modules.items()]
    by_module: dict[str, list[str]] = {}
    for name in parameters:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    for owner, names in by_module.items():
        transposed = getattr(model.get_submodule(owner), "is_transposed", False)
        for place, name in enumerate(names, start=1):
            # peft wraps one parameter after the other: the first lies innermost
            prefix = ".".join(["base_model.model", owner, *["base_layer"] * (len(names) - place)])
            targets.append(_parameter_target(name, parameters[name], rank_of(name), prefix, transposed))
    for name in copies:
        module = model.get_submodule(name)
        shapes = {f"base_model.model.{name}.{key}": tuple(p.shape) for key, p in module.named_parameters()}
        targets.append(Target(name, 0, shapes))
    return targets


def _check_settings(lora: LoraConfig) -> None:
    for found in contradictions(lora):
        raise ConfigError(found.what, found.why, found.fix)
    special = [name for name in lora.target_modules if name == ALL_LINEAR or _REGEX.search(name)]
    if special and len(lora.target_modules) > 1:
        raise ConfigError(
            f"lora.target_modules holds {special[0]!r} beside other names",
            "all-linear and a regular expression stand alone",
            "give the names one by one, or join them in one regular expression",
        )


def peft_modules(model: PreTrainedModel, lora: LoraConfig) -> str | list[str]:
    """lora.target_modules as peft takes them, all-linear resolved. Raises ConfigError as `find_targets`."""
    if not any(_REGEX.search(name) for name in lora.target_modules) and ALL_LINEAR not in lora.target_modules:
        return list(lora.target_modules)
    if ALL_LINEAR not in lora.target_modules:
        return lora.target_modules[0]
    # peft's own "all-linear" takes in routers and experts of some mixtures
    linear = list(_find_modules(model, lora, _find_copies(model, lora)))
    endings = sorted({name.rpartition(".")[2] for name in linear})
    taken = [name for name, _ in model.named_modules() if _ends_with(name, endings)]
    return endings if taken == linear else linear


def _find_modules(model: PreTrainedModel, lora: LoraConfig, copies: Sequence[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    inside = tuple(f"{name}." for name in copies)
    if ALL_LINEAR in lora.target_modules:
        return {
            name: module for name, module in modules.items()
            if _is_linear(module) and module is not head and name not in copies and not name.startswith(inside)
        }  # fmt: skip
    found: dict[str, nn.Module] = {}
    for wanted in lora.target_modules:
        matches = _matching_modules(wanted, modules)
        if not matches:
            experts = [name for name, p in model.named_parameters() if p.ndim == 3]
            raise _nowhere("lora.target_modules", wanted, list(modules), experts)
        for name in matches:
            if name in copies or name.startswith(inside):
                raise ConfigError(
                    f"{name} is named by lora.target_modules and by lora.modules_to_save",
                    "a module that is trained whole has no adapter",
                    "take it out of one of them",
                )
            if modules[name] is head or not _is_linear(modules[name]):
                kind = "the output head" if modules[name] is head else f"a {type(modules[name]).__name__}"
                raise ConfigError(
                    f"lora.target_modules: {wanted!r} names {name}, {kind}",
                    "adapters go to the linear layers of the blocks",
                    "use narrower names; lora.modules_to_save trains embeddings, head and norms whole",
                )
        # in the model's order, whichever the order of the names
        found |= {name: modules[name] for name in matches}
    return {name: module for name, module in modules.items() if name in found}


def _matching_modules(wanted: str, names: Iterable[str]) -> list[str]:
    if not _REGEX.search(wanted):
        return [name for name in names if _ends_with(name, [wanted])]
    pattern = _compiled("lora.target_modules", wanted)
    return [name for name in names if pattern.fullmatch(name)]


def _compiled(setting: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{setting}: {pattern!r} is no regular expression", f"{error}", "correct it"
        ) from None


def _find_parameters(model: PreTrainedModel, lora: LoraConfig) -> dict[str, nn.Parameter]:
    parameters = dict(model.named_parameters())
    found: set[str] = set()
    for wanted in lora.target_parameters:
        matches = [name for name in parameters if _ends_with(name, [wanted])]
        if not matches:
            raise _nowhere("lora.target_parameters", wanted, list(parameters))
        for name in matches:
            module = model.get_submodule(name.rpartition(".")[0])
            if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) or parameters[name].ndim not in (2, 3):
                raise ConfigError(
                    f"lora.target_parameters: {wanted!r} names {name} of shape {list(parameters[name].shape)}",
                    "it is for matrices that are no module of their own, such as the experts of a mixture",
                    "name linear layers in lora.target_modules",
                )
        found.update(matches)
    return {name: parameter for name, parameter in parameters.items() if name in found}


def _find_copies(model: PreTrainedModel, lora: LoraConfig) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    ties = {model.get_input_embeddings(), model.get_output_embeddings()}
    for wanted in lora.modules_to_save:
        matches = [name for name in names if _ends_with(name, [wanted])]
        loose = [name for name in names if name.endswith(wanted) and name not in matches]  # as peft matches
        if not matches or loose:
            raise _nowhere("lora.modules_to_save", wanted, loose or names)
        if model.config.tie_word_embeddings and any(model.get_submodule(name) in ties for name in matches):
            raise ConfigError(
                f"lora.modules_to_save: {wanted} is tied to another module",
                "the model's embedding and head share one matrix, and a copy of one would part them",
                "leave it out, or train the whole model (lora.enabled=false)",
            )
        found.update(matches)
    return [name for name in names if name in found]


def _module_target(name: str, module: nn.Module, rank: int, lora: LoraConfig) -> Target:
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
    else:
        assert isinstance(module, nn.Linear)
        in_features, out_features = module.in_features, module.out_features
    shapes: dict[str, tuple[int, ...]] = {
        "lora_A.weight": (rank, in_features),
        "lora_B.weight": (out_features, rank),
    }
    if lora.use_dora:
        shapes["lora_magnitude_vector"] = (out_features,)
    return Target(name, rank, {f"base_model.model.{name}.{key}": shape for key, shape in shapes.items()})


def _parameter_target(name: str, parameter: nn.Parameter, rank: int, prefix: str, transposed: bool) -> Target:
    experts = parameter.shape[0] if parameter.ndim == 3 else 1
    out_features, in_features = parameter.shape[-2:]
    if parameter.ndim == 3 and transposed:
        out_features, in_features = in_features, out_features
    shapes = {"lora_A": (rank * experts, in_features), "lora_B": (out_features, rank * experts)}
    return Target(name, rank, {f"{prefix}.{key}.weight": shape for key, shape in shapes.items()})


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _fits(pattern: str, name: str) -> bool:
    """Whether peft takes `pattern` of rank_pattern or alpha_pattern for `name`."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _ends_with(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _nowhere(setting: str, wanted: str, names: Sequence[str], more: Sequence[str] = ()) -> ConfigError:
    """The error for a name that matches none of `names`, with the endings of as many parts that look like it."""
    parts = wanted.count(".") + 1
    endings = dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names if name)
    near = difflib.get_close_matches(wanted, endings, n=4, cutoff=0.5)
    fix = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(list(endings)[-8:])}"
    if more:
        kinds = ", ".join(dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in more))
        fix += f" The experts' weights are parameters: name them in lora.target_parameters ({kinds})"
    return ConfigError(
        f"{setting}: {wanted!r} lands nowhere", "every name must match something in the model", fix
    )
