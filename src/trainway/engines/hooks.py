"""A model without its hooks, for a while: those by which engines gather and free weights around every module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Set aside what `model` and the modules in it have been told to do before and after their forward passes.

    What is not an engine's does nothing to rows without boundaries, which is all that runs meanwhile.
    """
    kept = [(module, module._forward_pre_hooks, module._forward_hooks) for module in model.modules()]
    for module, _, _ in kept:
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, before, after in kept:
            module._forward_pre_hooks, module._forward_hooks = before, after
