"""Rows to training batches: reading, chat templates and response masks, packing, shuffling.

Read downward, in the order of a run: `read_rows` -> `encode_rows` -> `pack` (or not) -> `batches`.
A label is the token itself where it is trained and -100 where it is not; labels lie beside their
tokens (the loss shifts by one), so the first label of every document is -100.
"""

import json
import os
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from fastlora.checks import CheckpointError, raise_problems
from fastlora.ops.linear_cross_entropy import IGNORE as IGNORED
from fastlora.tokenizer import Span, Tokenizer

TrainOn = Literal["responses", "all"]
Row = Mapping[str, Any]

# ── 1. rows ───────────────────────────────────────────────────────────────────────────────

ROW_KINDS = (
    '{"messages": [{"role", "content"}, …]}, {"prompt", "completion"}, '
    '{"instruction", "input", "output"} or {"text"}'
)


def read_rows(data: str | os.PathLike[str] | Iterable[Row]) -> list[dict[str, Any]]:
    """Training rows from a .jsonl or .json file, or from any iterable of dicts, as a new list.

    A .jsonl file holds one object per line (empty lines are skipped), a .json file one list of
    objects. A row may have more keys than its kind needs; the first kind of `ROW_KINDS` that it has
    all keys of is taken.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a file that is not JSON, with file and line numbers.
        ValueError: rows of no known kind, with their numbers (the first is 1) and their keys; no
            rows at all.
    """
    rows = list(_read_file(Path(data)) if isinstance(data, str | os.PathLike) else data)
    name = str(data) if isinstance(data, str | os.PathLike) else "the data"
    if not rows:
        raise ValueError(f"{name} holds no rows; expected at least one of {ROW_KINDS}.")
    problems = [f"row {n}: {wrong}" for n, row in enumerate(rows, 1) if (wrong := _refusal(row))]
    raise_problems(
        ValueError, f"{name}: rows of no known kind:", problems, f"Expected {ROW_KINDS}."
    )
    return [dict(row) for row in rows]


def _read_file(path: Path) -> list[Any]:
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{path}: expected a file that ends in .jsonl or .json.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Rows are read from .jsonl or .json files.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors of Windows write a mark in front
        rows = json.loads(text) if path.suffix == ".json" else _read_lines(path, text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON in UTF-8: {error}") from error
    if not isinstance(rows, list):
        raise CheckpointError(
            f"{path} holds a {type(rows).__name__}, expected a list of objects. A file with one "
            "object per line is called .jsonl."
        )
    return rows


def _read_lines(path: Path, text: str) -> list[Any]:
    rows, problems = [], []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028 in strings
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: {error.msg} at column {error.colno}: {line:.60}")
    raise_problems(
        CheckpointError,
        f"{path}: lines that are not JSON:",
        problems,
        "Expected one object per line.",
    )
    return rows


def _refusal(row: Any) -> str | None:
    """Why a row cannot be read, or None."""
    if not isinstance(row, Mapping):
        return f"a {type(row).__name__}, not a dict: {row!r:.60}"
    if row.get("tools"):
        return "has tools, which no template is given; put them into the system message"
    columns: dict[str | None, tuple[str, ...]] = {
        "messages": ("messages",),
        "prompt": ("prompt", "completion"),
        "instruction": ("instruction", "output"),
        "text": ("text",),
    }
    if (kind := _kind(row)) is None:
        return f"keys {sorted(map(str, row))}"
    values = {key: row[key] for key in columns[kind]}
    if kind == "messages" or (kind == "prompt" and not isinstance(row["prompt"], str)):
        return next(filter(None, (_chat_refusal(k, v) for k, v in values.items())), None)
    if kind == "instruction":
        values["input"] = row.get("input") or ""
    wrong = [f"{k} is a {type(v).__name__}" for k, v in values.items() if not isinstance(v, str)]
    return f"{', '.join(wrong)}, expected text" if wrong else None


def _kind(row: Row) -> Literal["messages", "prompt", "instruction", "text"] | None:
    # Alpaca's own file has a "text" beside its three columns, so the order matters.
    if "messages" in row:
        return "messages"
    if "prompt" in row and "completion" in row:
        return "prompt"
    if "instruction" in row and "output" in row:
        return "instruction"
    return "text" if "text" in row else None


def _chat_refusal(key: str, messages: Any) -> str | None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return f"{key} must be a list of at least one message; got {messages!r:.60}"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"{key}, message {number} has no role: {message!r:.60}"
    return None


# ── 2. rows -> tokens ─────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One document: its tokens, and the labels beside them."""

    input_ids: Int64[np.ndarray, "t"]
    labels: Int64[np.ndarray, "t"]


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    train_on: TrainOn = "responses",
    max_seq_length: int,
    split_text: bool = False,
) -> list[Example]:
    """Token ids and labels of every row, in order.

    `train_on="responses"` trains what the assistant says, the token that ends its turn included,
    and nothing else; plain text is trained whole. Where the template has no {% generation %} block,
    a reply is what follows the prompt that generation would start from.

    With `split_text`, for packing, a {"text"} row that is too long becomes several examples of
    `max_seq_length` tokens (the last one shorter). Each starts with the last token of the one
    before, so every token but the first is trained once. Nothing else is split, nothing cut off.

    Raises:
        ValueError: rows that are longer than `max_seq_length`, that have nothing to train, or that
            the chat template refuses or hides the replies of: all of them, with their numbers.
    """
    if train_on not in ("responses", "all"):
        raise ValueError(f'train_on={train_on!r}: expected "responses" or "all".')
    if max_seq_length < 2:
        raise ValueError(f"max_seq_length={max_seq_length}: expected at least 2.")
    examples, problems = [], []
    for number, row in enumerate(rows, 1):
        try:
            example = _encode_row(row, tokenizer, train_on)
            split = split_text and _kind(row) == "text"
            parts = _split(example, max_seq_length) if split else [example]
            examples += [_checked(part, max_seq_length) for part in parts]
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    raise_problems(
        ValueError,
        f"rows that cannot be trained on (train_on={train_on!r}, max_seq_length={max_seq_length}):",
        problems,
        "Remove or correct them, or raise max_seq_length if rows are too long.",
    )
    return examples


