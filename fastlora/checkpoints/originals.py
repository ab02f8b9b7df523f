"""originals."""

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

# ── the matrices that a quantised base was made from ──────────────────────────────────────
Matrices = Callable[[str, Weight], Float[Tensor, "d_out d_in"]]  # name on disk, the base's own


def dequantized(dtype: torch.dtype) -> Matrices:
    """Each matrix as the base has it; a quantised one in `dtype`."""
    return lambda _, weight: dense(weight, dtype)


def original(config: LlamaConfig, folder: Path, base: Base) -> Matrices:
    """Each projection as it was before it was quantised, read when asked for, in the norms' dtype.

    Args:
        config: the model's shape.
        folder: of the checkpoint in 16 bits.
        base: the quantised one.

    Raises:
        CheckpointError: the folder's weights are quantised themselves, do not fit the model, or are
            not those that this base was quantised from.
    """
    entries = scan(folder)
    own = tensors_from_base(config, base)
    packed = {n: own[n] for n in projection_weights(config) if isinstance(own[n], Quantized)}
    stored = split_quantized(entries)[1]
    problems = [f"quantised   {n} is in {stored[n].kind} there too" for n in packed if n in stored]
    problems += [f"missing     {n}" for n in packed if n not in entries]
    there = {n: entries[n] for n in packed if n in entries and n not in stored}
    problems += [
        f"other       {n}: file has {e.dtype} {e.shape}, the model {shape_of(packed[n])}"
        for n, e in there.items()
        if e.shape != shape_of(packed[n]) or e.dtype not in DTYPES
    ]
    device = base["norm"].device
    if not problems:
        problems = [
            f"other       {n}: not the matrix that was quantised"
            for n, matrix in entry_tensors(there, device=device)
            if not comes_from(packed[n], matrix)
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
        return read_entries({name: there[name]}, device=device)[name].to(base["norm"].dtype)

    return matrix


def source_folder(spec: Spec) -> Path:
    """The folder that `load` was given, or that the Hub's cache has for it; no network is asked.

    Raises:
        FileNotFoundError: if it is not there.
    """
    try:
        return find_folder(spec.name_or_path, local_files_only=True)
    except OSError as error:
        raise FileNotFoundError(
            f"{spec.name_or_path!r:.200}, which this model was loaded from, is not at hand."
        ) from error
