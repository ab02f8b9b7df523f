"""The 16-bit matrices behind a quantised base: read from its checkpoint, or dequantised.

Quantising loses information. Saving a merged model and LoftQ want the projections of the original
checkpoint back; they are read again from the folder that `load` was given, and compared with the
quantised ones, because that folder may have changed.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.checkpoints.bnb_format import split_quantized
from fastlora.checkpoints.hub import find_folder
from fastlora.checkpoints.tensors import DTYPES, entry_tensors, read_entries
from fastlora.checkpoints.weight_files import scan
from fastlora.errors import CheckpointError, raise_problems
from fastlora.models.config import LlamaConfig
from fastlora.models.names import projection_weights, tensors_from_base
from fastlora.models.params import Base
from fastlora.models.spec import Spec
from fastlora.ops.quant.bitsandbytes import comes_from
from fastlora.ops.quant.dequantize import dense
from fastlora.ops.quant.weights import Quantized, Weight, shape_of
from fastlora.runtime.layer_fetching import described

# (name on disk, the base's weight of that name) -> the dense matrix to use for it.
MatrixSource = Callable[[str, Weight], Float[Tensor, "d_out d_in"]]


def dequantized_matrices(dtype: torch.dtype) -> MatrixSource:
    """A source that returns each of the base's matrices, quantised ones dequantised to `dtype`."""
    return lambda _, weight: dense(weight, dtype)


def unquantized_matrices(config: LlamaConfig, folder: Path, base: Base) -> MatrixSource:
    """A source that reads each quantised projection's matrix from the checkpoint before quantising.

    All matrices are checked here; each is read again when the source is called for it, and returned
    in the dtype of the base's norms. Projections that are not quantised come from the base.

    Args:
        config: the model's shape.
        folder: the checkpoint in 16 bits.
        base: the quantised base.

    Raises:
        FileNotFoundError: the folder has no weights.
        CheckpointError: the folder's weights are quantised too, do not fit the model, or are not
            those that this base was quantised from.
    """
    entries = scan(folder, wrapped=config.wrapper is not None)
    kinds = tensors_from_base(config, described(base))  # shapes, without fetching a sharded base
    weights = tensors_from_base(config, base)
    quantized = {n: kinds[n] for n in projection_weights(config) if isinstance(kinds[n], Quantized)}
    stored = split_quantized(entries)[1]
    problems = [
        f"quantised   {n} is in {stored[n].format} there too" for n in quantized if n in stored
    ]
    problems += [f"missing     {n}" for n in quantized if n not in entries]
    dense_entries = {n: entries[n] for n in quantized if n in entries and n not in stored}
    problems += [
        f"other       {n}: file has {e.dtype} {e.shape}, the model {shape_of(quantized[n])}"
        for n, e in dense_entries.items()
        if e.shape != shape_of(quantized[n]) or e.dtype not in DTYPES
    ]
    device = base["norm"].device
    # Names and shapes are not enough: by now the folder may hold another model of the family, or
    # the base was trained before it was quantised.
    if not problems:
        problems = [
            f"other       {n}: not the matrix that was quantised"
            for n, matrix in entry_tensors(dense_entries, device=device)
            if not comes_from(weights[n], matrix)
        ]
    raise_problems(
        CheckpointError,
        f"{folder} does not hold the matrices that this base was quantised from:",
        problems,
        "Give the folder of that very checkpoint, in 16 bits.",
    )

    def matrix(name: str, weight: Weight) -> Tensor:
        if isinstance(weight, Tensor):
            return weight
        # Not kept: the projections of an 8B model take 14 GB in 16 bits.
        read = read_entries({name: dense_entries[name]}, device=device)
        return read[name].to(base["norm"].dtype)

    return matrix


def source_folder(spec: Spec) -> Path:
    """The folder that `load` was given, or its copy in the Hub's cache. Never uses the network.

    Raises:
        FileNotFoundError: the folder no longer exists, or the cache has no copy.
    """
    try:
        return find_folder(spec.name_or_path, revision=spec.revision, local_files_only=True)
    except OSError as error:
        raise FileNotFoundError(
            f"{spec.name_or_path!r:.200}, which this model was loaded from, is not available now."
        ) from error
