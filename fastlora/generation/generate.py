"""Generate for one batch of prompts: all rows begin together, and the result is one tensor."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from fastlora.arguments import (
    FLAG,
    FUNCTION,
    Rule,
    argument_problems,
    int_list,
    optional,
    setting_problems,
    whole_number,
)
from fastlora.distributed.leading import on_first_rank
from fastlora.errors import raise_problems
from fastlora.generation.engine import Engine, NewTokens, RowSettings
from fastlora.generation.sampling import SEED, Sampling, row_seeds
from fastlora.models.capture_checks import constant_problems
from fastlora.models.input_checks import autocast_problems
from fastlora.models.stacks import stack_size
from fastlora.models.state import ModelState
from fastlora.ops.dispatch import refuse_transforms


def stop_ids_rule(vocab_size: int) -> Rule:
    """Rule: a token id, or a list of them."""

    def accepts(x: Any) -> bool:
        ids = [x] if type(x) is int else int_list(x) if hasattr(x, "__len__") else None
        is_id = lambda i: type(i) is int and 0 <= i < vocab_size
        return type(ids) is list and all(map(is_id, ids))

    return Rule(accepts, f"a token id in [0, {vocab_size}) or a list of them")


def seeds_rule(rows: int) -> Rule:
    """Rule: a seed, or a list of one seed for each row."""

    def accepts(x: Any) -> bool:
        if SEED.accepts(x):
            return True
        seeds = int_list(x) if hasattr(x, "__len__") else None
        return type(seeds) is list and len(seeds) == rows and all(map(SEED.accepts, seeds))

    return Rule(accepts, f"{SEED.expected}, or a list of {rows}, one for each row")


def adapter_ids_problems(model: ModelState, adapter_ids: Any, rows: int) -> list[str]:
    """Problems with the number of each row's adapter; a stack needs them."""
    adapters = stack_size(model.adapter)
    if adapters is None:
        given = adapter_ids is not None
        return ["adapter_ids is given, but model.adapter is not a stack"] if given else []
    ids = int_list(adapter_ids) if hasattr(adapter_ids, "__len__") else None
    is_id = lambda i: type(i) is int and 0 <= i < adapters
    if type(ids) is list and len(ids) == rows and all(map(is_id, ids)):
        return []
    expected = f"{rows} whole numbers in [0, {adapters}), one for each row"
    return argument_problems({"adapter_ids": (adapter_ids, Rule(lambda _: False, expected))})


def check_generation(
    model: ModelState,
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None,
    max_new_tokens: Any,
    sampling: Sampling,
    eos_token_id: Any,
    seed: Any,
    stream: Any,
    adapter_ids: Any = None,
    return_logprobs: Any = False,
    add: Any = None,
) -> None:
    """Check what `generate` takes beyond tensors, which `check_inputs` has checked before.

    Raises:
        ValueError: a setting of a wrong type or value, a text that becomes too long, or a row that
            ends in padding. Lists all problems.
    """
    b, t = input_ids.shape
    rules = {
        "max_new_tokens": (max_new_tokens, whole_number(1)),
        "eos_token_id": (eos_token_id, optional(stop_ids_rule(model.spec.config.vocab_size))),
        "seed": (seed, optional(seeds_rule(b))),
        "stream": (stream, optional(FUNCTION)),
        "return_logprobs": (return_logprobs, FLAG),
    }
    problems = setting_problems(sampling) + argument_problems(rules)
    problems += adapter_ids_problems(model, adapter_ids, b) + constant_problems(model, add)
    problems += autocast_problems(model.base)
    longest = model.spec.max_seq_length
    if isinstance(max_new_tokens, int) and max_new_tokens > 0 and t + max_new_tokens > longest:
        problems.append(
            f"max_new_tokens={max_new_tokens}: {t} prompt tokens and {max_new_tokens} new ones "
            f"make {t + max_new_tokens}; max_seq_length is {longest}. Shorten the prompt, or load "
            "with a larger max_seq_length"
        )
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        problems.append(
            "attention_mask: a row ends in padding; expected padding on the left, so that all "
            "prompts end in the last column"
        )
    raise_problems(ValueError, "Model.generate cannot do this:", problems)


def stop_ids(eos_token_id: int | Sequence[int] | None, default: Sequence[int]) -> tuple[int, ...]:
    """The argument `eos_token_id` as a tuple; None is the default."""
    if eos_token_id is None:
        return tuple(default)
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(int_list(eos_token_id))


