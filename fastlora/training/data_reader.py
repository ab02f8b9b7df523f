"""DataReader: the sequences of a run, or a stream of them, from the data that `train` is given."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastlora.data.encoding import RowLimits
from fastlora.data.examples import Example
from fastlora.data.lanes import is_streamed
from fastlora.data.left_out import LeftOut
from fastlora.data.packing import PackedSequences, pack
from fastlora.data.reading import read_examples
from fastlora.data.row_steps import row_context
from fastlora.data.sources import Source
from fastlora.data.streams import Stream, StreamSettings
from fastlora.losses.loss_argument import loss_identity
from fastlora.losses.objectives import RowKind
from fastlora.losses.preference_rows import Labelled, Pair, encode_preferences
from fastlora.models.spec import Spec
from fastlora.text.tokenizer import Tokenizer
from fastlora.training.settings import Settings, check_vocabulary

Sequences = list[Example] | PackedSequences | list[Pair] | list[Labelled]


@dataclass(frozen=True, slots=True)
class DataReader:
    """Reads, encodes and packs rows by the settings of a run."""

    spec: Spec
    tokenizer: Tokenizer  # with the run's template_kwargs
    settings: Settings
    kind: RowKind  # of the rows that the run's loss needs
    progress: bool  # show a bar on stderr

    @property
    def pad_token_id(self) -> int:
        """Masks and labels say what is padding, so any id of the vocabulary will do. Some
        tokenizers name one that the model's embedding does not have."""
        given = self.tokenizer.pad_token_id
        return given if 0 <= given < self.spec.config.vocab_size else 0

    @property
    def _limits(self) -> RowLimits:
        s = self.settings
        return RowLimits(
            self.spec.max_seq_length,
            s.packing,
            s.too_long,  # pyright: ignore[reportArgumentType]  (checked)
            s.on_bad_row,  # pyright: ignore[reportArgumentType]  (checked)
        )

    def streams(self, sources: Sequence[Source]) -> bool:
        """Whether these sources are read while they are trained on.

        Raises:
            ValueError: they are, but the loss needs all rows, or the run has no max_steps.
        """
        if not is_streamed(sources):
            return False
        if self.kind != "supervised":
            loss = loss_identity(self.settings.loss)
            raise ValueError(
                f"data are streamed, but rows of preferences, which loss={loss} needs, are read"
                " before the first step; give a part of them, such as"
                " data=list(stream.take(10_000)), or smaller files"
            )
        if self.settings.max_steps is None:
            raise ValueError(
                "data are streamed, so their number of rows is not known; give train max_steps"
            )
        return True

    def read(self, data: Any, name: str) -> tuple[Sequences, LeftOut | None]:
        """All sequences, and what was left out of supervised rows.

        Raises:
            FileNotFoundError, CheckpointError, ValueError: as `read_examples`; ValueError also for
                a tokenizer whose ids exceed the model's vocabulary.
        """
        s, length = self.settings, self.spec.max_seq_length
        if self.kind != "supervised":
            given = (self.kind, data, self.tokenizer, length, name, s.columns)
            rows = encode_preferences(*given)
            self._check(rows)
            return rows, None
        examples, left_out = read_examples(
            data,
            self.tokenizer,
            self._limits,
            name=name,
            train_on=s.train_on,  # pyright: ignore[reportArgumentType]  (checked)
            columns=s.columns,
            seed=s.seed,
            progress=self.progress,
        )
        self._check(examples)
        if not s.packing:
            return examples, left_out
        return pack(examples, length, pad_token_id=self.pad_token_id), left_out

    def open_stream(self, sources: Sequence[Source], name: str) -> Stream:
        """A stream whose first block is encoded. Close it after use.

        Raises:
            ValueError, CheckpointError: as `Stream`.
        """
        s = self.settings
        how = StreamSettings(
            row_context(self.tokenizer, s.train_on),  # pyright: ignore[reportArgumentType]
            self._limits,
            s.columns,
            s.seed,
            s.packing,
            self.pad_token_id,
            self._check,
        )
        return Stream(sources, how, name, self.progress)

    def _check(self, rows: Sequence[Any]) -> None:
        check_vocabulary(rows, self.spec.config.vocab_size)
