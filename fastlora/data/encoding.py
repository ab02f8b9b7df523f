"""encode_rows(): token ids and labels of training rows, in chunks."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal, NamedTuple

from fastlora.arguments import check_arguments, one_of, whole_number
from fastlora.data.examples import TRAIN_ON, Example, TrainOn
from fastlora.data.left_out import LeftOut, report
from fastlora.data.long_rows import TOO_LONG, TooLong, fit
from fastlora.data.row_chunks import UNKNOWN_KIND, BadRow, Chunk, EncodedRow, chunked
from fastlora.data.row_forms import Row
from fastlora.data.row_steps import RowContext, row_context
from fastlora.data.rows import ROW_KINDS
from fastlora.data.workers import Workers
from fastlora.errors import raise_problems
from fastlora.text.boundaries import stop_warning
from fastlora.text.tokenizer import Tokenizer

OnBadRow = Literal["error", "skip"]
ON_BAD_ROW = one_of("error", "skip")

# With so many bad rows, the rest of the data is not read before they are reported.
_MOST_PROBLEMS = 1000

CORRECT = "Remove or correct them, or raise max_seq_length if rows are too long."
_CORRECT_OR_SKIP = (
    f'{CORRECT} train takes too_long="drop", "truncate" or "split", and on_bad_row="skip".'
)


class RowLimits(NamedTuple):
    """How to treat rows that are too long or unfit for training."""

    max_seq_length: int
    split_text: bool = False
    too_long: TooLong = "error"
    on_bad_row: OnBadRow = "error"


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
    limits = RowLimits(max_seq_length, split_text, too_long, on_bad_row)
    with closing(RowEncoder(row_context(tokenizer, train_on), limits, left_out)) as encoder:
        examples = encoder.examples(rows)
    encoder.finish()
    report([left_out], None)
    return examples


class RowEncoder:
    """Encodes rows in chunks, and collects the problems of all of them. Close it after use."""

    def __init__(
        self,
        context: RowContext,
        limits: RowLimits,
        left_out: LeftOut,
        columns: Mapping[str, str] | None = None,
        cure: str = _CORRECT_OR_SKIP,
    ) -> None:
        """`left_out` is filled with what is skipped, dropped or cut; `cure` ends error messages."""
        self.context, self.limits, self.left_out = context, limits, left_out
        self.chats = False  # whether a row was a chat
        self._workers = Workers(context, columns)
        # Columns that no row has had. "role" and "content" are keys of messages, which may be JSON.
        given = {} if columns is None else columns
        self._unseen = {x: n for n, x in given.items() if n not in ("role", "content")}
        self._first_keys: list[str] = []
        self._problems: list[str] = []
        self._cure = cure
        self._unknown_kinds = False

    def examples(self, rows: Iterable[Row]) -> list[Example]:
        """The examples of rows in memory, which are numbered from 1 in messages."""
        stream = ((f"row {n}", row) for n, row in enumerate(rows, 1))
        return [example for chunk in self.chunks(chunked(stream)) for example in chunk]

    def chunks(self, chunks: Iterable[Chunk]) -> Iterator[list[Example]]:
        """The examples of each chunk, in order. Chunks are read ahead of the one that is due."""
        for chunk, results in self._workers.encoded(chunks):
            self.left_out.read += len(chunk)
            if self._unseen:
                self._note_columns([row for _, row in chunk])
            yield [
                example
                for (place, _), result in zip(chunk, results, strict=True)
                for example in self._examples(place, result)
            ]
            if len(self._problems) >= _MOST_PROBLEMS:
                break

    def _note_columns(self, rows: Sequence[Any]) -> None:
        for row in rows:
            keys = {*row} if isinstance(row, Mapping) else set[str]()
            self._first_keys = self._first_keys or sorted(map(str, keys))
            # Rows in standard form, as read_rows gives them, have the standard names.
            for own in [own for own, name in self._unseen.items() if {own, name} & keys]:
                del self._unseen[own]

    def check_columns(self) -> None:
        """Raise a ValueError for each name of `columns` that no row so far has, nor the standard
        name. eval_data may have other columns than data."""
        if self._unseen and self.left_out.name != "eval_data":
            names = ", ".join(f"{own!r} ({name})" for own, name in self._unseen.items())
            raise ValueError(
                f"columns: no row of {self.left_out.name} has {names}; the first row has"
                f" {self._first_keys!r:.300}"
            )

    def close(self) -> None:
        """End the worker processes, if there are any."""
        self._workers.close()

    def finish(self) -> None:
        """Call it after the last row.

        Raises:
            ValueError: lists the rows that are unfit for training, or the names of `columns` that
                no row has.
        """
        self.refuse()
        self.check_columns()
        self.warn()

    def refuse(self) -> None:
        """Raise a ValueError if rows so far cannot be trained on."""
        train_on, most = self.context.train_on, self.limits.max_seq_length
        raise_problems(
            ValueError,
            f"{self.left_out.name}: rows that cannot be trained on (train_on={train_on!r},"
            f" max_seq_length={most}):",
            self._problems,
            self._cure + (f" Expected {ROW_KINDS}." if self._unknown_kinds else ""),
        )

    def warn(self) -> None:
        """Warn if rows were chats and the template ends their turns in an unexpected way."""
        if self.chats and (warning := stop_warning(self.context.tokenizer)):
            warnings.warn(warning, stacklevel=4)

    def _examples(self, place: str, result: EncodedRow) -> list[Example]:
        """The examples of one row: none if it is left out, several if it is split."""
        self.chats = self.chats or result.is_chat
        example = result.example
        if isinstance(example, BadRow):
            if self.limits.on_bad_row == "skip":
                reason = example.reason.removeprefix(f"{example.kind}: ")
                self.left_out.add(place, f"skipped: {example.kind}", reason)
            else:
                self._unknown_kinds = self._unknown_kinds or example.kind == UNKNOWN_KIND
                self._problems.append(f"{place}: {example.reason}")
            return []
        most, too_long = self.limits.max_seq_length, self.limits.too_long
        is_split = self.limits.split_text and too_long == "error" and result.kind == "text"
        try:
            pieces = fit(example, most, "split" if is_split else too_long)
        except ValueError as error:
            self._problems.append(f"{place}: {error}")
            return []
        t = len(example.input_ids)
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
