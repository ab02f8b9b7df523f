"""Group: several ranks that train one adapter. Each runs a part of a step; one sum joins them.

The gradient of a step is one flat bucket in float32, with the loss and the counts of tokens as its
last elements: one all_reduce a step, after the backward pass. Every rank then clips and updates
alike, so nothing is sent back, and no module is wrapped. With `deterministic`, parts are added in
the order of ranks, whichever algorithm NCCL would choose.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastlora.distributed.agreement import check_agreement, gather_json, shared_gpus
from fastlora.distributed.context_parallel import context_group
from fastlora.distributed.process_group import (
    MEET_SECONDS,
    Groups,
    close_groups,
    needs_group,
    open_groups,
    start_all_gather,
    this_process,
)
from fastlora.distributed.ranks import ALONE, Ranks
from fastlora.errors import raise_problems
from fastlora.ops.attention.context_group import ContextGroup

# NCCL's own default. The first step of a large model compiles for one or two minutes.
STEP_SECONDS = 600.0

# A whole number is sent as two floats, number // 4096 and number % 4096. Both sums stay below
# 2**24, so they are exact for up to 4,096 ranks with 2**24 tokens each.
_WORD = 4096

# The fingerprint of a rank's last update, in digits of 7 bits. Sums of their squares are exact for
# up to 1,024 ranks.
_DIGITS, _DIGIT = 3, 128


class Totals(NamedTuple):
    """Sums over the ranks of a step."""

    tokens: int
    """Trained tokens."""
    read_tokens: int
    """Tokens that the model read."""


class Group(Ranks):
    """The ranks of a run with a process group."""

    several = True

    def __init__(
        self,
        groups: Groups,
        device: torch.device,
        *,
        lockstep: bool = False,
        context: ContextGroup | None = None,
    ) -> None:
        """Learn who the other ranks are.

        Args:
            groups: of the run.
            device: of the model.
            lockstep: every rank must run the same number of passes, because the passes themselves
                send: a base that is sharded over ranks does.
            context: the ranks that have rows together with this one.

        Raises:
            ValueError: two ranks use one GPU.
        """
        self.groups, self.device, self.lockstep = groups, device, lockstep
        self.context = context
        self.rank, self.count = dist.get_rank(groups.host), dist.get_world_size(groups.host)
        every = gather_json(groups, this_process(device), "fastlora.train", MEET_SECONDS)
        groups.waits.who = [
            f"rank {i} (process {names['process']} on {names['host']})"
            for i, names in enumerate(every)
        ]
        cure = "Load the model with device='auto', which gives every rank its own GPU."
        raise_problems(ValueError, "ranks share a GPU:", shared_gpus(every), cure)
        hosts = [names["host"] for names in every]
        self.node_leader = hosts.index(hosts[self.rank])
        self.compiled = False  # whether this rank has run a step
        self._own_signal: Callable[[], int | None] = lambda: None
        self._fingerprint = 0
        self._pending: Any = None
        self._signal: int | None = None

    # ── a step ────────────────────────────────────────────────────────────────────────────
    def listen(self, own_signal: Callable[[], int | None]) -> None:
        """Where to ask for a signal that this process has received."""
        self._own_signal = own_signal

    def figures(self, tokens: int, items: int, read_tokens: int) -> Float[Tensor, "n"]:
        """This rank's counts of a step, on the device, for `mean`.

        Call it before the step's passes are queued: a copy waits for work queued before it.
        """
        digits = [self._fingerprint >> (7 * i) & (_DIGIT - 1) for i in range(_DIGITS)]
        own = self._own_signal()
        numbers = [*_words(items), *_words(tokens), *_words(read_tokens)]
        numbers += [0 if own is None else 1, own or 0]
        numbers += [n for digit in digits for n in (digit, digit * digit)]
        return torch.tensor(numbers, dtype=torch.float32, device=self.device)

    def mean(
        self,
        loss: Float[Tensor, ""],
        gradient: Sequence[Tensor],
        figures: Float[Tensor, "n"],
        ordered: bool,
    ) -> tuple[Float[Tensor, ""], list[Tensor], Float[Tensor, "n"]]:
        """(mean loss, mean gradient, sums of the figures) over the items of all ranks.

        Args:
            loss: the sum over this rank's items.
            gradient: of that sum.
            figures: of this step.
            ordered: add in the order of ranks.
        """
        parts = [*(g.reshape(-1) for g in gradient), loss[None], figures]
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parts) else torch.float32
        flat = self._sum(torch.cat([p.to(dtype) for p in parts]), ordered, "the sum of gradients")
        *summed, loss_sum, sums = flat.split([*(g.numel() for g in gradient), 1, len(figures)])
        items = sums[0] * _WORD + sums[1]
        pairs = zip(summed, gradient, strict=True)
        return loss_sum[0] / items, [(x / items).view_as(g) for x, g in pairs], sums

    def totals(self, sums: Float[Tensor, "n"]) -> Totals:
        """The counts of all ranks. Reads from the device.

        Raises:
            RuntimeError: the last update was not the same on all ranks; names those that differ
                from rank 0.
        """
        numbers = sums.double().tolist()
        tokens, read_tokens = (int(numbers[i] * _WORD + numbers[i + 1]) for i in (2, 4))
        signalled, number = numbers[6:8]
        self._signal = round(number / signalled) if signalled else None
        digits = numbers[8:]
        # By Cauchy and Schwarz these are equal only if the digit is the same on all ranks.
        pairs = zip(digits[::2], digits[1::2], strict=True)
        if any(self.count * squares != total * total for total, squares in pairs):
            self._raise_drift()
        return Totals(tokens, read_tokens)

    def note_update(self, figures: Mapping[str, float]) -> None:
        """Remember what an update did, to compare it with the other ranks' at the next step."""
        self._fingerprint = zlib.crc32(repr(sorted(figures.items())).encode()) % 2 ** (7 * _DIGITS)

    def _raise_drift(self) -> None:
        every = gather_json(self.groups, self._fingerprint, "a comparison", STEP_SECONDS)
        other = [self.groups.waits.who[i] for i, x in enumerate(every) if x != every[0]]
        raise RuntimeError(
            f"the last update of {', '.join(other)} was not that of rank 0, so the ranks' adapters"
            " differ: the ranks have different GPUs, an optimizer that is random or counts by"
            " process, or faulty memory. Continue from a checkpoint."
        )

    def signal(self, own: int | None) -> int | None:
        """The signal of a rank that had one when the step began; `own` may be too new."""
        return self._signal

    def wait(self) -> None:
        """Wait for the step's sum, so that a read from the device does not hang.

        Raises:
            TimeoutError, RuntimeError: as `Waits.work`.
        """
        if self._pending is not None:
            work, self._pending = self._pending, None
            self.groups.waits.work(work, "the sum of gradients", STEP_SECONDS)

    # ── sums ──────────────────────────────────────────────────────────────────────────────
    def sums(self, values: Sequence[Float[Tensor, ""]]) -> list[Float[Tensor, ""]]:
        """The sums over ranks, in float64, added in the order of ranks."""
        flat = torch.stack([x.double() for x in values])
        every = flat.new_empty(self.count * len(flat))
        self._finish(start_all_gather(every, flat, self.groups.device), "a sum")
        self.wait()
        return list(every.view(self.count, -1).sum(0).unbind())

    def _sum(self, flat: Float[Tensor, "n"], ordered: bool, what: str) -> Float[Tensor, "n"]:
        group = self.groups.device
        if not ordered:
            self._finish(dist.all_reduce(flat, group=group, async_op=True), what)
            return flat
        # The bytes of a ring's all_reduce.
        padded = F.pad(flat, (0, -len(flat) % self.count))
        parts = torch.empty_like(padded)
        self._finish(dist.all_to_all_single(parts, padded, group=group, async_op=True), what)
        total, *rest = parts.view(self.count, -1)
        total = total.clone()
        for part in rest:
            total += part
        every = torch.empty_like(padded)
        self._finish(start_all_gather(every, total, group), what)
        return every[: len(flat)]

    def _finish(self, work: Any, what: str) -> None:
        """Make the following work on the device wait; on the CPU wait here."""
        if self.device.type == "cuda":
            work.wait()  # the stream waits, not this process
            self._pending = work
        else:
            self.groups.waits.work(work, what, STEP_SECONDS)

    # ── agreement ─────────────────────────────────────────────────────────────────────────
    def agree(self, facts: Mapping[str, Any], what: str = "this run") -> None:
        """Raise a ValueError on all ranks if a fact differs; it names the rank and the fact."""
        check_agreement(self.groups, facts, what, MEET_SECONDS)

    def meet(self, what: str) -> None:
        """Wait until all ranks are here."""
        gather_json(self.groups, None, what, MEET_SECONDS)

    @property
    def leads_node(self) -> bool:
        """Whether this is the first rank of its machine."""
        return self.rank == self.node_leader

    @contextmanager
    def first_on_node(self, what: str) -> Iterator[None]:
        """Run the block on the first rank of each machine, then on its other ranks."""
        name = f"{what} on node {self.node_leader}"
        done = self.groups.waits.first(name, self.leads_node, MEET_SECONDS)
        try:
            yield
        finally:
            done()

    def first_text(self, text: str) -> str:
        """The text of the first rank that has one, with its rank."""
        every = gather_json(self.groups, text, "the search for a cause", STEP_SECONDS)
        rank, found = next(((i, x) for i, x in enumerate(every) if x), (0, text))
        return f"on rank {rank} {found}" if found else text


def _words(number: int) -> tuple[int, int]:
    return number // _WORD, number % _WORD


@contextmanager
def joined(
    device: torch.device, *, lockstep: bool = False, context_parallel: int = 1
) -> Iterator[Ranks]:
    """The ranks of a run; a process that is alone is `ALONE`.

    If the block raises, the other ranks stop too, at their next wait.

    Args:
        device: of the model.
        lockstep: see `Group`.
        context_parallel: ranks that have rows together.
    """
    if not needs_group():
        yield ALONE
        return
    groups, ended = open_groups(device), False
    try:
        # Ranks that do not agree would wait for each other in groups of other sizes.
        facts = {"context_parallel": context_parallel}
        check_agreement(groups, facts, "this run", MEET_SECONDS)
        context = context_group(context_parallel, device) if context_parallel > 1 else None
        yield Group(groups, device, lockstep=lockstep, context=context)
        ended = True
    except BaseException as error:
        groups.waits.failed(error)
        raise
    finally:
        close_groups(groups, failed=not ended)
