"""Rows with preferences: pairs of replies, or single replies with a label, and their batches.

encode_pairs() reads rows with "chosen" and "rejected", for DPO, ORPO and SimPO; encode_labelled()
reads rows with "completion" and "label", for KTO. preference_batches() makes batches of both.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fastlora.arguments import check_arguments, whole_number
from fastlora.data.batches import batches
from fastlora.data.encoding import encode_rows
from fastlora.data.examples import Example
from fastlora.data.row_forms import Row
from fastlora.data.rows import row_problem
from fastlora.data.sources import Data, sources_of
from fastlora.errors import raise_problems
from fastlora.ops.loss.linear_cross_entropy import IGNORE
from fastlora.text.tokenizer import Tokenizer

PAIR_ROWS = (
    '{"prompt", "chosen", "rejected"}: three texts or three lists of messages; or {"chosen",'
    ' "rejected"}: two chats that begin with the same messages'
)
LABELLED_ROWS = '{"prompt", "completion", "label"}: two texts or lists of messages, true or false'

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Two replies to one prompt, each after the prompt's tokens. Labels are -100 in the prompt."""

    chosen_ids: Int[np.ndarray, "t"]
    chosen_labels: Int[np.ndarray, "t"]
    rejected_ids: Int[np.ndarray, "u"]
    rejected_labels: Int[np.ndarray, "u"]

    @property
    def input_ids(self) -> Int[np.ndarray, "t_and_u"]:
        """All ids of the pair."""
        return np.concatenate([self.chosen_ids, self.rejected_ids])


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """A prompt with a reply, and whether the reply is good. Labels are -100 in the prompt."""

    input_ids: Int[np.ndarray, "t"]
    labels: Int[np.ndarray, "t"]
    label: Int[np.ndarray, "1"]  # 1: good, 0: bad


# ── rows ──────────────────────────────────────────────────────────────────────────────────


def encode_pairs(
    data: Data,
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    name: str = "data",
    columns: Mapping[str, str] | None = None,
) -> list[Pair]:
    """Token ids and labels of rows with a chosen and a rejected reply, in order.

    Args:
        data: files or dicts, as `data.sources_of` takes them, of the kinds in `PAIR_ROWS`. Weights
            are refused.
        tokenizer: the model's.
        max_seq_length: the most tokens of a prompt with one reply.
        name: what error messages call rows that do not come from a file.
        columns: standard name -> name in the data.

    Raises:
        FileNotFoundError: a file does not exist.
        CheckpointError: a file is damaged.
        ValueError: rows are of another kind, too long, or have nothing to train; lists all of them
            by number.
    """
    rows = _read(data, name, columns, _pair_problem, PAIR_ROWS)
    sides = []
    for side in SIDES:
        supervised = [_with_reply(row, side) for row in rows]
        sides.append(_encode(supervised, tokenizer, max_seq_length, f"the {side} replies"))
    return [Pair(a.input_ids, a.labels, b.input_ids, b.labels) for a, b in zip(*sides, strict=True)]


def encode_labelled(
    data: Data,
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    name: str = "data",
    columns: Mapping[str, str] | None = None,
) -> list[Labelled]:
    """Token ids and labels of rows with a reply that is good or bad, in order.

    Args:
        data: as `encode_pairs`, of the kind in `LABELLED_ROWS`.
        tokenizer: the model's.
        max_seq_length: the most tokens of a prompt with its reply.
        name: what error messages call rows that do not come from a file.
        columns: standard name -> name in the data.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: as `encode_pairs`.
    """
    rows = _read(data, name, columns, _labelled_problem, LABELLED_ROWS)
    supervised = [{key: row[key] for key in ("prompt", "completion")} for row in rows]
    examples = _encode(supervised, tokenizer, max_seq_length, "the replies")
    return [
        Labelled(e.input_ids, e.labels, np.array([int(row["label"])], dtype=np.int64))
        for e, row in zip(examples, rows, strict=True)
    ]