def _encode_row(row: Row, tokenizer: Tokenizer, train_on: TrainOn) -> Example:
    if wrong := _refusal(row):
        raise ValueError(wrong)
    match _kind(row):
        case "messages":
            return _encode_chat(row["messages"], 0, tokenizer, train_on)
        case "prompt" if isinstance(row["prompt"], str):
            return _encode_completion(row["prompt"], row["completion"], tokenizer, train_on)
        case "prompt":
            chat = [*row["prompt"], *row["completion"]]
            return _encode_chat(chat, len(row["prompt"]), tokenizer, train_on)
        case "instruction":
            return _encode_instruction(row, tokenizer, train_on)
        case _ if row["text"]:
            ids = _with_eos(tokenizer.encode(row["text"]), tokenizer)
            return _example(ids, [True] * len(ids))
        case _:
            raise ValueError("no token to train: the text is empty")


def _example(ids: Sequence[int], trained: Sequence[bool] | np.ndarray) -> Example:
    input_ids = np.array(ids, dtype=np.int64)
    labels = np.where(np.asarray(trained, dtype=bool), input_ids, IGNORED)
    labels[:1] = IGNORED  # nothing comes before it, and in a pack another document does
    return Example(input_ids, labels)


def _checked(example: Example, max_seq_length: int) -> Example:
    if (t := len(example.input_ids)) > max_seq_length:
        raise ValueError(f"{t} tokens, {t - max_seq_length} more than max_seq_length")
    if (example.labels == IGNORED).all():
        raise ValueError("no token to train: the reply is empty or there is none")
    return example


def _split(example: Example, max_seq_length: int) -> list[Example]:
    ids = example.input_ids.tolist()
    starts = range(0, len(ids) - 1, max_seq_length - 1) if len(ids) > 1 else (0,)
    pieces = (ids[start : start + max_seq_length] for start in starts)
    return [_example(piece, [True] * len(piece)) for piece in pieces]


def _with_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """`ids` and the tokenizer's first end-of-text id, unless one of them is there already."""
    ends = tokenizer.eos_token_ids
    return ids + list(ends[:1]) if ends and (not ids or ids[-1] not in ends) else ids


# ── prompt and completion ──


def _encode_completion(
    prompt: str, completion: str, tokenizer: Tokenizer, train_on: TrainOn
) -> Example:
    """BOS (if the tokenizer adds it), prompt, completion, end of text."""
    if not completion:
        raise ValueError("no token to train: the completion is empty")
    head = tokenizer.encode(prompt, add_special_tokens=False)
    first = tokenizer.encode("a")[:1]
    if first == [tokenizer.bos_token_id] and head[:1] != first:
        head = first + head
    tail = _with_eos(_continuation(prompt, completion, tokenizer), tokenizer)
    return _example(head + tail, [train_on == "all"] * len(head) + [True] * len(tail))


