"""Batches of token ids and the losses that the functional tests take of them."""

import torch
from torch import Tensor

from oracles.trees import token_ids


def batch_of(b: int, t: int, seed: int = 0) -> dict[str, Tensor]:
    """Ids with about a quarter of the labels ignored."""
    ids = token_ids(b, t, seed=seed)
    ignored = token_ids(b, t, seed=seed + 100, vocab_size=4) == 0
    return {"input_ids": ids, "labels": torch.where(ignored, -100, ids)}
