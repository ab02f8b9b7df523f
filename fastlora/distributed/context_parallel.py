"""context_group(): the ranks that have rows of tokens together, for rows that do not fit one card.

Consecutive ranks, which torchrun starts on one machine, form a group. With N of them on R ranks,
there are R / N groups, which are the ranks of data parallel training.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from fastlora.arguments import Rule, check_arguments, whole_number
from fastlora.distributed.launch import launched, own_device
from fastlora.distributed.mesh import group_mesh, group_problem
from fastlora.distributed.process_group import start_group
from fastlora.errors import raise_problems
from fastlora.ops.attention.context_group import ContextGroup
from fastlora.ops.dispatch import refuse_transforms
from fastlora.runtime.devices import device_problem

# The groups of each default process group, by their size and device. torch numbers groups, so that
# a second one of the same ranks has another name, and compiled layers contain the name.
_MADE: WeakKeyDictionary[Any, dict[tuple[int, str], ContextGroup]] = WeakKeyDictionary()


def context_group(ranks: int, device: torch.device | str) -> ContextGroup:
    """The group of this process, for `functional.loss_sum(..., context=...)`.

    Every process must call it, with the same number. Starts the default process group if torchrun
    or another launcher has started this process and there is none. Its ranks must make the same
    passes in the same order, over the same batches of whole rows; then each has its share of the
    loss and of the adapter's gradient, and the sum over the ranks is that of the batch.

    Args:
        ranks: how many ranks have each row together; a divisor of the number of all ranks.
        device: of the model. "cuda" is cuda:LOCAL_RANK, as in `load`.

    Raises:
        ValueError: the ranks do not divide into such groups, there is neither a process group nor a
            launcher, or an argument is wrong.
    """
    refuse_transforms("fastlora.context_group")
    check_arguments(
        "fastlora.context_group",
        ranks=(ranks, whole_number(1)),
        device=(device, Rule(lambda x: device_problem(x) is None, "a device of torch")),
    )
    problem = group_problem(f"context_parallel={ranks}", ranks)
    if not problem and not dist.is_initialized() and launched() is None:
        problem = f"{ranks=}: no launcher has started this process; leave context out"
    raise_problems(ValueError, "fastlora.context_group:", [problem] if problem else [])
    device = own_device(torch.device(device))
    start_group(device)
    made = _MADE.setdefault(dist.group.WORLD, {})
    if (ranks, device.type) not in made:
        made[ranks, device.type] = _made(ranks, device)
    return made[ranks, device.type]


def _made(ranks: int, device: torch.device) -> ContextGroup:
    mesh = group_mesh(ranks, device, ("data", "context"))["context"]
    return ContextGroup(mesh.get_group().group_name, mesh.get_local_rank(), ranks)