def _continuation(prompt: str, completion: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of `completion` as they follow the ids of `prompt`, which generation will see unchanged.

    Encoded in one piece, tokens can reach across the boundary; encoded alone, SentencePiece would
    put a space in front. So: behind the prompt where its ids stay what they are, else behind a line
    break or a full stop, which the completion may not grow together with, else alone.
    """
    for before in (prompt, "\n", ".", ""):
        head = tokenizer.encode(before, add_special_tokens=False)
        both = tokenizer.encode(before + completion, add_special_tokens=False)
        if both[: len(head)] == head:
            break
    return both[len(head) :]


# The two prompts of Stanford Alpaca (tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT): models that
# were tuned on this format expect it word for word.
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)


def _encode_instruction(row: Row, tokenizer: Tokenizer, train_on: TrainOn) -> Example:
    """A chat of two turns where the tokenizer has a template, Alpaca's prompt where it has none."""
    instruction, given = row["instruction"], row.get("input") or ""
    if not tokenizer.chat_templates:
        text = _ALPACA_INPUT if given else _ALPACA_NO_INPUT
        prompt = text.format(instruction=instruction, input=given)
        return _encode_completion(prompt, row["output"], tokenizer, train_on)
    question = f"{instruction}\n\n{given}" if given else instruction
    turns = (("user", question), ("assistant", row["output"]))
    messages = [{"role": role, "content": content} for role, content in turns]
    return _encode_chat(messages, 0, tokenizer, train_on)


# ── chats ──


def _encode_chat(
    messages: Sequence[Row], first: int, tokenizer: Tokenizer, train_on: TrainOn
) -> Example:
    """A rendered chat; the replies among `messages[first:]` are trained."""
    if train_on == "all":
        ids = tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)
        return _example(ids, [True] * len(ids))
    if (rendered := tokenizer.render_replies(messages)) is not None:
        text, replies = rendered
        before = tokenizer.render_replies(messages[:first]) if first else None
        replies = replies[len(before[1]) if before else 0 :]
        ids, spans = tokenizer.encode_with_offsets(text)
    else:
        text = tokenizer.render_chat(messages)
        ids, spans = tokenizer.encode_with_offsets(text)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
        replies = [_find_reply(messages, i, text, (ids, spans), tokenizer) for i in turns]
    return _example(ids, _overlapping(spans, replies))


def _overlapping(spans: Sequence[Span], replies: Sequence[Span]) -> np.ndarray:
    """Which tokens share a character with a reply, or lie inside one without a character."""
    a, b = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    inside = np.zeros(len(spans), dtype=bool)
    for start, end in replies:
        inside |= (a < end) & ((b > start) | ((a == b) & (a >= start)))
    return inside


def _prompt(messages: Sequence[Row], text: str, tokenizer: Tokenizer) -> str:
    """What generation starts from after `messages`, which must be how `text` begins."""
    prompt = tokenizer.render_chat(messages, add_generation_prompt=True)
    if not text.startswith(prompt):
        raise ValueError(
            f"the chat template ({tokenizer.chat_templates['default'].source}) renders the first "
            f"{len(messages)} messages differently once more follow, so the reply cannot be told "
            'from its prompt. Use train_on="all", or a template with {% generation %} blocks'
        )
    return prompt


def _find_reply(
    messages: Sequence[Row],
    i: int,
    text: str,
    tokens: tuple[list[int], list[Span]],
    tokenizer: Tokenizer,
) -> Span:
    """The characters of `text` that the model has to say as message `i`, up to its end of turn.

    What the template writes behind the end of turn (ChatML's line break) is no part of the reply:
    generation has stopped by then. A template that shortens a reply once more messages follow
    (Qwen3 drops its thinking) still has it between the prompt and the first end of turn; it is
    taken from there if it is the message's own text or the tail of it.
    """
    start = len(_prompt(messages[:i], text, tokenizer))
    turn = text if i + 1 == len(messages) else tokenizer.render_chat(messages[: i + 1])
    whole = len(turn) if text.startswith(turn) and len(turn) > start else None
    ends = [
        end
        for token, (a, end) in zip(*tokens, strict=True)
        if token in tokenizer.eos_token_ids and a >= start and (whole is None or end <= whole)
    ]
    if whole is not None:
        return start, ends[-1] if ends and not text[ends[-1] : whole].strip() else whole
    said = text[start : ends[0]] if ends else ""
    stop = next((e for e in _eos_texts(tokenizer) if said.endswith(e)), "")
    body, content = said.removesuffix(stop).strip(), str(messages[i].get("content") or "").strip()
    if not (body and content and (content.endswith(body) or body.endswith(content))):
        raise ValueError(
            f"the chat template ({tokenizer.chat_templates['default'].source}) changes message "
            f"{i + 1} once more messages follow, so the reply cannot be found. Use "
            'train_on="all", or a template with {% generation %} blocks'
        )
    return start, ends[0]


def _eos_texts(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.eos_token_ids]


# ── 3. tokens -> sequences of one length ──────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Several documents in one sequence. Padding is a segment of its own, number 0, at the end."""

    input_ids: Int64[np.ndarray, "t"]
    labels: Int64[np.ndarray, "t"]
    segment_ids: Int64[np.ndarray, "t"]  # documents are 1, 2, …


