"""encode_rows(): token ids and labels of training rows, by the kind of each row."""

import warnings
from collections.abc import Sequence

from fastlora.arguments import check_arguments, whole_number
from fastlora.data.examples import TRAIN_ON, Example, TrainOn, make_example
from fastlora.data.replies import encode_chat
from fastlora.data.rows import Row, row_kind, row_problem
from fastlora.errors import raise_problems
from fastlora.ops.loss.linear_cross_entropy import IGNORE
from fastlora.text.boundaries import encode_with_one_bos, reply_stop_ids, stop_warning
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

    Args:
        rows: as `read_rows` returns them.
        tokenizer: the model's.
        train_on: "responses" trains what the assistant says, including the token that ends its
            turn, and nothing else. "all" trains every token. Plain text is always trained in full.
            If the chat template has no {% generation %} block, a reply is the text between the
            prompt from which generation would start and the first token at which it would stop:
            one of the tokenizer's end-of-text ids, or the token with which the template ends a
            turn. Replies with `"weight": 0` or `"train": false` are never trained.
        max_seq_length: the most tokens that an example may have.
        split_text: for packing. A {"text"} row that is too long becomes several examples of
            `max_seq_length` tokens (the last one is shorter). Each begins with the last token of
            the example before it, so that every token but the first is trained once. Rows of other
            kinds are never split, and nothing is cut off.

    Warns if the template ends a turn with a token that the tokenizer's files do not name as end of
    text, or with none.

    Raises:
        ValueError: rows are longer than `max_seq_length`, have no token to train, or are refused by
            the chat template, or their replies cannot be found in the rendered chat. The message
            lists all such rows by number.
    """
    check_arguments(
        "encode_rows",
        train_on=(train_on, TRAIN_ON),
        max_seq_length=(max_seq_length, whole_number(2)),
    )
    # A bad row does not stop the loop: all of them are reported together.
    examples, problems = [], []
    stops = reply_stop_ids(tokenizer)
    for number, row in enumerate(rows, 1):
        try:
            example = _encode_row(row, tokenizer, train_on, stops)
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
    if any(map(_is_chat, rows)) and (warning := stop_warning(tokenizer)):
        warnings.warn(warning, stacklevel=2)
    return examples


def _is_chat(row: Row) -> bool:
    kind = row_kind(row)
    is_text = kind == "text" or (kind == "prompt" and isinstance(row["prompt"], str))
    return not is_text


def _encode_row(row: Row, tokenizer: Tokenizer, train_on: TrainOn, stops: Sequence[int]) -> Example:
    if wrong := row_problem(row):
        raise ValueError(wrong)
    match row_kind(row):
        case "messages":
            return encode_chat(row["messages"], 0, tokenizer, train_on, stops)
        case "prompt" if isinstance(row["prompt"], str):
            return _encode_completion(row["prompt"], row["completion"], tokenizer, train_on)
        case "prompt":
            chat = [*row["prompt"], *row["completion"]]
            return encode_chat(chat, len(row["prompt"]), tokenizer, train_on, stops)
        case "instruction":
            return _encode_instruction(row, tokenizer, train_on, stops)
        case _ if row["text"]:
            ids = _with_eos(encode_with_one_bos(tokenizer, row["text"]), tokenizer)
            return make_example(ids, [True] * len(ids))
        case _:
            raise ValueError("no token to train: the text is empty")


def _checked(example: Example, max_seq_length: int) -> Example:
    if (t := len(example.input_ids)) > max_seq_length:
        raise ValueError(f"{t} tokens, {t - max_seq_length} more than max_seq_length")
    if (example.labels == IGNORE).all():
        raise ValueError("no token to train: the reply is empty, or masked, or there is none")
    return example


def _split(example: Example, max_seq_length: int) -> list[Example]:
    ids = example.input_ids.tolist()
    # Neighbours share one token: the last of one is the untrained first of the next.
    starts = range(0, len(ids) - 1, max_seq_length - 1) if len(ids) > 1 else (0,)
    pieces = (ids[start : start + max_seq_length] for start in starts)
    return [make_example(piece, [True] * len(piece)) for piece in pieces]


def _with_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """`ids` with the tokenizer's first end-of-text id appended, unless they end with one."""
    eos_ids = tokenizer.eos_token_ids
    ends_already = not eos_ids or (ids and ids[-1] in eos_ids)
    return ids if ends_already else ids + list(eos_ids[:1])


def _encode_completion(
    prompt: str, completion: str, tokenizer: Tokenizer, train_on: TrainOn
) -> Example:
    """BOS (if the tokenizer adds it), prompt, completion, end of text."""
    if not completion:
        raise ValueError("no token to train: the completion is empty")
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    # Whether the tokenizer adds BOS shows in any text.
    first = tokenizer.encode("a")[:1]
    if first == [tokenizer.bos_token_id] and prompt_ids[:1] != first:
        prompt_ids = first + prompt_ids
    completion_ids = _with_eos(_continuation(prompt, completion, tokenizer), tokenizer)
    trained = [train_on == "all"] * len(prompt_ids) + [True] * len(completion_ids)
    return make_example(prompt_ids + completion_ids, trained)


def _continuation(prompt: str, completion: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of `completion` as they follow the ids of `prompt`, which generation will see unchanged.

    If both were encoded as one text, a token could reach across the boundary; if the completion
    were encoded alone, SentencePiece would put a space before it. So we encode the completion after
    the prompt if that leaves the prompt's ids unchanged; else after a line break or a full stop,
    with which it is unlikely to merge; else alone.
    """
    for before in (prompt, "\n", ".", ""):
        ids_before = tokenizer.encode(before, add_special_tokens=False)
        both = tokenizer.encode(before + completion, add_special_tokens=False)
        if both[: len(ids_before)] == ids_before:
            break
    return both[len(ids_before) :]


# The two prompts of Stanford Alpaca (tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT). Models that
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


def _encode_instruction(
    row: Row, tokenizer: Tokenizer, train_on: TrainOn, stops: Sequence[int]
) -> Example:
    """A chat of two turns if the tokenizer has a chat template, else Alpaca's prompt."""
    instruction, context = row["instruction"], row.get("input") or ""
    if not tokenizer.chat_templates:
        text = _ALPACA_INPUT if context else _ALPACA_NO_INPUT
        prompt = text.format(instruction=instruction, input=context)
        return _encode_completion(prompt, row["output"], tokenizer, train_on)
    question = f"{instruction}\n\n{context}" if context else instruction
    turns = (("user", question), ("assistant", row["output"]))
    messages = [{"role": role, "content": content} for role, content in turns]
    return encode_chat(messages, 0, tokenizer, train_on, stops)
