"""Cosines and sines of RoPE in generation: tables of all positions, and the rows of a step."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.generation.prepare import PreparedModel
from fastlora.models.rope_tables import tables_by_type


class RopeTable(NamedTuple):
    """cos and sin of the angles of positions 0, 1, ..."""

    cos: Float[Tensor, "s hd"]
    sin: Float[Tensor, "s hd"]


# Layer type -> its table; layer types with equal settings share one.
RopeTables = dict[str, RopeTable]


def rope_table(model: PreparedModel, length: int) -> RopeTables:
    """The tables of `length` positions, each that of the newest token of a row."""
    config, like = model.spec.config, model.base["norm"]
    index = torch.arange(length, device=like.device)[None]
    tables = tables_by_type(config, index, index + 1, like.dtype)
    return {name: RopeTable(cos[0], sin[0]) for name, (cos, sin) in tables.items()}


def table_rows(
    table: RopeTable, position: Int[Tensor, "b"]
) -> tuple[Float[Tensor, "b hd"], Float[Tensor, "b hd"]]:
    """Rows of a table. A slot without a running row may have a position behind the table."""
    position = position.clamp(max=len(table.cos) - 1)
    return table.cos[position], table.sin[position]
