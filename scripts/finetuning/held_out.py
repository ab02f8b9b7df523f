"""What scripts/finetune.py trains and evaluates on, and how a model does on held-out rows."""

from itertools import islice
from typing import Any

import torch

import fastlora
from fastlora.checkpoints.hub import DEMO
from fastlora.data.batches import batches, count_trained_tokens
from fastlora.data.encoding import RowLimits
from fastlora.data.lanes import is_streamed
from fastlora.data.packing import pack
from fastlora.data.reading import read_examples
from fastlora.data.row_files import Unreadable
from fastlora.data.rows import checked_row, read_rows
from fastlora.data.sources import sources_of
from fastlora.losses.loss_argument import NAMED

Data = str | list[Any]  # a path, whose rows `train` reads, or rows

# Held-out rows among which prompts are chosen.
_MOST_READ = 1000


def data_of(options: Any) -> tuple[Data, Data | None]:
    """(rows to train on, held-out rows or None).

    The held-out rows are those of --eval-data, or one row in twenty of --data. Files that are not
    divided are returned as paths, so that `train` streams, caches and names them.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: rows are of no known kind, or a file to divide is too large to be read at once
            or has too few rows.
    """
    data, heldout = str(options.data), options.eval_data
    sources = sources_of(data, "data")  # a missing file is reported before the model is loaded
    if heldout is None and options.hold_out and options.data == DEMO / "train.jsonl":
        heldout = DEMO / "heldout.jsonl"
    if heldout is not None:
        sources_of(str(heldout), "eval_data")
        return data, str(heldout)
    if not options.hold_out:
        return data, None
    if is_streamed(sources):
        raise ValueError(
            f"{data} is so large that it is streamed, so it cannot be divided; give --eval-data or"
            " --no-hold-out"
        )
    skip = options.on_bad_row == "skip"
    kind = NAMED[options.loss].rows if options.loss in NAMED else "supervised"
    if skip or kind != "supervised":
        # train reports these rows. Their numbers are those among the rows that it is given.
        found = [row for source in sources for _, row in source.rows(skip_unreadable=skip)]
        # A dict that train skips too, and counts as a row of no known kind.
        rows = [{"not JSON": x.reason} if isinstance(x, Unreadable) else x for x in found]
    else:
        rows = read_rows(data, columns=options.columns)
    if not rows:
        raise ValueError(f"{data} holds no rows")
    parts = [row for i, row in enumerate(rows) if i % 20], rows[::20]
    least = 2 if kind == "labelled" else 1  # KTO compares rows
    if min(map(len, parts)) < least:
        raise ValueError(
            f"{data} has too few rows ({len(rows)}) to hold out one in twenty: that leaves"
            f" {len(parts[0])} to train on and {len(parts[1])} to evaluate on, and"
            f" loss={options.loss!r} needs {least} of each; add rows, or give --eval-data or"
            " --no-hold-out"
        )
    return parts


def described(data: Data | None) -> str:
    """Rows as one word or number, for people."""
    return "none" if data is None else data if isinstance(data, str) else f"{len(data):,}"


@torch.no_grad()
def heldout_loss(model: fastlora.Model, tokenizer: fastlora.Tokenizer, data: Data, o: Any) -> float:
    """Mean of -log p over the trained tokens of rows, in nats, with the options of a run."""
    length = model.spec.max_seq_length
    limits = RowLimits(length, True, o.too_long, o.on_bad_row)
    tokenizer = tokenizer.with_template_kwargs(o.template_kwargs or {})
    examples, _ = read_examples(
        data, tokenizer, limits, name="eval_data", train_on=o.train_on, columns=o.columns
    )
    device, total, count = model.base["norm"].device, 0.0, 0
    for batch in batches(pack(examples, length), o.batch_size, seed=None):
        trained = count_trained_tokens(batch)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        total, count = total + trained * model.loss(batch).item(), count + trained
    return total / count


def prompts_of(data: Data, options: Any, number: int = 3) -> list[tuple[list[Any], str]]:
    """(messages, the reply of the row) of some rows that are chats."""
    found = []
    for source in sources_of(data, "eval_data"):
        for _, row in islice(source.rows(skip_unreadable=True), _MOST_READ):
            try:
                messages = checked_row(row, options.columns).get("messages")
            except ValueError:  # of another kind, or left out of training too
                continue
            if messages and len(messages) > 1 and isinstance(messages[-1].get("content"), str):
                found.append((messages[:-1], messages[-1]["content"]))
    return found[:: max(1, len(found) // number)][:number]