def seed_of_each_row(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """The argument `seed` as one seed for each row."""
    if seed is None or SEED.accepts(seed):
        return row_seeds(seed, rows)  # pyright: ignore[reportArgumentType]
    return [int(x) for x in int_list(seed)]


def generate(
    model: ModelState,
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop: tuple[int, ...],
    seed: int | Sequence[int] | None,
    stream: Callable[[Int[Tensor, "b"]], Any] | None,
    adapter_ids: Sequence[int] | Int[Tensor, "b"] | None = None,
    logprobs: bool = False,
    add: dict[str, Float[Tensor, "..."]] | None = None,
) -> tuple[Int[Tensor, "b t_new"], Float32[Tensor, "b new"] | None]:
    """(prompt and continuation, log-probabilities of the new tokens if asked for).

    Ends when every row has stopped, or after `max_new_tokens`. A row that has stopped is filled
    with the config's pad_token_id, or else the first stop id; their log-probabilities are 0. An id
    outside the vocabulary is passed over, because models refuse such ids.

    Over a base that is sharded over ranks, every rank must call this. Rank 0's prompts are
    continued and its `stream` is called; every rank gets the result. All of the base is gathered
    for every token, so many rows at once take no longer than one.

    Args:
        model: with or without an adapter, or with a stack of adapters.
        input_ids: prompts, padded on the left.
        attention_mask: 1 = real token; None means all are.
        max_new_tokens: tokens to add at most.
        sampling: how to choose tokens.
        stop: ids that stop a row. The stop id is part of the result.
        seed: row i draws from a seed derived from it and i, or from the i-th of a list; None draws
            fresh entropy.
        stream: called for every new token with that of each row, up to 16 tokens late.
        adapter_ids: the number of each row's adapter, for a stack.
        logprobs: whether to return them.
        add: name of a place -> a vector [d] to add there at every position.

    Raises:
        FloatingPointError: no finite score for the next token of a row that has not stopped.
    """
    refuse_transforms("Model.generate")
    inputs = (model, input_ids, attention_mask, max_new_tokens, sampling, stop)
    work = partial(_generate, *inputs, seed, stream, adapter_ids, logprobs, add)
    ids, values = on_first_rank(model.base, work)
    device = input_ids.device
    return ids.to(device), values.to(device) if logprobs else None


@torch.no_grad()
def _generate(
    model: ModelState,
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop: tuple[int, ...],
    seed: int | Sequence[int] | None,
    stream: Callable[[Int[Tensor, "b"]], Any] | None,
    adapter_ids: Sequence[int] | Int[Tensor, "b"] | None,
    logprobs: bool,
    add: dict[str, Float[Tensor, "..."]] | None,
) -> tuple[Int[Tensor, "b t_new"], Float32[Tensor, "b new"]]:
    """`generate` by one process, with results on the CPU."""
    b, t = input_ids.shape
    seeds = seed_of_each_row(seed, b)
    numbers = [0] * b if adapter_ids is None else int_list(adapter_ids)
    rows = [
        RowSettings(
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seeds[i],
            stop=stop,
            adapter_id=numbers[i],
            logprobs=logprobs,
        )
        for i in range(b)
    ]
    engine = Engine(model, slots=b, max_length=t + max_new_tokens, add=add)
    result = _Result(b, _filler(model, stop), input_ids.device, stream)
    try:
        # Slots of a new engine are given in order, so slot i is row i.
        engine.admit([*zip(_prompts(input_ids, attention_mask), rows, strict=True)])
        while engine.running:
            result.add(engine.advance())
    finally:
        engine.close()
    ids = torch.tensor(_padded(result.ids, result.fill), device="cpu")
    values = torch.tensor(_padded(result.logprobs, 0.0), dtype=torch.float32, device="cpu")
    return torch.cat((input_ids.cpu(), ids), dim=1), values


def _filler(model: ModelState, stop: tuple[int, ...]) -> int:
    config = model.spec.config
    fillers = (config.pad_token_id, *stop)
    return next((i for i in fillers if i is not None and 0 <= i < config.vocab_size), 0)


def _prompts(
    input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"] | None
) -> list[list[int]]:
    """The real tokens of each row."""
    rows = input_ids.tolist()
    if attention_mask is None:
        return rows
    pairs = zip(rows, attention_mask.tolist(), strict=True)
    return [[i for i, real in zip(row, mask, strict=True) if real] for row, mask in pairs]


def _padded(rows: list[list], fill: Any) -> list[list]:
    longest = max(len(row) for row in rows)
    return [[*row, *[fill] * (longest - len(row))] for row in rows]


class _Result:
    """The new tokens of all rows."""

    def __init__(
        self, b: int, fill: int, device: torch.device, stream: Callable[[Tensor], Any] | None
    ) -> None:
        self.fill, self.device, self.stream = fill, device, stream
        self.ids: list[list[int]] = [[] for _ in range(b)]
        self.logprobs: list[list[float]] = [[] for _ in range(b)]

    def add(self, block: list[NewTokens]) -> None:
        """Keep the tokens of one `advance`, and stream them one column after the other."""
        before = max(len(ids) for ids in self.ids)
        for new in block:
            self.ids[new.slot] += new.ids
            self.logprobs[new.slot] += new.logprobs or []
        if self.stream is None:
            return
        for column in range(before, max(len(ids) for ids in self.ids)):
            token = [ids[column] if column < len(ids) else self.fill for ids in self.ids]
            self.stream(torch.tensor(token, device=self.device))
