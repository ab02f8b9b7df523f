"""The names of a mixture's tensors in a checkpoint's files.

The tree holds the matrices of all experts of a layer in one tensor, as transformers 5 does in
memory. A file may hold that tensor, or one tensor for each expert and matrix, as transformers 4 and
5 write them:

    file  model.layers.0.block_sparse_moe.gate.weight           [e, d]
          model.layers.0.block_sparse_moe.experts.3.w1.weight   [f, d]      (gate of expert 3)
          model.layers.0.block_sparse_moe.experts.3.w3.weight   [f, d]      (up of expert 3)
    tree  model.layers.0.mlp.gate.weight                        [e, d]
          model.layers.0.mlp.experts.gate_up_proj               [e, 2f, d]  (rows :f and f: of [3])

PEFT adapters have other names: formats/peft/expert_layout.py.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

from fastlora.models.config import LlamaConfig
from fastlora.models.names import base_tensors, expert_matrices, expert_spelling, projection_path
from fastlora.models.params import EXPERTS, ROUTER


class Piece(NamedTuple):
    """A tensor of a file, as a part of a tensor of the tree."""

    name: str  # of the tree's tensor, as `base_tensors` spells it
    index: tuple[Any, ...]  # tensor[index] is the piece; () means the complete tensor
    shape: tuple[int, ...]  # of the piece


def pieces(config: LlamaConfig, names_in_file: Collection[str] = ()) -> dict[str, Piece]:
    """Name in a file -> piece, for all tensors of a model, in the tree's order.

    Args:
        config: the model's shape.
        names_in_file: tensors of experts whose names in the tree are among these are stored as one
            tensor; all others are stored expert by expert.
    """
    stored: dict[str, Piece] = {}
    experts = _expert_pieces(config)
    for name, shape in base_tensors(config).items():
        split = {} if name in names_in_file else experts.get(name, {})
        stored |= split or {name: Piece(name, (), shape)}
    return stored


def _expert_pieces(config: LlamaConfig) -> dict[str, dict[str, Piece]]:
    """Name in the tree -> the pieces of a file that stores every expert by itself."""
    split: dict[str, dict[str, Piece]] = {}
    for layer, sparse in enumerate(config.sparse_layers):
        if not sparse:
            continue
        module, matrix_names = expert_spelling(config)[:2]
        prefix = f"model.layers.{layer}.{module}"
        router = f"{projection_path(layer, ROUTER)}.weight"
        split[router] = {
            f"{prefix}.gate.weight": Piece(
                router, (), (config.num_local_experts, config.hidden_size)
            )
        }
        for name in EXPERTS:
            path = projection_path(layer, name)
            split[path] = {
                f"{prefix}.experts.{e}.{matrix_names[matrix]}.weight": Piece(path, (e, rows), shape)
                for e in range(config.num_local_experts)
                for matrix, rows, shape in expert_matrices(config, name)
            }
    return split