def encode_preferences(
    kind: str,
    data: Data,
    tokenizer: Tokenizer,
    max_seq_length: int,
    name: str,
    columns: Mapping[str, str] | None,
) -> list[Pair] | list[Labelled]:
    """`encode_pairs` for kind "pairs", `encode_labelled` for "labelled"."""
    settings = dict(max_seq_length=max_seq_length, name=name, columns=columns)
    encode = encode_pairs if kind == "pairs" else encode_labelled
    return encode(data, tokenizer, **settings)  # pyright: ignore[reportArgumentType]


def _read(
    data: Data,
    name: str,
    columns: Mapping[str, str] | None,
    problem: Callable[[Any], str | None],
    expected: str,
) -> list[Row]:
    """All rows, under their standard names."""
    sources, rows, problems = sources_of(data, name), [], []
    if any(source.weight is not None for source in sources):
        raise ValueError(f"{name} has weights, which preference rows cannot have; pass a list.")
    for source in sources:
        for place, row in source.rows(skip_unreadable=False):
            renamed = _renamed(row, columns or {})
            if wrong := problem(renamed):
                problems.append(f"{place}: {wrong}")
            rows.append(renamed)
    shown = ", ".join(source.name for source in sources)
    if not rows:
        raise ValueError(f"{shown} holds no rows; expected at least one of {expected}.")
    heading = f"{shown} has rows that cannot be read:"
    raise_problems(ValueError, heading, problems, f"Expected {expected}.")
    return rows


def _renamed(row: Any, columns: Mapping[str, str]) -> Any:
    if not isinstance(row, Mapping):
        return row
    renamed = {new: row[old] for new, old in columns.items() if old in row}
    return {key: x for key, x in row.items() if key not in columns.values()} | renamed


def _encode(
    rows: list[dict[str, Any]], tokenizer: Tokenizer, max_seq_length: int, what: str
) -> list[Example]:
    try:
        return encode_rows(rows, tokenizer, max_seq_length=max_seq_length)
    except ValueError as error:  # it numbers the rows, but does not know which replies these are
        raise ValueError(f"{what}: {error}") from error


def _pair_problem(row: Any) -> str | None:
    if not isinstance(row, Mapping):
        return f"a {type(row).__name__}, not a dict: {row!r:.60}"
    if missing := [side for side in SIDES if side not in row]:
        return f"no {' and no '.join(missing)}; keys {sorted(map(str, row))}"
    if "prompt" not in row and (wrong := _shared_problem(row)):
        return wrong
    for side in SIDES:
        if wrong := _supervised_problem(_with_reply(row, side)):
            return wrong.replace("completion", side)
    return None


def _shared_problem(row: Row) -> str | None:
    """Why two chats have no prompt in common."""
    if not all(isinstance(row[side], list) for side in SIDES):
        return "no prompt, and chosen and rejected are not both lists of messages"
    shared = _shared(row)
    if shared == 0:
        return "no prompt, and chosen and rejected begin with different messages"
    if shared == min(len(row[side]) for side in SIDES):
        return "one of chosen and rejected is the beginning of the other; expected two replies"
    return None


def _shared(row: Row) -> int:
    """How many messages chosen and rejected begin with in common."""
    pairs = zip(row["chosen"], row["rejected"], strict=False)
    return next(
        (i for i, (a, b) in enumerate(pairs) if a != b),
        min(len(row["chosen"]), len(row["rejected"])),
    )


def _with_reply(row: Row, side: str) -> dict[str, Any]:
    """The row of supervised training that has one of a pair's replies."""
    if "prompt" in row:
        return {"prompt": row["prompt"], "completion": row[side]}
    shared = _shared(row)
    return {"prompt": row[side][:shared], "completion": row[side][shared:]}


