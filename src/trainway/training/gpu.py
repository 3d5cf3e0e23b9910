"""For what share of the time a GPU works, as its driver's library (NVML) says; asked beside the training."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from statistics import fmean

import torch

EVERY_S = 1.0
LIBRARY = "libnvidia-ml.so.1"


class _Rates(ctypes.Structure):
    """nvmlUtilization_t: percent of the last sample period in which a kernel ran, or memory was read or written."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class GpuWatch:
    """Asks again and again in a thread, so that no step waits for the driver."""

    def __init__(self, ask: Callable[[], float | None], every_s: float = EVERY_S) -> None:
        self._ask, self._every_s = ask, every_s
        self._lock = threading.Lock()
        self._found: list[float] = []
        self._last: float | None = None
        self._thread = threading.Thread(target=self._run, name="gpu utilisation", daemon=True)
        self._thread.start()

    def share(self) -> float | None:
        """The mean since the last call; what it was then when nothing came since. None when it is not known."""
        with self._lock:
            if self._found:
                self._last = fmean(self._found)
                self._found.clear()
            return self._last

    def _run(self) -> None:
        rest = threading.Event()
        while (share := self._ask()) is not None:
            with self._lock:
                self._found.append(share)
            rest.wait(self._every_s)


def watch_gpu(device: torch.device) -> GpuWatch | None:
    """A watch of this device; None for a CPU, and where the driver does not say."""
    if device.type != "cuda":
        return None
    ask = None
    with suppress(OSError, AttributeError):
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        ask = utilization_of(uuid, ctypes.CDLL(LIBRARY))
    return GpuWatch(ask) if ask is not None else None


def utilization_of(uuid: str, library: ctypes.CDLL) -> Callable[[], float | None] | None:
    """What asks NVML for a GPU's utilisation, from 0 to 1; None when it does not know the GPU.

    Source: NVML API reference, nvmlDeviceGetHandleByUUID and nvmlDeviceGetUtilizationRates; 0 is NVML_SUCCESS.
    """
    handle, rates = ctypes.c_void_p(), _Rates()
    if library.nvmlInit_v2() != 0:
        return None
    if library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) != 0:
        return None

    def ask() -> float | None:
        if library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rates)) != 0:
            return None
        return float(rates.gpu) / 100

    return ask
