"""Run: the settings and encoded data of a training run, and the micro-batches of each step."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple

from fastlora.data.batches import batches, count_batches
from fastlora.data.encoding import encode_rows
from fastlora.data.examples import Example, Packed
from fastlora.data.packing import pack
from fastlora.data.rows import read_rows
from fastlora.models.spec import Spec
from fastlora.models.state import Batch
from fastlora.text.tokenizer import Tokenizer
from fastlora.training.settings import Settings, check_vocabulary

Sequences = list[Example] | list[Packed]


class Run(NamedTuple):
    """Everything, besides the model, that the result of a run depends on."""

    settings: Settings
    sequences: Sequences
    eval_sequences: Sequences
    batches: Callable[..., Iterator[Batch]]  # data.batches with this run's padding

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may have fewer sequences; no step reaches into the next one."""
        s = self.settings
        return count_batches(self.sequences, s.batch_size * s.gradient_accumulation_steps)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        s = self.settings
        return s.max_steps or math.ceil(s.num_epochs * self.steps_per_epoch)

    def micro_batches(self, done: int) -> Iterator[list[Batch]]:
        """Without end, the micro-batches of each step after the first `done` steps."""
        s = self.settings
        # A resumed run starts within an epoch; every later epoch starts at its first batch.
        first_epoch, steps_done = divmod(done, self.steps_per_epoch)
        for epoch in count(first_epoch):
            start = steps_done * s.gradient_accumulation_steps if epoch == first_epoch else 0
            stream = self.batches(
                self.sequences, s.batch_size, seed=s.seed, epoch=epoch, start=start
            )
            # The last list of an epoch may be shorter; an empty one ends the epoch.
            while step := list(islice(stream, s.gradient_accumulation_steps)):
                yield step


def prepare_run(
    spec: Spec, tokenizer: Tokenizer, settings: Settings, data: Any, eval_data: Any
) -> Run:
    """Read, encode and pack the rows of `data` and of `eval_data`, which may be None.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: as `read_rows` and `encode_rows`; ValueError
            also for a tokenizer whose ids exceed the model's vocabulary.
    """

    # Masks and labels say what is padding, so any id of the vocabulary will do. Some tokenizers
    # name one that the model's embedding does not have.
    pad_token_id = tokenizer.pad_token_id
    pad_token_id = pad_token_id if 0 <= pad_token_id < spec.config.vocab_size else 0

    def sequences(data: Any, name: str) -> Sequences:
        examples = encode_rows(
            read_rows(data, name=name),
            tokenizer,
            train_on=settings.train_on,  # pyright: ignore[reportArgumentType]  (checked)
            max_seq_length=spec.max_seq_length,
            split_text=settings.packing,
        )
        check_vocabulary(examples, spec.config.vocab_size)
        if not settings.packing:
            return examples
        return pack(examples, spec.max_seq_length, pad_token_id=pad_token_id)

    # eval_data before data, which may be long: an error in it is reported earlier.
    eval_sequences = [] if eval_data is None else sequences(eval_data, "eval_data")
    padded_batches = partial(batches, pad_token_id=pad_token_id, max_seq_length=spec.max_seq_length)
    return Run(settings, sequences(data, "data"), eval_sequences, padded_batches)