def pack(
    examples: Sequence[Example], max_seq_length: int, *, pad_token_id: int = 0
) -> list[Packed]:
    """Sequences of exactly `max_seq_length` tokens, each filled with whole examples.

    Best fit, longest first, ties in the order given: a function of the examples alone (`batches`
    does the shuffling). It needs at most 11/9 of the fewest possible sequences plus a constant
    (Johnson et al. 1974, SIAM J. Comput. 3(4)), in O(n log n) steps.

    Raises:
        ValueError: examples longer than `max_seq_length`.
    """
    lengths = [len(example.input_ids) for example in examples]
    long = [f"example {n}: {t} tokens" for n, t in enumerate(lengths, 1) if t > max_seq_length]
    raise_problems(ValueError, f"examples longer than max_seq_length={max_seq_length}:", long)
    bins: list[list[Example]] = []
    room: dict[int, list[int]] = {}  # free tokens -> bins that have so many
    sizes: list[int] = []  # the keys of `room`, sorted
    for i in sorted(range(len(examples)), key=lambda i: -lengths[i]):
        at = bisect_left(sizes, lengths[i])
        if at == len(sizes):
            chosen, free = len(bins), max_seq_length
            bins.append([])
        else:
            free = sizes[at]
            chosen = room[free].pop()
            if not room[free]:
                del room[free], sizes[at]
        bins[chosen].append(examples[i])
        left = free - lengths[i]
        if left not in room:
            room[left] = []
            insort(sizes, left)
        room[left].append(chosen)
    return [_packed(documents, max_seq_length, pad_token_id) for documents in bins]


def _packed(documents: Sequence[Example], length: int, pad_token_id: int) -> Packed:
    lengths = [len(document.input_ids) for document in documents]
    segments = np.repeat(np.arange(1, len(documents) + 1), lengths)
    labels = np.concatenate([d.labels for d in documents])
    labels[np.cumsum([0, *lengths[:-1]])] = IGNORED  # else a document would predict the next
    return Packed(
        _padded(np.concatenate([d.input_ids for d in documents]), length, pad_token_id),
        _padded(labels, length, IGNORED),
        _padded(segments, length, 0),
    )


def _padded(values: np.ndarray, length: int, fill: int) -> Int64[np.ndarray, "t"]:
    return np.pad(values, (0, length - len(values)), constant_values=fill).astype(np.int64)


# ── 4. batches ────────────────────────────────────────────────────────────────────────────


def batches(
    sequences: Sequence[Example] | Sequence[Packed],
    batch_size: int,
    *,
    seed: int | None,
    epoch: int = 0,
    start: int = 0,
    pad_token_id: int = 0,
    max_seq_length: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """One epoch in batches on the CPU, from batch number `start` (the first is 0) on.

    The order is a function of `seed` and `epoch` alone, from a generator of its own; `seed=None`
    keeps the order given. The last batch may be smaller. Packed sequences give input_ids, labels
    and segment_ids; examples give input_ids, labels and attention_mask, padded on the right to the
    longest of the batch, rounded up to a multiple of 8 but to no more than `max_seq_length`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1.")
    order = np.arange(len(sequences))
    if seed is not None:
        order = np.random.default_rng([seed, epoch]).permutation(order)
    for at in range(start * batch_size, len(order), batch_size):
        chosen = [sequences[i] for i in order[at : at + batch_size]]
        columns = _collate(chosen, pad_token_id, max_seq_length)
        yield {name: torch.from_numpy(np.stack(column)) for name, column in columns.items()}


def _collate(
    chosen: Sequence[Example | Packed], pad_token_id: int, max_seq_length: int | None
) -> dict[str, list[np.ndarray]]:
    longest = max(len(sequence.input_ids) for sequence in chosen)
    length = -(-longest // 8) * 8
    if max_seq_length is not None:
        length = max(longest, min(length, max_seq_length))
    columns: dict[str, list[np.ndarray]] = {}
    for sequence in chosen:
        ones = np.ones_like(sequence.input_ids)
        row = {"input_ids": sequence.input_ids, "labels": sequence.labels}
        if isinstance(sequence, Packed):
            row["segment_ids"] = sequence.segment_ids
        else:
            fills = {"input_ids": pad_token_id, "labels": IGNORED, "attention_mask": 0}
            row["attention_mask"] = ones
            row = {name: _padded(values, length, fills[name]) for name, values in row.items()}
        for name, values in row.items():
            columns.setdefault(name, []).append(values)
    return columns


def count_batches(sequences: Sequence[Example] | Sequence[Packed], batch_size: int) -> int:
    """Batches in one epoch, the last partial one included."""
    return -(-len(sequences) // batch_size)


def count_trained_tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch that the loss is a mean over: labels but the first of a row, not -100."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
