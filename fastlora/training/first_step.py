"""Prepares the first step of a run while rows are read."""

from contextlib import AbstractContextManager
from functools import partial

from fastlora.models.head_logprobs import loss_launches
from fastlora.models.state import ModelState
from fastlora.runtime.first_step import preparing_first_step


def preparing_training(model: ModelState, compilers: bool = True) -> AbstractContextManager[None]:
    """`preparing_first_step` of a model.

    Args:
        model: to be trained.
        compilers: start compiler processes, if they may be needed.
    """
    norm = model.base["norm"]
    launches = partial(loss_launches, model.spec, norm)
    return preparing_first_step(model.spec.compile, norm.device, compilers, launches)
