"""join(): the micro-batches of several runs as one batch with equally many rows of each."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from fastlora.models.state import Batch
from fastlora.ops.loss.ignore import IGNORE

# Entries of a batch -> their padding, if a row of another run is longer.
_FILLS = {"labels": IGNORE}  # others: 0, which masks a token


class Joined(NamedTuple):
    """One batch of all runs."""

    batch: dict[str, Tensor]  # [n * rows, t]: the rows of run 0 first
    widths: Int[Tensor, "n"] | None  # tokens of a row in each run's own batch; None: all are t


def join(batches: Sequence[Batch | None]) -> Joined:
    """One batch with the rows of all runs.

    Rows are padded on the right to the longest. A run with fewer rows than another, or with none,
    gets rows without labels, which add nothing to its loss or gradient: blocks of equal size run as
    batched products, and all passes have the same shapes.

    Args:
        batches: of each run, as `data.batches` makes them, on the CPU, all packed or all padded;
            None: the run has no rows in this pass. One or more are not None.
    """
    given = [batch for batch in batches if batch is not None]
    rows = max(len(batch["input_ids"]) for batch in given)
    t = max(batch["input_ids"].shape[1] for batch in given)
    blocks = [_block(given[0] if batch is None else batch, batch is None, rows, t)
              for batch in batches]  # fmt: skip
    joined = {name: torch.cat([block[name] for block in blocks]) for name in given[0]}
    own = [t if batch is None else batch["input_ids"].shape[1] for batch in batches]
    return Joined(joined, None if set(own) == {t} else torch.tensor(own, device="cpu"))


def _block(batch: Batch, empty: bool, rows: int, t: int) -> dict[str, Tensor]:
    """A batch with this many rows and tokens; `empty` removes all labels."""
    block = {}
    for name, x in batch.items():
        x = F.pad(x, (0, t - x.shape[1]), value=_FILLS.get(name, 0))
        # Copies of a row of the batch: a row without any token would be a special case of masks.
        more = x[:1].expand(rows - len(x), -1)
        block[name] = torch.cat([x, torch.full_like(more, IGNORE) if name == "labels" else more])
    if empty:
        block["labels"] = torch.full_like(block["labels"], IGNORE)
    return block
