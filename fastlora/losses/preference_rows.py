"""Rows with preferences: pairs of replies, or single replies with a label.

encode_pairs() reads rows with "chosen" and "rejected", for DPO, ORPO and SimPO; encode_labelled()
reads rows with "completion" and "label", for KTO. preference_batches.py makes batches of both.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from fastlora.arguments import check_arguments, whole_number
from fastlora.data.encoding import CORRECT, RowEncoder, RowLimits
from fastlora.data.examples import Example
from fastlora.data.left_out import LeftOut
from fastlora.data.row_forms import Row, joined_text, standard_row
from fastlora.data.row_steps import row_context
from fastlora.data.rows import row_problem
from fastlora.data.sources import Data, sources_of
from fastlora.errors import raise_problems
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


# ── encoding ──────────────────────────────────────────────────────────────────────────────


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
        data: files or dicts, as `data.sources_of` takes them, of the kinds in `PAIR_ROWS`. Messages
            may have the forms that `data.standard_row` reads. Weights are refused.
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
    rows = _read(data, name, columns, _standard_pair, PAIR_ROWS)
    replies = {
        f"{name}, the {side} replies": [_with_reply(row, side) for row in rows] for side in SIDES
    }
    sides = _encode(replies, tokenizer, max_seq_length)
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
        FileNotFoundError, CheckpointError: as `encode_pairs`.
        ValueError: as `encode_pairs`, or there is only one row: KTO compares a reply with one to
            another prompt.
    """
    rows = _read(data, name, columns, _standard_labelled, LABELLED_ROWS)
    if len(rows) == 1:
        raise ValueError(
            f"{name} holds 1 row with a label; expected at least 2, because KTO estimates a"
            " divergence from each prompt with the reply of another row."
        )
    replies = {f"{name}, the replies": [_supervised(row, row["completion"]) for row in rows]}
    (examples,) = _encode(replies, tokenizer, max_seq_length)
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


def _encode(
    replies: Mapping[str, list[dict[str, Any]]], tokenizer: Tokenizer, max_seq_length: int
) -> list[list[Example]]:
    """The examples of each kind of reply.

    Raises:
        ValueError: rows cannot be trained on; with the problems of all kinds.
    """
    check_arguments("encode_preferences", max_seq_length=(max_seq_length, whole_number(2)))
    context, limits = row_context(tokenizer, "responses"), RowLimits(max_seq_length)
    sides, problems = [], []
    for what, rows in replies.items():
        # Rows with preferences are neither cut nor skipped (`loss_argument.loss_problems`).
        with closing(RowEncoder(context, limits, LeftOut(what), cure=CORRECT)) as encoder:
            sides.append(encoder.examples(rows))
        try:
            encoder.finish()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return sides


# ── rows ──────────────────────────────────────────────────────────────────────────────────


def _read(
    data: Data,
    name: str,
    columns: Mapping[str, str] | None,
    standard: Callable[[Any, Mapping[str, str]], dict[str, Any]],
    expected: str,
) -> list[dict[str, Any]]:
    """All rows as `standard` returns them. Its errors are listed with the places of the rows."""
    sources, rows, problems = sources_of(data, name), [], []
    if any(source.weight is not None for source in sources):
        raise ValueError(f"{name} has weights, which preference rows cannot have; pass a list.")
    for source in sources:
        for place, row in source.rows(skip_unreadable=False):
            try:
                rows.append(standard(row, columns or {}))
            except ValueError as error:
                problems.append(f"{place}: {error}")
    shown = ", ".join(source.name for source in sources)
    heading = f"{shown} has rows that cannot be read:"
    raise_problems(ValueError, heading, problems, f"Expected {expected}.")
    if not rows:
        raise ValueError(f"{shown} holds no rows; expected at least one of {expected}.")
    return rows


def _standard_pair(row: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """A row with prompt, chosen and rejected: three texts, or three lists of messages.

    Raises:
        ValueError: says why the row is not a pair.
    """
    new = standard_row(row, columns)
    _require(new, SIDES)
    for side in SIDES:
        new[side] = _reply(new[side], columns)
    chats = all(isinstance(new[side], list) for side in SIDES)
    if chats and not isinstance(new.get("prompt"), list):
        new = _split_chats(new)
    _require(new, ("prompt",))
    for side in SIDES:
        if wrong := _reply_problem(new, side):
            raise ValueError(wrong)
    return new


def _standard_labelled(row: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """A row with prompt, completion and a label that is true or false.

    Raises:
        ValueError: says why it is not.
    """
    new = standard_row(row, columns)
    _require(new, ("prompt", "completion", "label"))
    label = new["label"]
    if not isinstance(label, bool | np.bool_) and not (type(label) is int and label in (0, 1)):
        raise ValueError(f"label is {label!r:.60}, expected true or false")
    if wrong := _reply_problem(new, "completion"):
        raise ValueError(wrong)
    return new


def _require(row: Row, keys: tuple[str, ...]) -> None:
    if missing := [key for key in keys if row.get(key) is None]:
        raise ValueError(f"no {' and no '.join(missing)}; keys {sorted(map(str, row))}")


def _reply(value: Any, columns: Mapping[str, str]) -> Any:
    """Messages in the form of OpenAI's API; another value is returned unchanged."""
    if not isinstance(value, list | tuple):
        return value
    names = {name: columns[name] for name in ("role", "content") if name in columns}
    return standard_row({"messages": value}, names)["messages"]


def _split_chats(row: dict[str, Any]) -> dict[str, Any]:
    """A pair whose chats include the prompt: the messages that both begin with become the prompt.

    Raises:
        ValueError: the chats have no prompt in common, or the row's prompt is a text that is not a
            message of it.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shortest = min(len(chosen), len(rejected))
    shared = next((i for i, (a, b) in pairs if a != b), shortest)
    if shared == 0 and "prompt" in row:
        return row  # a prompt that is a text, with replies that are messages: refused later
    if shared == 0:
        raise ValueError("the prompts differ: chosen and rejected begin with different messages")
    if shared == shortest:
        raise ValueError("one of chosen and rejected is the beginning of the other, or its equal")
    prompt = chosen[:shared]
    # UltraFeedback's rows have the user's text beside the chats.
    text = row.get("prompt")
    if isinstance(text, str) and text not in [joined_text(m).get("content") for m in prompt]:
        raise ValueError(f"the prompts differ: no shared message of the chats is {text!r:.60}")
    return {**row, "prompt": prompt, "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _supervised(row: Row, reply: Any) -> dict[str, Any]:
    """The row of supervised training with the prompt of `row` and this reply."""
    tools = {"tools": row["tools"]} if "tools" in row else {}
    return {"prompt": row["prompt"], "completion": reply, **tools}


def _with_reply(row: Row, side: str) -> dict[str, Any]:
    return _supervised(row, row[side])


def _reply_problem(row: Row, side: str) -> str | None:
    """Why a prompt with one of its replies is not a row of supervised training."""
    prompt, reply = row["prompt"], row[side]
    if isinstance(prompt, str) != isinstance(reply, str):
        return f"one of prompt and {side} is a text and the other is not"
    if isinstance(prompt, list) and prompt and reply[: len(prompt)] == prompt:
        return f"{side} repeats the messages of prompt; expected the reply only, or no prompt"
    wrong = row_problem(_supervised(row, reply))
    return wrong and wrong.replace("completion", side)