def _labelled_problem(row: Any) -> str | None:
    if not isinstance(row, Mapping):
        return f"a {type(row).__name__}, not a dict: {row!r:.60}"
    keys = ("prompt", "completion", "label")
    if missing := [key for key in keys if key not in row]:
        return f"no {' and no '.join(missing)}; keys {sorted(map(str, row))}"
    label = row["label"]
    if not isinstance(label, bool | np.bool_) and not (type(label) is int and label in (0, 1)):
        return f"label is {label!r:.60}, expected true or false"
    return _supervised_problem({key: row[key] for key in keys[:2]})


def _supervised_problem(row: dict[str, Any]) -> str | None:
    if isinstance(row["prompt"], str) != isinstance(row["completion"], str):
        return "prompt is a text and completion is not, or the other way round"
    return row_problem(row)


# ── batches ───────────────────────────────────────────────────────────────────────────────


def preference_batches(
    sequences: Sequence[Pair] | Sequence[Labelled],
    batch_size: int,
    *,
    seed: int | None,
    epoch: int = 0,
    start: int = 0,
    pad_token_id: int = 0,
    max_seq_length: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """One epoch of batches on the CPU, in an order that depends on `seed` and `epoch` only.

    Pairs give input_ids, labels and attention_mask [2 b, t], padded on the right: the b prompts
    with their chosen replies, then the same prompts with their rejected replies. Labelled rows give
    these [b, t], "label" [b], and KL_input_ids, KL_labels and KL_attention_mask [b, u]: each prompt
    with the reply of the next row of the batch, from which KTO estimates a divergence. That reply
    is cut at `max_seq_length`; nothing is trained on it.

    Args:
        sequences: the result of `encode_pairs` or `encode_labelled`.
        batch_size: b; the last batch may be smaller.
        seed: of a private random generator; None keeps the order given.
        epoch: its number; each has another order.
        start: the number of batches to leave out at the beginning.
        pad_token_id: what `input_ids` are padded with.
        max_seq_length: a bound on the rounding of t and u to a multiple of 8.

    Raises:
        ValueError: batch_size is not a whole number >= 1.
    """
    check_arguments("losses.preference_batches", batch_size=(batch_size, whole_number(1)))

    def padded(examples: list[Example]) -> dict[str, Tensor]:
        settings = dict(seed=None, pad_token_id=pad_token_id, max_seq_length=max_seq_length)
        return next(batches(examples, len(examples), **settings))  # pyright: ignore

    order = np.arange(len(sequences))
    if seed is not None:
        order = np.random.default_rng([seed, epoch]).permutation(order)
    for first in range(start * batch_size, len(order), batch_size):
        rows = [sequences[i] for i in order[first : first + batch_size]]
        pairs = [row for row in rows if isinstance(row, Pair)]
        labelled = [row for row in rows if isinstance(row, Labelled)]
        if pairs:
            chosen = [Example(p.chosen_ids, p.chosen_labels) for p in pairs]
            yield padded(chosen + [Example(p.rejected_ids, p.rejected_labels) for p in pairs])
            continue
        examples = [Example(row.input_ids, row.labels) for row in labelled]
        others = [
            _mismatched(row, other, max_seq_length)
            for row, other in zip(examples, examples[1:] + examples[:1], strict=True)
        ]
        label = torch.from_numpy(np.concatenate([row.label for row in labelled]))
        mismatched = {f"KL_{key}": x for key, x in padded(others).items()}
        yield padded(examples) | {"label": label} | mismatched


def _mismatched(row: Example, other: Example, max_seq_length: int | None) -> Example:
    """The prompt of one row with the reply of another."""
    # The index of the first trained token, where the reply begins.
    prompt, reply = (int((example.labels != IGNORE).argmax()) for example in (row, other))
    ids = np.concatenate([row.input_ids[:prompt], other.input_ids[reply:]])
    labels = np.concatenate([row.labels[:prompt], other.labels[reply:]])
    return Example(ids[:max_seq_length], labels[:max_seq_length])
