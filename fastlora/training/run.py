"""Run: the settings and encoded data of a training run, and the micro-batches of each step."""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple

from fastlora.data.batches import batches, count_batches
from fastlora.data.left_out import LeftOut
from fastlora.data.sources import sources_of
from fastlora.data.streams import Stream
from fastlora.distributed.dealing import Split
from fastlora.distributed.ranks import ALONE, Ranks
from fastlora.losses.objectives import Objective
from fastlora.losses.preference_batches import preference_batches
from fastlora.models.spec import Spec
from fastlora.models.state import Batch, ModelState
from fastlora.text.tokenizer import Tokenizer
from fastlora.training.data_reader import DataReader, Sequences
from fastlora.training.dealt_batches import Dealer
from fastlora.training.private_checks import check_private_rows
from fastlora.training.private_step import private_batches
from fastlora.training.samples import write_samples
from fastlora.training.settings import Settings

# The key of a record that holds where a stream was after the step.
DATA_POSITION = "data_position"

Steps = Generator[list[Batch], None, None]  # the micro-batches of each step


class Run(NamedTuple):
    """Everything, besides the model, that the result of a run depends on."""

    settings: Settings
    sequences: Sequences
    eval_sequences: Sequences
    batches: Callable[..., Iterator[Batch]]  # data.batches with this run's padding
    left_out: tuple[LeftOut, ...] = ()  # counts of rows that were left out, by argument
    objective: Objective | None = None  # what is minimised; None: the mean of -log p
    stream: Stream | None = None  # data that are read while they are trained on; no sequences then
    samples: Callable[[ModelState], list[dict[str, Any]]] | None = None  # texts of sample_prompts
    ranks: Ranks = ALONE  # the processes that train together
    split: Split | None = None  # how they share micro-batches; None: this process runs all
    masked: bool = False  # whether there are dropout masks or noise

    @property
    def rows(self) -> int:
        """Sequences in a micro-batch of all ranks together."""
        return self.settings.batch_size if self.split is None else self.split.rows

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may have fewer sequences; no step reaches into the next one."""
        rows = self.rows * self.settings.gradient_accumulation_steps
        return count_batches(self.sequences, rows)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        s = self.settings
        return s.max_steps or math.ceil(s.num_epochs * self.steps_per_epoch)

    def batches_after(
        self, records: Sequence[Mapping[str, Any]]
    ) -> Generator[list[Batch], None, None]:
        """Without end, the micro-batches of each step after those that `records` are of.

        One of several ranks gets its part of them.
        """
        s = self.settings
        if self.stream is None:
            return self.micro_batches(len(records))
        position = records[-1].get(DATA_POSITION) if records else None
        given = (position, self.rows, s.gradient_accumulation_steps, self.batches)
        return self.stream.steps(*given, None if self.split is None else self.dealer.of_stream)

    @property
    def dealer(self) -> Dealer:
        """Makes the batches of this rank."""
        assert self.split is not None
        return Dealer(
            self.split,
            self.batches,
            masked=self.masked and self.objective is None,
            lockstep=self.ranks.lockstep,
        )

    def micro_batches(self, done: int) -> Steps:
        """Without end, the micro-batches of each step after the first `done` steps."""
        s = self.settings
        if s.clip_per_example is not None:
            yield from private_batches(self, done)
        if self.split is not None:
            steps = s.gradient_accumulation_steps
            yield from self.dealer.epochs(self.sequences, steps, s.seed, done)
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
    spec: Spec,
    tokenizer: Tokenizer,
    settings: Settings,
    data: Any,
    eval_data: Any,
    progress: bool = False,
    objective: Objective | None = None,
) -> Run:
    """Read, encode and pack the rows of `data` and of `eval_data`, which may be None.

    With `progress`, a bar on stderr shows the rows that are encoded. Rows with preferences, which
    `objective` may ask for, are not packed.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: as `read_examples`; ValueError also for a
            tokenizer whose ids exceed the model's vocabulary.
    """
    if settings.template_kwargs:
        tokenizer = tokenizer.with_template_kwargs(settings.template_kwargs)
    kind = "supervised" if objective is None else objective.rows
    reader = DataReader(spec, tokenizer, settings, kind, progress)
    sources = sources_of(data, "data")  # a missing file is reported before eval_data is encoded
    streams = reader.streams(sources)
    # eval_data before data, which may be long: an error in it is reported earlier.
    eval_sequences, eval_out = [], None
    if eval_data is not None:
        eval_sequences, eval_out = reader.read(eval_data, "eval_data")
    stream, sequences, out = None, [], None
    is_private = settings.clip_per_example is not None
    if streams:
        if is_private:  # before the stream's threads begin
            check_private_rows(settings, 0, streamed=True)
        stream = reader.open_stream(sources, "data")
    else:
        sequences, out = reader.read(data, "data")
        if is_private:
            check_private_rows(settings, len(sequences), streamed=False)
    samples = None
    if (prompts := settings.sample_prompts) is not None:
        new = settings.sample_tokens
        samples = partial(write_samples, tokenizer=tokenizer, prompts=prompts, new_tokens=new)
    return Run(
        settings,
        sequences,
        eval_sequences,
        partial(
            batches if kind == "supervised" else preference_batches,
            pad_token_id=reader.pad_token_id,
            max_seq_length=spec.max_seq_length,
        ),
        tuple(part for part in (eval_out, out) if part is not None),
        objective,
        stream=stream,
        samples=samples,
    )
