"""Agreement: values gathered from all ranks, and facts that must be the same on each."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fastlora.distributed.process_group import Groups, start_all_gather
from fastlora.errors import raise_problems

_MOST_SHOWN = 80  # characters of a value in a message


def gather_json(groups: Groups, value: Any, what: str, seconds: float) -> list[Any]:
    """The values of all ranks, each a JSON value, in the order of ranks.

    Raises:
        TimeoutError, RuntimeError: as `Waits.work`.
    """
    count = dist.get_world_size(groups.host)
    data = json.dumps(value).encode()
    sizes = torch.empty(count, dtype=torch.int64, device="cpu")
    work = start_all_gather(sizes, torch.tensor([len(data)], device="cpu"), groups.host)
    groups.waits.work(work, what, seconds)
    longest = int(sizes.max())
    own = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
    every = torch.empty(count * longest, dtype=torch.uint8, device="cpu")
    groups.waits.work(start_all_gather(every, own, groups.host), what, seconds)
    return [json.loads(bytes(part.numpy())) for part in every.split(longest)]


def differences(every: Sequence[Mapping[str, str]]) -> list[str]:
    """One line for each fact of a rank that is not that of rank 0."""
    problems = []
    for rank, facts in enumerate(every):
        for name in dict.fromkeys([*every[0], *facts]):
            own, first = facts.get(name, "absent"), every[0].get(name, "absent")
            if own != first:
                problems.append(f"rank {rank} has another {name}: {own}; rank 0 has {first}")
    return problems


def shown(value: Any) -> str:
    """A fact as a short text: the value itself, or the beginning and a hash."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) <= _MOST_SHOWN:
        return text
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]
    return f"{text[: _MOST_SHOWN - 20]}... ({digest})"


def check_agreement(groups: Groups, facts: Mapping[str, Any], what: str, seconds: float) -> None:
    """Raise a ValueError on all ranks if a fact differs; it names the rank and the fact.

    Args:
        groups: of the run.
        facts: name -> value, compared by its text.
        what: the facts are of, for messages.
        seconds: to wait for the other ranks.
    """
    own = {name: shown(value) for name, value in facts.items()}
    every = gather_json(groups, own, f"the comparison of {what}", seconds)
    cure = "Start every rank with the same program, arguments, files and packages."
    raise_problems(ValueError, f"the ranks of {what} do not agree:", differences(every), cure, 20)


def shared_gpus(every: Sequence[Mapping[str, str]]) -> list[str]:
    """One line for each GPU that more than one rank uses."""
    users: dict[tuple[str, str], list[int]] = {}
    for rank, names in enumerate(every):
        if names["gpu"]:
            users.setdefault((names["host"], names["gpu"]), []).append(rank)
    return [
        f"ranks {', '.join(map(str, ranks))} use one GPU ({gpu} of {host})"
        for (host, gpu), ranks in users.items()
        if len(ranks) > 1
    ]
