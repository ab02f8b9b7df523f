"""Settings of rows as the tensors that a decoding step reads."""

import torch
from torch import Tensor

from fastlora.generation.sampling import RowSampling, Sampling, filtered, row_values, variant_of


def rows_of(settings: list[Sampling], v: int) -> RowSampling:
    """The settings of some rows; row i has seed i."""
    values = [row_values(sampling, i, v) for i, sampling in enumerate(settings)]
    return RowSampling(*(torch.tensor(column) for column in zip(*values, strict=True)))


def filter_all(scores: Tensor, settings: Sampling | list[Sampling]) -> Tensor:
    """`filtered`, with the same settings in all rows or with one for each."""
    each = settings if isinstance(settings, list) else [settings] * len(scores)
    v = scores.shape[-1]
    return filtered(scores, rows_of(each, v), variant_of(each, False, v))
