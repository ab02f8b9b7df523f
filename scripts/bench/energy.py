"""Energy that a GPU takes for a training step, from NVML's counter."""

import ctypes
import statistics
import threading
import time
from collections.abc import Callable

import torch

PERIOD_S = 0.05  # between two readings of power and clock
SM_CLOCK = 1  # NVML_CLOCK_SM


class Nvml:
    """The counters of the GPU that torch uses as device 0.

    Raises:
        OSError: this machine has no NVML.
        RuntimeError: NVML refuses a reading.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._check("nvmlInit_v2")
        self._device = ctypes.c_void_p()
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode()
        self._check("nvmlDeviceGetHandleByUUID", uuid, ctypes.byref(self._device))

    def joules(self) -> float:
        """Energy since the driver was loaded."""
        value = ctypes.c_ulonglong()
        self._check("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(value))
        return value.value / 1e3

    def watts(self) -> float:
        value = ctypes.c_uint()
        self._check("nvmlDeviceGetPowerUsage", self._device, ctypes.byref(value))
        return value.value / 1e3

    def sm_mhz(self) -> int:
        """The present clock of the multiprocessors."""
        value = ctypes.c_uint()
        self._check("nvmlDeviceGetClockInfo", self._device, SM_CLOCK, ctypes.byref(value))
        return value.value

    def _check(self, function: str, *given: object) -> None:
        code = getattr(self._library, function)(*given)
        if code:
            raise RuntimeError(f"{function} returned {code}")


def energy(step: Callable[[int], object], step_ms: float, tokens: float, seconds: float) -> dict:
    """Figures of steps back to back for about `seconds`, or {"energy": why they cannot be read}.

    Args:
        step: takes the number of the step; launches it.
        step_ms: expected time of a step.
        tokens: of an average step.
        seconds: of measuring. The counter moves in steps of about 0.1 s.
    """
    try:
        nvml = Nvml()
        for read in (nvml.joules, nvml.watts, nvml.sm_mhz):
            read()
    except (OSError, RuntimeError) as error:
        return {"energy": f"not read: {error}"}
    count = max(1, round(1e3 * seconds / step_ms))
    watts, clocks, done = [], [], threading.Event()

    def watch() -> None:
        while not done.wait(PERIOD_S):
            watts.append(nvml.watts())
            clocks.append(nvml.sm_mhz())

    torch.cuda.synchronize()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        began, joules = time.perf_counter(), nvml.joules()
        for i in range(count):
            step(i)
        torch.cuda.synchronize()
        took, joules = time.perf_counter() - began, nvml.joules() - joules
    finally:
        done.set()
        watcher.join()
    figures = {
        "joules_1000_tokens": round(1e3 * joules / (count * tokens), 3),
        "watts": round(joules / took),
        "energy_ms": round(1e3 * took / count, 1),
        "energy_steps": count,
    }
    if watts:
        figures |= {
            "sampled_watts": round(statistics.mean(watts)),
            "sm_mhz": round(statistics.median(clocks)),
        }
    return figures
