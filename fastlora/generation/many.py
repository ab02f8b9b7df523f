"""generate_many: results of many prompts, in the order in which they end.

Rows that end make room for the next prompts, so that the GPU always works on as many rows as fit.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxtyping import Int
from torch import Tensor

from fastlora.arguments import (
    FLAG,
    Rule,
    argument_problems,
    int_list,
    optional,
    setting_problems,
    settings_from,
    whole_number,
)
from fastlora.errors import raise_problems
from fastlora.generation.batch_size import largest_batch
from fastlora.generation.engine import Engine, NewTokens, RowSettings
from fastlora.generation.generate import (
    adapter_ids_problems,
    seed_of_each_row,
    seeds_rule,
    stop_ids,
    stop_ids_rule,
)
from fastlora.generation.nonfinite import NonFiniteLogits
from fastlora.generation.sampling import Sampling
from fastlora.generation.text import PROMPT, Prompt, encode_prompt, text_stop_ids
from fastlora.models.input_checks import MODEL, autocast_problems
from fastlora.models.state import ModelState
from fastlora.ops.dispatch import refuse_transforms
from fastlora.runtime.layer_fetching import is_collective
from fastlora.text.tokenizer import TOKENIZER, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One continuation of one prompt."""

    index: int  # of the prompt
    sample: int  # number in [0, n) among the prompt's samples
    ids: list[int]  # new tokens; the stop id is the last one if finish_reason is "stop"
    text: str | None  # of the new tokens, without special tokens; None without a tokenizer
    logprobs: list[float] | None  # of each id under the model's own logits, if asked for
    finish_reason: Literal["stop", "length"]


def generate_many(
    model: ModelState,
    prompts: Sequence[Prompt | Sequence[int]],
    *,
    tokenizer: Tokenizer | None = None,
    max_batch: int | Literal["auto"] = "auto",
    n: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int | Sequence[int] | None = None,
    adapter_ids: Sequence[int] | Int[Tensor, "prompts"] | None = None,
    return_logprobs: bool = False,
) -> Iterator[Completion]:
    """Continue many prompts: an iterator of results, in the order in which they end.

    A row that ends makes room for the next prompt. All samples of a prompt share the work on the
    prompt. Closing the iterator, or dropping the last reference to it, frees its memory.

    Args:
        model: with an adapter, without one, or with a stack of adapters.
        prompts: texts, chats (lists of messages) or lists of ids.
        tokenizer: the model's; needed for texts and chats, and for the results' `text`.
        max_batch: rows at a time; "auto": as many as fit into the free memory, at most 64 on a GPU
            and 16 on a CPU.
        n: samples of each prompt.
        max_new_tokens: of a row at most. This and the next arguments, up to `eos_token_id`, mean
            what they mean in `Model.generate`.
        temperature: 0 always takes the likeliest token.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that together reach this probability.
        min_p: sample among the tokens with at least this share of the likeliest one's probability.
        repetition_penalty: divides positive scores of ids already seen, multiplies negative ones.
        eos_token_id: ids that stop a row; None: the checkpoint's, and with a tokenizer also its own
            and its chat template's.
        seed: sample j of prompt i draws from a seed derived from it and i * n + j, or from that
            entry of a list of len(prompts) * n seeds; None draws fresh entropy.
        adapter_ids: the number of each prompt's adapter, if model.adapter is a stack.
        return_logprobs: whether results have log-probabilities.

    Raises:
        ValueError: at the call, before any work: a wrong value, a prompt without a token, or one
            that becomes longer than `spec.max_seq_length`. Lists all problems.
        FloatingPointError: while iterating: a prompt's logits are NaN or infinite.
    """
    refuse_transforms("fastlora.generate_many")
    given = dict(locals())
    _check(given)
    if is_collective(model.base):
        raise ValueError(
            "fastlora.generate_many over a base that is sharded over ranks is not supported: use"
            " model.generate on every rank, or fastlora.gathered(model)."
        )
    encoded = _encoded(model, prompts, tokenizer, max_new_tokens)
    if eos_token_id is None and tokenizer is not None:
        config = model.spec.config
        eos_token_id = text_stop_ids(tokenizer, config.eos_token_id, config.vocab_size)
    stop = stop_ids(eos_token_id, default=model.spec.config.eos_token_id)
    sampling = settings_from(Sampling, given)
    numbers = [0] * len(prompts) if adapter_ids is None else int_list(adapter_ids)
    seeds = seed_of_each_row(seed, len(prompts) * n)
    waiting = deque(
        _Waiting(
            index,
            sample,
            ids,
            RowSettings(
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=seeds[index * n + sample],
                stop=stop,
                adapter_id=numbers[index],
                logprobs=return_logprobs,
            ),
        )
        for index, ids in enumerate(encoded)
        for sample in range(n)
    )
    return _results(model, waiting, max_batch, tokenizer)


# ── arguments ─────────────────────────────────────────────────────────────────────────────


def _is_prompt(x: Any) -> bool:
    return PROMPT.accepts(x) or _is_ids(x)


def _is_ids(x: Any) -> bool:
    ids = int_list(x) if hasattr(x, "__len__") else None
    return type(ids) is list and all(type(i) is int for i in ids)


_PROMPTS = Rule(
    lambda x: (
        not isinstance(x, str | bytes | Mapping)
        and hasattr(x, "__len__")
        and hasattr(x, "__iter__")
    ),
    "a list of prompts: texts, chats or lists of ids",
)
_MAX_BATCH = Rule(
    lambda x: (type(x) is str and x == "auto") or whole_number(1).accepts(x),
    '"auto" or a whole number >= 1',
)


