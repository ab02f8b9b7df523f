"""What several ranks have in common before, during and after a run; nothing for a process alone."""

import signal
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastlora.distributed.data_parallel import Group, joined
from fastlora.distributed.dealing import split_for
from fastlora.distributed.process_group import are_several
from fastlora.distributed.ranks import Ranks
from fastlora.errors import CheckpointError
from fastlora.models.state import ModelState
from fastlora.runtime.layer_fetching import is_collective
from fastlora.training.checkpoint import read_state
from fastlora.training.dealt_batches import is_masked
from fastlora.training.identity import hash_adapter, hash_sequences
from fastlora.training.logging.open import log_entries
from fastlora.training.mask_memory import large_mask
from fastlora.training.run import Run
from fastlora.training.run_record import json_settings, versions
from fastlora.training.signals import StopRequest


def joined_ranks(model: ModelState, context_parallel: int = 1) -> AbstractContextManager[Ranks]:
    """The ranks that train this model with this process, for a `with` block.

    Raises:
        ValueError: two ranks use one GPU, or ranks have other values of `context_parallel`.
    """
    device = model.base["norm"].device
    lockstep = is_collective(model.base)
    return joined(device, lockstep=lockstep, context_parallel=context_parallel)


def refuse_ranks(what: str) -> None:
    """Raise a ValueError if this process is one of several ranks."""
    if are_several():
        raise ValueError(
            f"{what} on several ranks is not supported; start one process, or train the models one"
            " after the other"
        )


def check_part_masks(run: Run, model: ModelState) -> None:
    """Check the memory of masks for rows that ranks have together and that are not packed.

    Their batches always have masks where the attention kernels do not run. Of a stream, whose rows
    are not known, a row may be as long as the model's max_seq_length.

    Raises:
        ValueError: a batch of the longest rows needs a mask of more than 8 GiB on each rank.
    """
    s, longest = run.settings, model.spec.max_seq_length
    if s.context_parallel == 1 or s.packing:
        return
    if run.stream is None:
        rows = (*run.sequences, *run.eval_sequences)
        longest = max(len(row.input_ids) for row in rows)  # pyright: ignore  rows of "sft"
    problem = large_mask(model, s.batch_size, longest, s.context_parallel)
    if problem is not None:
        raise ValueError(
            f"context_parallel={s.context_parallel} with rows of {longest} tokens at"
            f" batch_size={s.batch_size} {problem} and each rank; lower batch_size or"
            " max_seq_length, or use more ranks"
        )


def shared_run(run: Run, ranks: Ranks, model: ModelState, checkpoint: Path | None) -> Run:
    """The run with its ranks, and with the split of micro-batches between them.

    A micro-batch has batch_size sequences for each rank, or for each group of ranks that have rows
    together. A run that resumes on another number of ranks keeps the micro-batches that it had.

    Args:
        run: as one process would do it.
        ranks: that share it.
        model: of the learner.
        checkpoint: to resume from, or None.

    Raises:
        ValueError: the settings ask for what ranks with a sharded base cannot do, or for masks that
            are too large.
    """
    s = run.settings
    check_part_masks(run, model)
    if ranks.lockstep and s.sample_prompts is not None:
        raise ValueError(
            "sample_prompts: texts are not generated over a base that is sharded over ranks;"
            " leave them out, or load the model with shard=None"
        )
    if ranks.several and s.clip_per_example is not None:
        raise ValueError("clip_per_example: private runs train on one rank; start one process")
    rows, before = s.batch_size * ranks.data_count, _rows_before(checkpoint)
    # A process alone takes over what several ranks began, but not a run with another batch_size.
    if before is not None and before[0] % s.batch_size == 0 and (ranks.several or before[1] > 1):
        rows = before[0]
    if not ranks.several and rows == s.batch_size:
        return run
    given = (ranks.data_rank, ranks.data_count, rows, s.batch_size, s.gradient_accumulation_steps)
    return run._replace(ranks=ranks, split=split_for(*given), masked=is_masked(model.spec))


def _rows_before(checkpoint: Path | None) -> tuple[int, int] | None:
    """(sequences in a micro-batch, ranks) of a checkpoint's run."""
    if checkpoint is None:
        return None
    try:
        state = read_state(checkpoint)
    except CheckpointError:  # restore_checkpoint reports it
        return None
    rows, ranks = state["settings"].get("batch_size"), state["history"][-1].get("ranks", 1)
    if type(rows) is not int or rows < 1 or type(ranks) is not int:
        return None
    return rows, ranks


def agree_before_training(
    run: Run, model: ModelState, identity: Mapping[str, Any], checkpoint: Path | None
) -> None:
    """Compare with the other ranks all that the run depends on.

    Raises:
        ValueError: on every rank, naming each rank and fact that differs from rank 0.
    """
    if not run.ranks.several:
        return
    # Fields of the spec that the identity does not have change a run by rounding.
    spec = {f"spec.{f.name}": getattr(model.spec, f.name) for f in fields(model.spec)}
    # The identity has the first two. The base is compared itself, wherever its files are.
    for name in ("config", "lora", "name_or_path"):
        spec.pop(f"spec.{name}")
    facts = {
        **{f"version of {name}": version for name, version in versions().items()},
        **json_settings(run.settings),
        **spec,
        **identity,
        "hash of eval_data": hash_sequences(run.eval_sequences),
        "hash of the adapter": hash_adapter(model),
        "checkpoint to resume from": _checkpoint_facts(checkpoint),
        "type of device": model.base["norm"].device.type,
    }
    run.ranks.agree(facts)


def _checkpoint_facts(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "none"
    try:
        return f"{checkpoint.name} with SHA-256 {read_state(checkpoint)['sha256']}"
    except CheckpointError:
        return f"{checkpoint.name}, damaged"


def compare_adapters(ranks: Ranks, model: ModelState, step: int) -> None:
    """Raise a ValueError on every rank if their adapters differ after a step."""
    if ranks.several:
        ranks.agree({"adapter": hash_adapter(model)}, f"the run after step {step}")


def log_of(ranks: Ranks, log: Any) -> Any:
    """`log` on the first rank; on others its functions that may end the run."""
    if ranks.is_first:
        return log
    return [entry for entry in log_entries(log) if getattr(entry, "on_all_ranks", False)]


def stop_request(ranks: Ranks) -> StopRequest:
    """For the signals of a run; other ranks learn of a signal with the next step's sum."""
    stop = StopRequest()
    if isinstance(ranks, Group):
        ranks.listen(lambda: None if stop.signal is None else int(stop.signal))
    return stop


def stop_together(ranks: Ranks, stop: StopRequest) -> None:
    """End the run if it was told to stop; of several ranks, all after the same step.

    Raises:
        TrainingStopped: a signal has arrived, of several ranks before the step began.
    """
    number = ranks.signal(None if stop.signal is None else int(stop.signal))
    if number is None:
        return
    if stop.signal is None:
        is_interrupt = number == signal.SIGINT
        stop.signal = signal.SIGINT if is_interrupt else signal.SIGTERM
    raise stop.error()


def end_together(ranks: Ranks, model: ModelState, stop: StopRequest) -> None:
    """Wait until the first rank has written its files, and compare the trained adapters.

    Raises:
        TrainingStopped: a signal arrived during the last step or save; the run has finished.
    """
    if ranks.several:
        ranks.agree({"adapter": hash_adapter(model)}, "the finished run")
    if stop.signal is not None:
        raise stop.error()
