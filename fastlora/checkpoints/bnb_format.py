"""Weights in 4 and 8 bits as transformers writes them for bitsandbytes.

    4 bits  N.weight                     packed bytes
            N.weight.absmax              one scale per block of values
            N.weight.quant_map           the 16 levels
            N.weight.nested_absmax       with double quantisation: scales of the scales
            N.weight.nested_quant_map    with double quantisation: 256 levels of the scales
            N.weight.quant_state.bitsandbytes__nf4 (or __fp4)    JSON text as bytes
    8 bits  N.weight                     int8 [d_out, d_in]
            N.SCB                        one scale per row
            N.weight_format              0: rows in their usual order

This file holds these names and writes such weights; bnb_reading.py checks and reads them.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.checkpoints.tensors import Entry
from fastlora.errors import raise_problems
from fastlora.models.config import LlamaConfig
from fastlora.models.names import LM_HEAD, projection_weights
from fastlora.ops.quant.bitsandbytes import bitsandbytes
from fastlora.ops.quant.weights import NESTED_BLOCK, NestedAbsmax, Weight4bit, quant_type

STATE_PREFIX = ".quant_state.bitsandbytes__"
PARTS_4BIT = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
PARTS_8BIT = (".SCB", ".weight_format")

# Dtypes of the dequantised matrix, by their names in a quant_state.
DENSE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# The entry of config.json, as BitsAndBytesConfig writes it (transformers 5.23).
QUANTIZATION_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "uint8",
}


def quantizable(config: LlamaConfig) -> list[str]:
    """Names on disk of the tensors that may be quantised: projections and head."""
    return [*projection_weights(config), LM_HEAD]


def check_quantizable(config: LlamaConfig, dtypes: Iterable[torch.dtype]) -> None:
    """Check, before any work, that `quantize_4bit` can quantise a model's projections.

    Args:
        config: the model's shape.
        dtypes: of the projections.

    Raises:
        ValueError: a mixture of experts, or a dtype that bitsandbytes does not quantise.
        ModuleNotFoundError: bitsandbytes is not installed.
    """
    problems = []
    if any(config.sparse_layers):
        problems.append(
            f"{config.model_type}: experts stay in 16 bits in this version, and are nearly all of"
            " a mixture; load it without load_in_4bit."
        )
    if wrong := sorted({str(d) for d in dtypes} - {str(d) for d in DENSE_DTYPES.values()}):
        problems.append(f"{wrong}: bitsandbytes quantises {list(DENSE_DTYPES)}; pass one as dtype.")
    raise_problems(ValueError, "The base cannot be quantised to 4 bits:", problems)
    # Importing it now shows that it is installed, before the weights are read.
    bitsandbytes()


class StoredWeight(NamedTuple):
    """The tensors that a file holds for one quantised weight."""

    entries: dict[str, Entry]  # "" -> the weight itself, ".absmax" -> its scales, ...

    @property
    def format(self) -> str:
        """ "nf4", "fp4" or "int8" if the weight is valid.

        Other results do not name a format: "mixed" for parts of several formats, "4 bits" if the
        quant_state is missing, or an unknown name of a quant_state.
        """
        states = [p.removeprefix(STATE_PREFIX) for p in self.entries if p.startswith(STATE_PREFIX)]
        of_8bit = [p for p in self.entries if p in PARTS_8BIT]
        of_4bit = [p for p in self.entries if p in PARTS_4BIT]
        if len(states) > 1 or (of_8bit and (states or of_4bit)):
            return "mixed"
        return "int8" if of_8bit else states[0] if states else "4 bits"

    @property
    def state(self) -> Entry | None:
        """The entry of the quant_state."""
        return next((e for p, e in self.entries.items() if p.startswith(STATE_PREFIX)), None)


def split_quantized(
    entries: Mapping[str, Entry],
) -> tuple[dict[str, Entry], dict[str, StoredWeight]]:
    """Separate a file's entries: (dense tensors by name, quantised weights by name).

        {"norm.weight": e0, "q_proj.weight": e1, "q_proj.weight.absmax": e2}
    ->  {"norm.weight": e0}, {"q_proj.weight": StoredWeight({"": e1, ".absmax": e2})}
    """
    dense: dict[str, Entry] = {}
    quantized: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        weight, part = _weight_and_part(name)
        if part:
            quantized.setdefault(weight, {})[part] = entry
        else:
            dense[name] = entry
    # The packed bytes have a plain name and were taken for a dense tensor.
    for weight, parts in quantized.items():
        if weight in dense:
            parts[""] = dense.pop(weight)
    return dense, {weight: StoredWeight(parts) for weight, parts in quantized.items()}


def _weight_and_part(name: str) -> tuple[str, str]:
    """ "q_proj.weight.absmax" -> ("q_proj.weight", ".absmax"); of a dense tensor (name, "")."""
    for part in PARTS_8BIT:
        if name.endswith(part):
            return f"{name.removesuffix(part).removesuffix('.weight')}.weight", part
    weight, state, format_name = name.rpartition(STATE_PREFIX)
    if state and weight.endswith(".weight"):
        return weight, f"{STATE_PREFIX}{format_name}"
    for part in PARTS_4BIT:
        if name.endswith(f".weight{part}"):
            return name.removesuffix(part), part
    return name, ""


def stored_tensors(name: str, weight: Weight4bit) -> dict[str, Tensor]:
    """Key -> tensor, for a weight in 4 bits as transformers writes it.

    Args:
        name: of the weight on disk; the packed bytes are returned under this key.
        weight: on any device. Its tensors are returned as views.
    """
    rows, columns, block, _ = weight.form.shape
    format_name = quant_type(weight)
    state: dict[str, Any] = {
        "quant_type": format_name,
        "blocksize": block,
        "dtype": str(weight.form.dtype).removeprefix("torch."),
        "shape": [rows, columns],
    }
    # bitsandbytes stores the packed bytes as a column [n, 1].
    tensors = {name: weight.packed.unsqueeze(1), f"{name}.quant_map": weight.levels}
    absmax = weight.absmax
    if isinstance(absmax, NestedAbsmax):
        offset = float(absmax.offset)
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": offset,
        }
        tensors |= {
            f"{name}.absmax": absmax.values,
            f"{name}.nested_absmax": absmax.scale,
            f"{name}.nested_quant_map": absmax.code,
        }
    else:
        tensors[f"{name}.absmax"] = absmax
    # safetensors holds only tensors, so bitsandbytes stores this text as bytes.
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device="cpu")
    return tensors | {f"{name}{STATE_PREFIX}{format_name}": text}
