"""encode_rows(): token ids and labels of training rows, in chunks."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

from fastlora.arguments import ENCODABLE_TEXT, check_arguments, one_of, whole_number
from fastlora.data.examples import TRAIN_ON, Example, TrainOn
from fastlora.data.left_out import LeftOut, report
from fastlora.data.long_rows import TOO_LONG, TooLong, fit, is_trained
from fastlora.data.row_files import Unreadable
from fastlora.data.row_forms import Row
from fastlora.data.row_steps import NothingToTrain, RowContext, Steps, row_context, row_steps
from fastlora.data.rows import ROW_KINDS, checked_row, row_kind
from fastlora.errors import CheckpointError, raise_problems
from fastlora.text.boundaries import stop_warning
from fastlora.text.offsets import Encoded, encode_texts
from fastlora.text.tokenizer import Tokenizer

OnBadRow = Literal["error", "skip"]
ON_BAD_ROW = one_of("error", "skip")

# Texts in one call of the tokenizers library. It spreads them over all cores; more would only take
# more memory.
_CHUNK_ROWS = 512

# With so many bad rows, the rest of the data is not read before they are reported.
_MOST_PROBLEMS = 1000


class RowLimits(NamedTuple):
    """What is done with rows that are too long or cannot be trained on."""

    max_seq_length: int
    split_text: bool = False
    too_long: TooLong = "error"
    on_bad_row: OnBadRow = "error"


class BadRow(NamedTuple):
    """A row that cannot be trained on."""

    kind: str  # words that such rows share
    reason: str  # of this row


def encode_rows(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    train_on: TrainOn = "responses",
    max_seq_length: int,
    split_text: bool = False,
    too_long: TooLong = "error",
    on_bad_row: OnBadRow = "error",
) -> list[Example]:
    """Token ids and labels of every row, in order, as int32.

    Args:
        rows: as `read_rows` returns them.
        tokenizer: the model's.
        train_on: "responses" trains what the assistant says, including the token that ends its
            turn, and nothing else. "last_response" trains the last reply of each row only. "all"
            trains every token. Plain text is always trained in full. If the chat template has no
            {% generation %} block, a reply is the text between the prompt from which generation
            would start and the first token at which it would stop: one of the tokenizer's
            end-of-text ids, or the token with which the template ends a turn. Replies with
            `"weight": 0` or `"train": false` are never trained.
        max_seq_length: the most tokens that an example may have.
        split_text: for packing. A {"text"} row that is too long becomes several examples of
            `max_seq_length` tokens (the last one is shorter), unless `too_long` says otherwise.
            Each begins with the last token of the example before it, so that every token but the
            first is trained once.
        too_long: what is done with other rows that are too long: "error" refuses them, "drop"
            leaves them out, "truncate" keeps the first `max_seq_length` tokens, "split" splits them
            as text. Parts without a trained token are left out.
        on_bad_row: "skip" leaves rows out that cannot be trained on, except those that are too
            long.

    The numbers of rows and tokens that are left out are written to stderr. Warns if the template
    ends a turn with a token that the tokenizer's files do not name as end of text, or with none.

    Raises:
        ValueError: rows are longer than `max_seq_length`, have no token to train, or are refused by
            the chat template, or their replies cannot be found in the rendered chat. The message
            lists all such rows by number.
    """
    check_arguments(
        "encode_rows",
        train_on=(train_on, TRAIN_ON),
        max_seq_length=(max_seq_length, whole_number(2)),
        too_long=(too_long, TOO_LONG),
        on_bad_row=(on_bad_row, ON_BAD_ROW),
    )
    left_out = LeftOut("rows")
    stream = ((f"row {n}", row) for n, row in enumerate(rows, 1))
    encoder = RowEncoder(
        row_context(tokenizer, train_on),
        RowLimits(max_seq_length, split_text, too_long, on_bad_row),
        left_out,
    )
    examples = [example for chunk in encoder.chunks(stream) for example in chunk]
    encoder.finish()
    report([left_out], None)
    return examples


class RowEncoder:
    """Encodes rows in chunks, and collects the problems of all of them."""

    def __init__(
        self,
        context: RowContext,
        limits: RowLimits,
        left_out: LeftOut,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        """`left_out` is filled with what is skipped, dropped or cut."""
        self.context, self.limits, self.left_out = context, limits, left_out
        self.columns = columns
        self._problems: list[str] = []
        self._unknown_kinds, self._chats = False, False

    def chunks(self, stream: Iterable[tuple[str, Any]]) -> Iterator[list[Example]]:
        """The examples of each chunk of (place, row), in order."""
        stream = iter(stream)
        while chunk := list(islice(stream, _CHUNK_ROWS)):
            self.left_out.read += len(chunk)
            rows = [self._checked(row) for _, row in chunk]
            results = _encode_chunk(rows, self.context)
            yield [
                example
                for (place, _), row, result in zip(chunk, rows, results, strict=True)
                for example in self._examples(place, row, result)
            ]
            if len(self._problems) >= _MOST_PROBLEMS:
                break

    def finish(self) -> None:
        """Call it after the last row.

        Raises:
            ValueError: lists the rows that cannot be trained on.
        """
        train_on, most = self.context.train_on, self.limits.max_seq_length
        raise_problems(
            ValueError,
            f"{self.left_out.name}: rows that cannot be trained on (train_on={train_on!r},"
            f" max_seq_length={most}):",
            self._problems,
            "Remove or correct them, or raise max_seq_length if rows are too long. train takes"
            ' too_long="drop", "truncate" or "split", and on_bad_row="skip".'
            + (f" Expected {ROW_KINDS}." if self._unknown_kinds else ""),
        )
        if self._chats and (warning := stop_warning(self.context.tokenizer)):
            warnings.warn(warning, stacklevel=3)

    def _checked(self, row: Any) -> dict[str, Any] | BadRow:
        if isinstance(row, Unreadable):
            return BadRow("not JSON", row.reason)
        try:
            checked = checked_row(row, self.columns)
        except ValueError as error:
            self._unknown_kinds = True
            return BadRow("not a row of a known kind", str(error))
        self._chats = self._chats or _is_chat(checked)
        return checked

    def _examples(
        self, place: str, row: dict[str, Any] | BadRow, result: Example | BadRow
    ) -> list[Example]:
        """The examples of one row: none if it is left out, several if it is split."""
        if isinstance(result, BadRow):
            if self.limits.on_bad_row == "skip":
                self.left_out.add(place, f"skipped: {result.kind}", result.reason)
            else:
                self._problems.append(f"{place}: {result.reason}")
            return []
        assert not isinstance(row, BadRow)
        most, too_long = self.limits.max_seq_length, self.limits.too_long
        is_split = self.limits.split_text and too_long == "error" and row_kind(row) == "text"
        try:
            pieces = fit(result, most, "split" if is_split else too_long)
        except ValueError as error:
            self._problems.append(f"{place}: {error}")
            return []
        t = len(result.input_ids)
        if t > most and not is_split:
            self._count(place, t, pieces)
        return pieces

    def _count(self, place: str, t: int, pieces: Sequence[Example]) -> None:
        """Count a row of t tokens that was too long."""
        too_long, most = self.limits.too_long, self.limits.max_seq_length
        # Neighbouring pieces share one token.
        kept = sum(len(piece.input_ids) for piece in pieces) - max(len(pieces) - 1, 0)
        done = {"truncate": "truncated", "split": "split"}.get(too_long, "dropped")
        what = f"{done}: longer than max_seq_length={most}"
        if not pieces and too_long != "drop":
            what = f"dropped: no token to train within max_seq_length={most}"
        self.left_out.add(place, what, f"{t} tokens", tokens=max(t - kept, 0))


def _is_chat(row: Row) -> bool:
    kind = row_kind(row)
    is_text = kind == "text" or (kind == "prompt" and isinstance(row["prompt"], str))
    return not is_text


def _encode_chunk(
    rows: Sequence[dict[str, Any] | BadRow], context: RowContext
) -> list[Example | BadRow]:
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