def _check(given: dict[str, Any]) -> None:
    """Check all arguments, and of the prompts their classes."""
    rules = {
        "model": MODEL,
        "prompts": _PROMPTS,
        "tokenizer": optional(TOKENIZER),
        "max_batch": _MAX_BATCH,
        "n": whole_number(1),
        "max_new_tokens": whole_number(1),
        "return_logprobs": FLAG,
    }
    problems = argument_problems({name: (given[name], rule) for name, rule in rules.items()})
    problems += setting_problems(settings_from(Sampling, given))
    if not problems:
        problems = _dependent_problems(**given)
    raise_problems(ValueError, "generate_many cannot use these arguments:", problems)


def _dependent_problems(
    model: ModelState,
    prompts: Sequence[Any],
    tokenizer: Tokenizer | None,
    n: int,
    eos_token_id: Any,
    seed: Any,
    adapter_ids: Any,
    **_: Any,
) -> list[str]:
    """Problems with arguments whose rules depend on the model and on the number of prompts."""
    rows = len(prompts) * n
    stop_rule = optional(stop_ids_rule(model.spec.config.vocab_size))
    problems = argument_problems(
        {"eos_token_id": (eos_token_id, stop_rule), "seed": (seed, optional(seeds_rule(rows)))}
    )
    problems += adapter_ids_problems(model, adapter_ids, len(prompts))
    problems += autocast_problems(model.base)
    rule = Rule(_is_prompt, f"{PROMPT.expected}, or a list of ids")
    problems += argument_problems({f"prompts[{i}]": (x, rule) for i, x in enumerate(prompts)})
    if tokenizer is None and any(_is_prompt(x) and not _is_ids(x) for x in prompts):
        problems.append("tokenizer=None: the texts and chats in prompts need the model's tokenizer")
    return problems


def _encoded(
    model: ModelState, prompts: Sequence[Any], tokenizer: Tokenizer | None, max_new_tokens: int
) -> list[list[int]]:
    """The ids of all prompts.

    Raises:
        ValueError: a prompt has no token, or is too long, or its chat template fails, or holds an
            id outside the vocabulary.
    """
    v, longest = model.spec.config.vocab_size, model.spec.max_seq_length
    encoded, problems = [], []
    for i, prompt in enumerate(prompts):
        try:
            ids = int_list(prompt) if _is_ids(prompt) else encode_prompt(tokenizer, prompt)  # pyright: ignore
        except ValueError as error:
            problems.append(f"prompts[{i}]: {error}")
            continue
        if not ids:
            problems.append(f"prompts[{i}]: expected at least one token, got none")
        elif not all(0 <= x < v for x in ids):
            wrong = sorted({x for x in ids if not 0 <= x < v})[:5]
            problems.append(f"prompts[{i}] holds {wrong}; expected ids of the vocabulary [0, {v})")
        elif len(ids) + max_new_tokens > longest:
            problems.append(
                f"prompts[{i}]: {len(ids)} tokens and max_new_tokens={max_new_tokens} make"
                f" {len(ids) + max_new_tokens}; max_seq_length is {longest}. Shorten the prompt, or"
                " load with a larger max_seq_length"
            )
        encoded.append(ids)
    raise_problems(ValueError, "generate_many cannot use these prompts:", problems)
    return encoded


# ── the loop ──────────────────────────────────────────────────────────────────────────────


class _Waiting(NamedTuple):
    """A row to be generated."""

    index: int
    sample: int
    prompt: list[int]
    settings: RowSettings


class _Open:
    """The tokens so far of a row in a slot."""

    def __init__(self, row: _Waiting) -> None:
        self.row = row
        self.ids: list[int] = []
        self.logprobs: list[float] = []

    def add(self, new: NewTokens) -> None:
        self.ids += new.ids
        self.logprobs += new.logprobs or []


def _results(
    model: ModelState,
    waiting: deque[_Waiting],
    max_batch: int | Literal["auto"],
    tokenizer: Tokenizer | None,
) -> Iterator[Completion]:
    """The results of all rows. Nothing is allocated before the first is asked for."""
    if not waiting:
        return
    length = max(len(row.prompt) + row.settings.max_new_tokens for row in waiting)
    slots = largest_batch(model, length) if max_batch == "auto" else max_batch
    engine = Engine(model, slots=min(slots, len(waiting)), max_length=length)
    rows: dict[int, _Open] = {}
    try:
        while waiting or rows:
            count = min(engine.free_slots, len(waiting))
            if count:
                new = [waiting.popleft() for _ in range(count)]
                taken = engine.admit([(row.prompt, row.settings) for row in new])
                rows |= {slot: _Open(row) for slot, row in zip(taken, new, strict=True)}
            yield from _advanced(engine, rows, tokenizer)
    finally:  # also when the iterator is closed or collected
        engine.close()


def _advanced(
    engine: Engine, rows: dict[int, _Open], tokenizer: Tokenizer | None
) -> Iterator[Completion]:
    """Advance all rows, and give the results of those that end."""
    try:
        block = engine.advance()
    except NonFiniteLogits as error:
        index = rows[error.slot].row.index
        raise FloatingPointError(f"generate_many, prompts[{index}]: {error}") from error
    for new in block:
        rows[new.slot].add(new)
    # All rows are up to date before the caller gets a result: it may stop iterating at any.
    for new in block:
        reason = new.finish_reason
        if reason is None:
            continue
        result = rows.pop(new.slot)
        yield Completion(
            index=result.row.index,
            sample=result.row.sample,
            ids=result.ids,
            text=None if tokenizer is None else tokenizer.decode(result.ids),
            logprobs=result.logprobs if result.row.settings.logprobs else None,
            finish_reason=reason,
        )
