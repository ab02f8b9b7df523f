"""Rows to training batches: reading, chat templates and response masks, packing, shuffling.

Read downward, in the order of a run: `read_rows` -> `encode_rows` -> `pack` (or not) -> `batches`.
A label is the token itself where it is trained and -100 where it is not; labels lie beside their
tokens (the loss shifts by one), so the first label of every document is -100.
"""

from collections.abc import Sequence

from fastlora.data.examples import Example, TrainOn, make_example
from fastlora.data.replies import encode_chat
from fastlora.data.rows import Row, row_kind, row_refusal
from fastlora.errors import raise_problems
from fastlora.ops.loss.linear_cross_entropy import IGNORE as IGNORED
from fastlora.text.tokenizer import Tokenizer


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
            split = split_text and row_kind(row) == "text"
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
    if wrong := row_refusal(row):
        raise ValueError(wrong)
    match row_kind(row):
        case "messages":
            return encode_chat(row["messages"], 0, tokenizer, train_on)
        case "prompt" if isinstance(row["prompt"], str):
            return _encode_completion(row["prompt"], row["completion"], tokenizer, train_on)
        case "prompt":
            chat = [*row["prompt"], *row["completion"]]
            return encode_chat(chat, len(row["prompt"]), tokenizer, train_on)
        case "instruction":
            return _encode_instruction(row, tokenizer, train_on)
        case _ if row["text"]:
            ids = _with_eos(tokenizer.encode(row["text"]), tokenizer)
            return make_example(ids, [True] * len(ids))
        case _:
            raise ValueError("no token to train: the text is empty")


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
    return [make_example(piece, [True] * len(piece)) for piece in pieces]


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
    return make_example(head + tail, [train_on == "all"] * len(head) + [True] * len(tail))


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
    return encode_chat(messages, 0, tokenizer, train_on)
