"""Devices as users write them, a torch.device or a text such as "cuda:1", and the current one."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fastlora.arguments import describe


def device_problem(device: Any, types: tuple[str, ...] | None = None) -> str | None:
    """Why a value is not a device of this machine; None if it is one.

    Args:
        device: the value.
        types: the accepted device types; None accepts all that torch knows.
    """
    given = f"device={describe(device)}"
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        return f"{given}: expected 'cpu', 'cuda', 'cuda:n' or a torch.device"
    if types is not None and wanted.type not in types:
        return f"{given}: expected one of {', '.join(types)}"
    if wanted.type == "cuda" and (wanted.index or 0) >= (n := torch.cuda.device_count()):
        there = f"{n} CUDA devices" if n else "no CUDA device"
        return f"{given}: torch finds {there} on this machine"
    return None


def device_of(values: Iterable[Any]) -> torch.device:
    """The device of the first tensor among these values."""
    return next(x.device for x in values if isinstance(x, torch.Tensor))


def as_current(device: torch.device) -> AbstractContextManager[object]:
    """A context in which a CUDA device is the current one. Other devices change nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
