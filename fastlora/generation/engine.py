"""Engine: generates for rows that join and leave, with one synchronisation every 16 tokens.

engine = Engine(model, slots=8, max_length=2048)
slots = engine.admit([(prompt, settings), ...])
while engine.running:
    for new in engine.advance():
        ...                      # new.slot, new.ids, new.finish_reason
engine.close()
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fastlora.errors import raise_problems
from fastlora.generation.angles import rope_table
from fastlora.generation.cache import Cache
from fastlora.generation.host_rows import HostRow, RowSettings, read_outgrown
from fastlora.generation.kernel_layer import StepKernels, reads_own_tokens, step_kernels
from fastlora.generation.nonfinite import NonFiniteLogits, explanation
from fastlora.generation.prefixes import Prefix, Prefixes
from fastlora.generation.prepare import PreparedModel, prepare
from fastlora.generation.rows import (
    MOST_ALTERNATIVES,
    REPORTED_STEPS,
    NewRow,
    begin,
    new_rows,
    step,
)
from fastlora.generation.sampling import Variant, row_seeds, seen_ids, variant_of
from fastlora.generation.step_graph import StepGraphs
from fastlora.models.rope_tables import longrope_length
from fastlora.models.state import ModelState
from fastlora.ops.decode.product import MAX_BATCH
from fastlora.ops.decode.token_rows import LARGEST_LOGIT, LOGPROB, NO_TOKEN, TOKEN
from fastlora.runtime.layer_fetching import is_sharded


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTokens:
    """The tokens that one row got in one call of `advance`."""

    slot: int
    ids: list[int]
    logprobs: list[float] | None  # of each id under the model's own logits, if asked for
    finish_reason: Literal["stop", "length"] | None  # None: the row goes on
    # For each new token the ids and log-probabilities of the likeliest ones, if asked for.
    alternatives: list[list[tuple[int, float]]] | None = None


class Engine:
    """A model with a cache of `slots` rows. A row occupies a slot until it ends or is released."""

    def __init__(
        self,
        model: ModelState,
        *,
        slots: int,
        max_length: int,
        add: dict[str, Float[Tensor, "..."]] | None = None,
    ) -> None:
        """Prepare the model and allocate a short cache, which grows with the rows.

        Args:
            model: with an adapter, without one, or with a stack of adapters.
            slots: rows at most at a time.
            max_length: tokens of a row at most, prompt and new ones together.
            add: name of a place (models/capture.py) -> a vector [d] to add there at every position.
        """
        with torch.no_grad():
            self.state, self.model = model, prepare(model)._replace(added=add or {})
            self.slots, self.max_length = slots, max_length
            self.device = self.model.base["norm"].device
            self.vocab_size = self.model.spec.config.vocab_size
            like = self.model.base["norm"]
            self.kernels: dict[int, StepKernels] = {}  # by the largest number of rows
            short = slots > MAX_BATCH or not reads_own_tokens(self._kernels(1), like.dtype)
            self.cache = Cache(self.model.spec.config, like, slots, max_length, short=short)
            self.table = rope_table(self.model, self.cache.length)
            self.rows = new_rows(slots, 4, self.device)
        self.graphs = StepGraphs(self.device, record=_can_record(self.model))
        # The CPU reads values at no cost, so shapes can follow the rows.
        self.fixed_shapes = self.graphs.record or self.device.type != "cpu"
        self.running: dict[int, HostRow] = {}
        self.prefixes = Prefixes(self.model, self.cache)
        self.pending: list[NewTokens] = []  # read from the device, but not returned yet
        self.failed: list[NonFiniteLogits] = []  # not raised yet; their rows still hold slots

    @property
    def free_slots(self) -> int:
        """How many rows can be admitted."""
        return self.slots - len(self.running)

    # ── rows join ─────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def admit(self, prompts: list[tuple[list[int], RowSettings]]) -> list[int]:
        """Read prompts, and give each a slot. Rows with the same prompt and adapter read it once.

        Args:
            prompts: ids and settings of each row; at most `free_slots`.

        Raises:
            ValueError: too many rows, or a row is empty, too long, or names no adapter.
        """
        self._check(prompts)
        keys = [Prefix(tuple(ids[:-1]), settings.adapter_id) for ids, settings in prompts]
        slots = self.prefixes.choose_slots(keys, self.running)
        self._make_room(max(len(ids) for ids, _ in prompts), prompts)
        self.prefixes.fill(keys, slots, self._kernels(1))
        new = []
        for slot, (ids, settings) in zip(slots, prompts, strict=True):
            seed = row_seeds(None, 1)[0] if settings.seed is None else settings.seed
            stop, limit, adapter_id = settings.stop, settings.max_new_tokens, settings.adapter_id
            new.append(NewRow(slot, ids, limit, adapter_id, stop, settings.sampling, seed))
            self.running[slot] = HostRow(ids, settings)
            if self.rows.seen is not None:
                self.rows.seen[slot] = seen_ids(ids, self.vocab_size, self.device)
        begin(self.rows, new, self.vocab_size)
        return slots

    def _check(self, prompts: Sequence[tuple[list[int], RowSettings]]) -> None:
        problems = []
        if len(prompts) > self.free_slots:
            problems.append(f"{len(prompts)} prompts, but only {self.free_slots} slots are free")
        if not prompts:
            problems.append("prompts is empty: expected at least one row")
        adapters = self.model.stack_size or 1
        for i, (ids, settings) in enumerate(prompts):
            longest = len(ids) + settings.max_new_tokens
            if not ids or settings.max_new_tokens < 1:
                problems.append(f"row {i}: expected a prompt token and a new token at least")
            elif longest > self.max_length:
                problems.append(
                    f"row {i}: {len(ids)} prompt tokens and {settings.max_new_tokens} new ones make"
                    f" {longest}; max_length is {self.max_length}"
                )
            if not 0 <= settings.adapter_id < adapters:
                problems.append(
                    f"row {i}: adapter_id={settings.adapter_id}: expected one in [0, {adapters})"
                )
            if not 0 <= settings.alternatives <= MOST_ALTERNATIVES:
                problems.append(
                    f"row {i}: alternatives={settings.alternatives}: expected a number in"
                    f" [0, {MOST_ALTERNATIVES}]"
                )
        raise_problems(ValueError, "Engine.admit cannot do this:", problems)

    def _make_room(
        self, length: int, prompts: Sequence[tuple[list[int], RowSettings]] = ()
    ) -> None:
        """Grow what is too small. Graphs of the old tensors are forgotten."""
        replaced = self.cache.grow(length)
        if replaced:
            self.table = rope_table(self.model, self.cache.length)
        width = max((len(settings.stop) for _, settings in prompts), default=0)
        if width > self.rows.stop.shape[1]:
            wider = torch.full((self.slots, 2 * width), NO_TOKEN, device=self.device)
            wider[:, : self.rows.stop.shape[1]] = self.rows.stop
            self.rows, replaced = self.rows._replace(stop=wider), True
        penalised = any(settings.sampling.repetition_penalty != 1.0 for _, settings in prompts)
        if penalised and self.rows.seen is None:
            shape = (self.slots, self.vocab_size)
            seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            # Rows that run already have no penalty, and so need no entries.
            self.rows, replaced = self.rows._replace(seen=seen), True
        if self.rows.likeliest is None and any(settings.alternatives for _, settings in prompts):
            k = min(MOST_ALTERNATIVES, self.vocab_size)
            likeliest = self.rows.report.new_zeros(REPORTED_STEPS, 2, k, self.slots)
            self.rows, replaced = self.rows._replace(likeliest=likeliest), True
        if replaced:
            self.graphs.clear()

    # ── rows go on ────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def advance(self, steps: int = REPORTED_STEPS) -> list[NewTokens]:
        """Up to `steps` tokens for every running row, at most 16. The host waits once.

        Raises:
            NonFiniteLogits: a row has NaN or infinite logits. It is released. If several rows have,
                each call raises for one. The next call returns the tokens of the other rows. After
                any other error, which may have ended a step in its middle, close the engine.
        """
        if self.running and not (self.failed or self.pending):
            rows = self.running.values()
            steps = min(steps, REPORTED_STEPS, max(row.left for row in rows))
            steps = min(steps, self._until_longrope_changes())
            # A row that ends earlier needs less room than `steps`. One index more than the tokens
            # need: a row that has ended still goes through the model, and writes behind its last.
            self._make_room(1 + max(row.cached + min(steps, row.left) for row in rows))
            self.rows.cursor.zero_()
            done = self._run(steps)
            self.pending = self._read(self.rows.report[:done].cpu())
        if self.failed:
            error = self.failed[0]
            self.release(error.slot)
            raise error
        pending, self.pending = self.pending, []
        return pending

    def _until_longrope_changes(self) -> int:
        trained = longrope_length(self.model.spec.config)
        if trained is None:
            return REPORTED_STEPS
        return read_outgrown(self.running, trained, self.prefixes, self._kernels(1))

    def _run(self, steps: int) -> int:
        """Run steps, and return their number: fewer on the CPU if all rows end before."""
        variant, b = self._variant(), max(self.running) + 1
        if self.fixed_shapes:  # few sizes, each a graph
            b = min(1 << (b - 1).bit_length(), self.slots)
        kernels = self._kernels(b)
        run = lambda end: step(
            self.model, self.cache, self.rows, b, end, variant, self.table, kernels
        )
        if self.fixed_shapes:
            end = self.cache.length
            self.graphs.run((b, end, variant), lambda: run(end), steps)
            return steps
        for i in range(steps):
            run(1 + max(row.cached + min(i, row.left - 1) for row in self.running.values()))
            if not self.rows.running.any():
                return i + 1
        return steps

    def _variant(self) -> Variant:
        settings = [row.settings for row in self.running.values()]
        logprobs, more = any(x.logprobs for x in settings), any(x.alternatives for x in settings)
        return variant_of([x.sampling for x in settings], logprobs, self.vocab_size, more)

    def _kernels(self, b: int) -> StepKernels:
        # Prepared once for all steps of up to 64 rows, and once for larger ones, because adapters
        # are copied.
        largest = min(self.slots, MAX_BATCH) if b <= MAX_BATCH else self.slots
        if largest not in self.kernels:
            self.kernels[largest] = step_kernels(self.model, largest)
        return self.kernels[largest]

    def _read(self, report: Tensor) -> list[NewTokens]:
        """The new tokens of all running rows. Rows that have ended leave their slots."""
        tokens = report[:, TOKEN].long().T.tolist()
        largest, logprobs = report[:, LARGEST_LOGIT].T, report[:, LOGPROB].T.tolist()
        likeliest = None
        if self._variant().alternatives and self.rows.likeliest is not None:
            likeliest = self.rows.likeliest.cpu()
        new = []
        for slot, row in [*self.running.items()]:
            ids = [i for i in tokens[slot] if i != NO_TOKEN]
            wrong = ~largest[slot, : len(ids)].isfinite()
            if bool(wrong.any()):
                at = int(wrong.nonzero()[0, 0])
                self._fail(slot, row.made + at, float(largest[slot, at]))
                continue
            row.new += ids
            stopped = bool(ids) and ids[-1] in row.settings.stop
            reason = "stop" if stopped else None if row.left else "length"
            asked = logprobs[slot][: len(ids)] if row.settings.logprobs else None
            more = None
            if likeliest is not None and row.settings.alternatives:
                more = _pairs(likeliest[: len(ids), :, : row.settings.alternatives, slot])
            new.append(
                NewTokens(
                    slot=slot, ids=ids, logprobs=asked, finish_reason=reason, alternatives=more
                )
            )
            if reason is not None:
                del self.running[slot]
        return new

    def _fail(self, slot: int, made: int, largest: float) -> None:
        """Note the error of a row, and remove the NaN that its slot may hold."""
        self.failed.append(NonFiniteLogits(explanation(self.state, slot, made, largest), slot))
        self.prefixes.forget(slot)
        self.cache.clear(slot)
        # Until another row gets the slot, steps write to this index only, which every row
        # overwrites before it reads it.
        self.rows.lengths[slot] = 0

    # ── rows leave ────────────────────────────────────────────────────────────────────────

    def release(self, slot: int) -> None:
        """Free the slot of a row that its client has given up.

        Raises:
            ValueError: no row is running there.
        """
        if slot not in self.running:
            raise ValueError(f"slot={slot}: no row is running there; running: {[*self.running]}")
        del self.running[slot]
        self.rows.running[slot] = False
        self.pending = [new for new in self.pending if new.slot != slot]
        self.failed = [error for error in self.failed if error.slot != slot]

    def close(self) -> None:
        """Free the memory of cache, rows and graphs. The engine is of no use afterwards.

        Closing it again does nothing.
        """
        if self.slots == 0:
            return
        self.graphs.clear()
        self.running.clear()
        self.kernels.clear()
        self.pending, self.failed = [], []
        self.slots = 0
        del self.model, self.state, self.cache, self.prefixes, self.rows, self.table


def _pairs(likeliest: Float64[Tensor, "steps 2 k"]) -> list[list[tuple[int, float]]]:
    """For each step, pairs of id and log-probability."""
    return [
        [(int(i), logprob) for i, logprob in zip(*step, strict=True)] for step in likeliest.tolist()
    ]


def _can_record(model: PreparedModel) -> bool:
    """Whether a step can be a CUDA graph.

    The heads of a stack with trained token rows are made in every step, with a copy from the host.
    """
    from_host = model.head is None and bool(model.spec.extras.tokens)
    return model.base["norm"].is_cuda and not from_host and not is_sharded(model.base)
