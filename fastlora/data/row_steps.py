"""row_steps(): how a row becomes an example, as steps that wait for the tokenizer.

Each function is a generator. It yields a Request for every text that it needs encoded, is sent the
Encoded text, and returns the Example. So many rows can wait for one call of the tokenizers
library, which encodes a batch on all cores (encoding.py).
"""

from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

from fastlora.data.examples import Example, TrainOn, make_example
from fastlora.data.replies import Request, chat_steps
from fastlora.data.row_forms import Row, joined_text
from fastlora.data.rows import row_kind
from fastlora.text.boundaries import encode_with_one_bos, reply_stop_ids
from fastlora.text.offsets import Encoded
from fastlora.text.tokenizer import Tokenizer

Steps = Generator[Request, Encoded, Example]

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


class RowContext(NamedTuple):
    """What all rows of a data set share."""

    tokenizer: Tokenizer
    train_on: TrainOn
    stops: Sequence[int]  # ids at which a reply stops
    adds_bos: bool
    reads_parts: bool  # whether the chat template renders content that is a list of parts


class NothingToTrain(ValueError):
    """A row without a token to train."""


def row_context(tokenizer: Tokenizer, train_on: TrainOn) -> RowContext:
    """The context for rows of a tokenizer."""
    # Whether the tokenizer adds BOS shows in any text.
    adds_bos = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    stops = reply_stop_ids(tokenizer)
    return RowContext(tokenizer, train_on, stops, adds_bos, _reads_parts(tokenizer))


def _reads_parts(tokenizer: Tokenizer) -> bool:
    """Whether the default template renders the text of content parts, and not the list's repr."""
    if "default" not in tokenizer.chat_templates:
        return False
    probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
    try:
        text = tokenizer.render_chat(probe)
    except ValueError:
        return False
    return "probe" in text and "'type'" not in text and '"type"' not in text


def row_steps(row: Row, context: RowContext) -> Steps:
    """The steps of a row in standard form (`rows.checked_row`).

    Raises:
        NothingToTrain: the row has no token to train.
        ValueError: its text cannot be rendered, or its replies not found.
    """
    match row_kind(row):
        case "messages":
            return _chat(row, row["messages"], 0, context)
        case "prompt" if isinstance(row["prompt"], str):
            return _completion(row["prompt"], row["completion"], context)
        case "prompt":
            chat = [*row["prompt"], *row["completion"]]
            return _chat(row, chat, len(row["prompt"]), context)
        case "instruction":
            return _instruction(row, context)
        case _:
            return _text(row["text"], context)


def _text(text: str, context: RowContext) -> Steps:
    if not text:
        raise NothingToTrain("no token to train: the text is empty")
    ids, bos = (yield Request(text, add_special_tokens=True)).ids, context.tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:  # the text begins with BOS, which is rare
        ids = encode_with_one_bos(context.tokenizer, text)
    ids = _with_eos(ids, context.tokenizer)
    return make_example(ids, [True] * len(ids))


def _chat(row: Row, messages: Sequence[Row], first: int, context: RowContext) -> Steps:
    if not context.reads_parts:
        messages = [joined_text(message) for message in messages]
    tools = row.get("tools")
    if tools:
        _check_reads_tools(context.tokenizer)
    return (
        yield from chat_steps(
            messages, first, context.tokenizer, context.train_on, context.stops, tools
        )
    )


def _check_reads_tools(tokenizer: Tokenizer) -> None:
    template = tokenizer.chat_templates.get("default")
    if template is not None and "tools" not in template.text:
        raise ValueError(
            f"has tools, which the chat template ({template.source}) does not read; use a template"
            " that does, or put the tools into the system message"
        )


def _with_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """`ids` with the tokenizer's first end-of-text id appended, unless they end with one."""
    eos_ids = tokenizer.eos_token_ids
    ends_already = not eos_ids or (ids and ids[-1] in eos_ids)
    return ids if ends_already else ids + list(eos_ids[:1])


def _completion(prompt: str, completion: str, context: RowContext) -> Steps:
    """BOS (if the tokenizer adds it), prompt, completion, end of text."""
    if not completion:
        raise NothingToTrain("no token to train: the completion is empty")
    prompt_ids = (yield Request(prompt)).ids
    bos = context.tokenizer.bos_token_id
    if context.adds_bos and bos is not None and prompt_ids[:1] != [bos]:
        prompt_ids = [bos, *prompt_ids]
    continuation = yield from _continuation(prompt, completion)
    completion_ids = _with_eos(continuation, context.tokenizer)
    trained = [context.train_on == "all"] * len(prompt_ids) + [True] * len(completion_ids)
    return make_example(prompt_ids + completion_ids, trained)


def _continuation(prompt: str, completion: str) -> Generator[Request, Encoded, list[int]]:
    """Ids of `completion` as they follow the ids of `prompt`, which generation will see unchanged.

    If both were encoded as one text, a token could reach across the boundary; if the completion
    were encoded alone, SentencePiece would put a space before it. So we encode the completion after
    the prompt if that leaves the prompt's ids unchanged; else after a line break or a full stop,
    with which it is unlikely to merge; else alone.
    """
    ids_before: list[int] = []
    both: list[int] = []
    for before in (prompt, "\n", ".", ""):
        ids_before = (yield Request(before)).ids
        both = (yield Request(before + completion)).ids
        if both[: len(ids_before)] == ids_before:
            break
    return both[len(ids_before) :]


def _instruction(row: Row, context: RowContext) -> Steps:
    """A chat of two turns if the tokenizer has a chat template, else Alpaca's prompt."""
    instruction, context_text = row["instruction"], row.get("input") or ""
    if not context.tokenizer.chat_templates:
        if row.get("tools"):
            raise ValueError("has tools, and the tokenizer has no chat template that reads them")
        text = _ALPACA_INPUT if context_text else _ALPACA_NO_INPUT
        prompt = text.format(instruction=instruction, input=context_text)
        return (yield from _completion(prompt, row["output"], context))
    question = f"{instruction}\n\n{context_text}" if context_text else instruction
    turns = (("user", question), ("assistant", row["output"]))
    messages: list[Mapping[str, Any]] = [
        {"role": role, "content": content} for role, content in turns
    ]
    return (yield from _chat(row, messages, 0, context))
