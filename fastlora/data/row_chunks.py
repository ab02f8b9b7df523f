"""encode_chunk(): rows of one chunk to token ids and labels. A pure function, for any process."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from fastlora.arguments import ENCODABLE_TEXT
from fastlora.data.examples import Example
from fastlora.data.long_rows import is_trained
from fastlora.data.row_files import Unreadable
from fastlora.data.row_forms import Row
from fastlora.data.row_steps import NothingToTrain, RowContext, Steps, row_steps
from fastlora.data.rows import RowKind, checked_row, row_kind
from fastlora.errors import CheckpointError
from fastlora.text.offsets import Encoded, encode_texts

# Texts in one call of the tokenizers library. It spreads them over all cores; more would only take
# more memory.
CHUNK_ROWS = 512

UNKNOWN_KIND = "not a row of a known kind"

Chunk = list[tuple[str, Any]]  # (place, row)


class BadRow(NamedTuple):
    """A row that is unfit for training."""

    kind: str  # words that such rows share
    reason: str  # of this row


class EncodedRow(NamedTuple):
    """The result for one row."""

    example: Example | BadRow
    kind: RowKind | None = None  # None for a row that could not be read
    is_chat: bool = False


def chunked(stream: Iterable[tuple[str, Any]]) -> Iterator[Chunk]:
    """The (place, row) of a stream in lists of at most `CHUNK_ROWS`."""
    stream = iter(stream)
    while chunk := list(islice(stream, CHUNK_ROWS)):
        yield chunk


def encode_chunk(
    rows: Sequence[Any], context: RowContext, columns: Mapping[str, str] | None = None
) -> list[EncodedRow]:
    """What each row becomes, in order.

    Args:
        rows: as they were read.
        context: what all rows share.
        columns: standard name -> name in the data.
    """
    checked = [_checked(row, columns) for row in rows]
    examples = _encode(checked, context)
    return [
        EncodedRow(example)
        if isinstance(row, BadRow)
        else EncodedRow(example, row_kind(row), _is_chat(row))
        for row, example in zip(checked, examples, strict=True)
    ]


def _checked(row: Any, columns: Mapping[str, str] | None) -> dict[str, Any] | BadRow:
    if isinstance(row, Unreadable):
        return BadRow("not JSON", row.reason)
    try:
        return checked_row(row, columns)
    except ValueError as error:
        return BadRow(UNKNOWN_KIND, str(error))


def _is_chat(row: Row) -> bool:
    kind = row_kind(row)
    is_text = kind == "text" or (kind == "prompt" and isinstance(row["prompt"], str))
    return not is_text


def _encode(rows: Sequence[dict[str, Any] | BadRow], context: RowContext) -> list[Example | BadRow]:
    """The example of each row, in order. All rows take a step, and the texts that they ask for are
    encoded together; most rows ask for one."""
    results: list[Example | BadRow | None] = [
        row if isinstance(row, BadRow) else None for row in rows
    ]
    steps: dict[int, Steps] = {
        i: row_steps(row, context) for i, row in enumerate(rows) if not isinstance(row, BadRow)
    }
    answers: dict[int, Encoded | CheckpointError | None] = dict.fromkeys(steps)
    while answers:
        asked: dict[bool, dict[int, str]] = {False: {}, True: {}}
        for i, answer in answers.items():
            outcome = _advance(steps[i], answer)
            if isinstance(outcome, Example | BadRow):
                results[i] = outcome
            else:
                asked[outcome.add_special_tokens][i] = outcome.text
        answers = {}
        for special, texts in asked.items():
            encoded = encode_texts(
                context.tokenizer.backend, list(texts.values()), add_special_tokens=special
            )
            answers |= zip(texts, encoded, strict=True)
    return [result for result in results if result is not None]


def _advance(steps: Steps, answer: Encoded | CheckpointError | None) -> Any:
    """The next Request of a row, or its Example or BadRow.

    `answer` is for its last Request; None starts the steps.
    """
    try:
        if isinstance(answer, CheckpointError):
            raise answer
        request = next(steps) if answer is None else steps.send(answer)
        if not ENCODABLE_TEXT.accepts(request.text):
            raise ValueError(f"{request.text!r:.60}: expected {ENCODABLE_TEXT.expected}")
    except StopIteration as done:
        if is_trained(done.value):
            return done.value
        return BadRow(
            "no token to train",
            "no token to train: the reply is empty, or masked, or there is none",
        )
    except NothingToTrain as error:
        return BadRow("no token to train", str(error))
    except ValueError as error:
        return BadRow("refused by the tokenizer or its chat template", str(error))
    return request
