"""run."""

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
from fastlora.model import Model
from fastlora.models.state import Batch
from fastlora.training.settings import Settings, check_vocabulary

Sequences = list[Example] | list[Packed]


class TrainingPlan(NamedTuple):
    """Settings and encoded data: with the model, all that the result depends on."""

    settings: Settings
    sequences: Sequences
    eval_sequences: Sequences
    batches: Callable[..., Iterator[Batch]]  # data.batches, with the padding settled

    @property
    def steps_per_epoch(self) -> int:
        """An epoch's last step may be smaller; none reaches into the next epoch."""
        s = self.settings
        return count_batches(self.sequences, s.batch_size * s.gradient_accumulation_steps)

    @property
    def steps(self) -> int:
        s = self.settings
        return s.max_steps or math.ceil(s.num_epochs * self.steps_per_epoch)

    def micro_batches(self, start: int) -> Iterator[list[Batch]]:
        """Endlessly, the micro-batches of each step after the first `start` ones."""
        s = self.settings
        epoch, done = divmod(start, self.steps_per_epoch)
        for e in count(epoch):
            first = done * s.gradient_accumulation_steps if e == epoch else 0
            stream = self.batches(self.sequences, s.batch_size, seed=s.seed, epoch=e, start=first)
            while step := list(islice(stream, s.gradient_accumulation_steps)):
                yield step


def make_plan(
    model: Model, tokenizer: Any, settings: Settings, data: Any, eval_data: Any
) -> TrainingPlan:
    spec = model.spec
    padding = dict(pad_token_id=tokenizer.pad_token_id, max_seq_length=spec.max_seq_length)

    def sequences(data: Any) -> Sequences:
        examples = encode_rows(
            read_rows(data),
            tokenizer,
            train_on=settings.train_on,  # pyright: ignore[reportArgumentType]  (checked)
            max_seq_length=spec.max_seq_length,
            split_text=settings.packing,
        )
        check_vocabulary(examples, spec.config.vocab_size)
        if not settings.packing:
            return examples
        return pack(examples, spec.max_seq_length, pad_token_id=padding["pad_token_id"])

    held_out = [] if eval_data is None else sequences(eval_data)
    return TrainingPlan(settings, sequences(data), held_out, partial(batches, **padding))
