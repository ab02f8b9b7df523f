"""What files call the tensors of a mixture of experts: a model's, and a PEFT adapter's.

The tree holds all experts of a layer in one tensor, as transformers 5 does. A model's file may hold
the same tensor, or one for each expert and matrix: what transformers 4 wrote, and 5 still writes.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

from fastlora.models.config import LlamaConfig
from fastlora.models.names import EXPERT_SPELLINGS, base_tensors, expert_matrices, projection_path
from fastlora.models.params import EXPERTS, ROUTER


# ── 2. a model's files ────────────────────────────────────────────────────────────────────
class Piece(NamedTuple):
    """One tensor of a file, as a part of one of the tree's."""

    name: str  # of the tree's tensor, as `base_tensors` has it
    index: tuple[Any, ...]  # tensor[index] is the piece; () is the whole
    shape: tuple[int, ...]


def pieces(config: LlamaConfig, found: Collection[str] = ()) -> dict[str, Piece]:
    """Name in a file -> what it is of the tree, for a whole model, in the tree's order.

    Args:
        config: of the model.
        found: names that the file has; an experts' tensor among them is there in one piece.
    """
    whole: dict[str, Piece] = {}
    experts = _expert_pieces(config)
    for name, shape in base_tensors(config).items():
        split = {} if name in found else experts.get(name, {})
        whole |= split or {name: Piece(name, (), shape)}
    return whole


def _expert_pieces(config: LlamaConfig) -> dict[str, dict[str, Piece]]:
    """Name in the tree -> its pieces' names in files that spell every expert."""
    found: dict[str, dict[str, Piece]] = {}
    for layer, sparse in enumerate(config.sparse_layers):
        if not sparse:
            continue
        module, spelled = EXPERT_SPELLINGS[config.model_type]
        prefix = f"model.layers.{layer}.{module}"
        router = f"{projection_path(layer, ROUTER)}.weight"
        found[router] = {
            f"{prefix}.gate.weight": Piece(
                router, (), (config.num_local_experts, config.hidden_size)
            )
        }
        for name in EXPERTS:
            path = projection_path(layer, name)
            found[path] = {
                f"{prefix}.experts.{e}.{spelled[matrix]}.weight": Piece(path, (e, rows), shape)
                for e in range(config.num_local_experts)
                for matrix, rows, shape in expert_matrices(config, name)
            }
    return found
