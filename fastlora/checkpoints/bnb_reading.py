"""Checks and reads weights in 4 and 8 bits, whose parts bnb_format.py names.

A wrong shape or block size would make bitsandbytes' kernels read outside their tensors, so every
value of a quant_state is checked against the shapes that the model needs.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastlora.checkpoints.bnb_format import DENSE_DTYPES, PARTS_4BIT, STATE_PREFIX, StoredWeight
from fastlora.checkpoints.json_text import unique_names
from fastlora.checkpoints.tensors import Entry, entry_tensors, read_entries
from fastlora.ops.quant.bitsandbytes import bitsandbytes
from fastlora.ops.quant.weights import (
    LEVELS,
    NESTED_BLOCK,
    NestedAbsmax,
    Quantized,
    Weight4bit,
    Weight8bit,
    empty_form,
)

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those that bitsandbytes dequantises

_FLOAT32_MAX = torch.finfo(torch.float32).max

# Bytes per element of the dtypes that packed bytes may be stored in: FSDP needs all tensors of a
# model in one dtype, so bitsandbytes can view the bytes as another one.
_STORAGE_BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}

_MAX_STATE_BYTES = 4096

# ── checks ────────────────────────────────────────────────────────────────────────────────


def quantized_problems(
    stored: Mapping[str, StoredWeight], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Problems with quantised weights. Reads headers, quant_states and levels, no weights.

    Args:
        stored: quantised weights by name, from `split_quantized`.
        expected: name -> shape, of the matrices that may be quantised.
    """
    states, levels, problems = _read_states(stored), _read_levels(stored), []
    for name, weight in stored.items():
        if name not in expected:
            keys = [e.key for part, e in weight.entries.items() if part]
            problems.append(f"unexpected  {keys[:5]}: only projections and head may be quantised")
            continue
        if weight.format == "int8":
            wrong = _problems_8bit(weight, expected[name])
        elif weight.format in LEVELS:
            wrong = _problems_4bit(weight, expected[name], states.get(name), levels.get(name))
        else:
            keys = [part[1:] for part in weight.entries if part]
            wrong = [f"{weight.format}: expected the parts of nf4, fp4 or int8, found {keys}"]
        problems += [f"quantised   {name}: {problem}" for problem in wrong]
    return problems


def _read_states(stored: Mapping[str, StoredWeight]) -> dict[str, Any]:
    """Name -> the quant_state's JSON object; None if its tensor does not hold one."""
    # A valid quant_state has about 200 bytes.
    entries = {n: w.state for n, w in stored.items() if w.state is not None}
    readable = {
        n: e
        for n, e in entries.items()
        if e.dtype == "U8" and math.prod(e.shape) <= _MAX_STATE_BYTES
    }
    texts = read_entries(readable)
    return dict.fromkeys(entries) | {n: _json_object(text) for n, text in texts.items()}


def _json_object(text: Tensor) -> dict[str, Any] | None:
    try:
        value = json.loads(text.numpy().tobytes(), object_pairs_hook=unique_names)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_levels(stored: Mapping[str, StoredWeight]) -> dict[str, Tensor]:
    """Name -> quant_map, for the weights whose quant_map has 16 levels."""
    entries = {
        n: w.entries[".quant_map"]
        for n, w in stored.items()
        if ".quant_map" in w.entries and w.entries[".quant_map"].shape == (16,)
    }
    return read_entries(entries)


def _problems_8bit(weight: StoredWeight, shape: tuple[int, ...]) -> Iterator[str]:
    yield from _differences(weight, {"": ("I8", shape), ".SCB": ("F32", shape[:1])})
    if ".weight_format" in weight.entries:
        (value,) = read_entries({"": weight.entries[".weight_format"]}).values()
        if value.numel() != 1 or value.item() != 0:
            yield "weight_format is not 0, rows in order; save it again with bitsandbytes >= 0.45"


def _problems_4bit(
    weight: StoredWeight, shape: tuple[int, ...], state: Any, levels: Tensor | None
) -> Iterator[str]:
    if state is None:
        yield f"{STATE_PREFIX[1:]}{weight.format} is not a JSON object stored as U8"
        return
    if problem := _state_problem(state, weight.format, shape):
        yield problem
        return
    # Rounded up: the last block may be shorter.
    blocks = -(-math.prod(shape) // state["blocksize"])
    nested = "nested_offset" in state
    expected = {".absmax": ("U8" if nested else "F32", (blocks,)), ".quant_map": ("F32", (16,))}
    if nested:
        groups = -(-blocks // NESTED_BLOCK)
        expected |= {".nested_absmax": ("F32", (groups,)), ".nested_quant_map": ("F32", (256,))}
    yield from _differences(weight, expected)
    if extra := [p[1:] for p in weight.entries if p in PARTS_4BIT and p not in expected]:
        yield f"has {extra}, but its quant_state has no nested_offset"
    yield from _packed_problem(weight, shape)
    if levels is not None and not torch.equal(levels, _float32(LEVELS[weight.format])):
        yield f"quant_map is not {weight.format}'s, which is all that bitsandbytes reads"


def _state_problem(state: dict[str, Any], format_name: str, shape: tuple[int, ...]) -> str | None:
    """The first wrong value of a quant_state.

    Values are compared by repr, because 64.0 == 64 and True == 1, but neither is a size.
    """
    allowed: dict[str, tuple[Any, ...]] = {
        "quant_type": (format_name,),
        "blocksize": _BLOCK_SIZES,
        "dtype": tuple(DENSE_DTYPES),
        "shape": (list(shape),),
    }
    if "nested_offset" in state:
        allowed |= {"nested_blocksize": (NESTED_BLOCK,), "nested_dtype": ("float32",)}
        offset = state["nested_offset"]
        if type(offset) not in (int, float) or not -_FLOAT32_MAX <= offset <= _FLOAT32_MAX:
            return f"nested_offset={offset!r:.80}; expected a number in float32"
    for key, values in allowed.items():
        value = state.get(key)
        if repr(value) not in map(repr, values):
            return f"{key}={value!r:.80}; expected one of {list(values)}"
    return None


def _packed_problem(weight: StoredWeight, shape: tuple[int, ...]) -> Iterator[str]:
    """The packed bytes may be stored in a wider dtype; its last element may then have padding."""
    if "" not in weight.entries:
        yield "is missing, but its scales are in the file"
        return
    entry, needed = weight.entries[""], _packed_bytes(shape)
    size = _STORAGE_BYTES.get(entry.dtype, 0)
    if not size or not needed <= math.prod(entry.shape) * size < needed + size:
        yield f"file has {entry.dtype} {entry.shape}; expected {needed:,} bytes for {shape}"


def _packed_bytes(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // 2)  # two values a byte


def _differences(
    weight: StoredWeight, expected: Mapping[str, tuple[str, tuple[int, ...]]]
) -> Iterator[str]:
    for part, (dtype, shape) in expected.items():
        entry, shown = weight.entries.get(part), part[1:] or "weight"
        if entry is None:
            yield f"{shown} is missing; expected {dtype} {shape}"
        elif (entry.dtype, entry.shape) != (dtype, shape):
            yield f"{shown}: file has {entry.dtype} {entry.shape}; expected {dtype} {shape}"


# ── reading ───────────────────────────────────────────────────────────────────────────────


def read_quantized(
    stored: Mapping[str, StoredWeight], *, device: torch.device | str
) -> dict[str, Quantized]:
    """Name -> quantised weight. On the CPU their tensors are views of the memory-mapped files.

    Args:
        stored: weights in which `quantized_problems` has found no problem.
        device: where the tensors go.

    Raises:
        ModuleNotFoundError: 4-bit weights on the CPU, where dequantising them needs bitsandbytes,
            and it is not installed.
    """
    states = _read_states(stored)
    if any(w.format in LEVELS for w in stored.values()) and torch.device(device).type == "cpu":
        bitsandbytes()
    tensors = _read_parts(stored, device)
    # All weights of one format share one tensor of levels.
    levels = {
        name: _float32(LEVELS[name], device)
        for name in {w.format for w in stored.values()} & {*LEVELS}
    }
    return {
        n: Weight8bit(tensors[n][""], tensors[n][".SCB"])
        if w.format == "int8"
        else _weight_4bit(tensors[n], states[n], levels[w.format])
        for n, w in stored.items()
    }


# A weight on the device "meta", and for each of its tensors, by id, where its bytes are: an entry
# of a file, or a small tensor.
Described = tuple[Quantized, dict[int, Entry | Tensor]]


def described_weights(stored: Mapping[str, StoredWeight]) -> dict[str, Described]:
    """Name -> the weight that `read_quantized` would read, described. No weight is read.

    Args:
        stored: weights in which `quantized_problems` has found no problem.
    """
    states = _read_states(stored)
    levels = {name: _float32((0.0,) * 16, "meta") for name in LEVELS}  # one for each format
    return {
        n: _described_8bit(w) if w.format == "int8" else _described_4bit(w, states[n], levels)
        for n, w in stored.items()
    }


def _float32(values: float | tuple[float, ...], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _meta(entry: Entry, dtype: torch.dtype) -> Tensor:
    return torch.empty(entry.shape, dtype=dtype, device="meta")


def _described_8bit(weight: StoredWeight) -> Described:
    values, scale = weight.entries[""], weight.entries[".SCB"]
    record = Weight8bit(_meta(values, torch.int8), _meta(scale, torch.float32))
    return record, {id(record.values): values, id(record.scale): scale}


def _described_4bit(
    weight: StoredWeight, state: dict[str, Any], levels: Mapping[str, Tensor]
) -> Described:
    of, shape = weight.entries, tuple(state["shape"])
    packed = torch.empty(_packed_bytes(shape), dtype=torch.uint8, device="meta")
    code = levels[weight.format]
    sources: dict[int, Entry | Tensor] = {
        id(packed): of[""],
        id(code): _float32(LEVELS[weight.format]),
    }
    if "nested_offset" in state:
        absmax = NestedAbsmax(
            _meta(of[".absmax"], torch.uint8),
            _meta(of[".nested_absmax"], torch.float32),
            _meta(of[".nested_quant_map"], torch.float32),
            _float32(0.0, "meta"),
        )
        sources |= {id(absmax.values): of[".absmax"], id(absmax.scale): of[".nested_absmax"]}
        sources |= {id(absmax.code): of[".nested_quant_map"]}
        sources |= {id(absmax.offset): _float32(float(state["nested_offset"]))}
    else:
        absmax = _meta(of[".absmax"], torch.float32)
        sources[id(absmax)] = of[".absmax"]
    form = empty_form(shape, DENSE_DTYPES[state["dtype"]], "meta", state["blocksize"])
    return Weight4bit(packed, code, form, absmax), sources


def _read_parts(
    stored: Mapping[str, StoredWeight], device: torch.device | str
) -> dict[str, dict[str, Tensor]]:
    """Name -> part -> tensor, for all parts except quant_states. Opens each file once."""
    entries: dict[str, Entry] = {
        f"{name}\n{part}": entry
        for name, weight in stored.items()
        for part, entry in weight.entries.items()
        if not part.startswith(STATE_PREFIX)
    }
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in entry_tensors(entries, device=device):
        name, part = key.split("\n")
        tensors.setdefault(name, {})[part] = tensor
    return tensors


def _weight_4bit(parts: Mapping[str, Tensor], state: dict[str, Any], levels: Tensor) -> Weight4bit:
    shape, absmax = tuple(state["shape"]), parts[".absmax"]
    if "nested_offset" in state:
        offset = _float32(float(state["nested_offset"]), levels.device)
        code = parts[".nested_quant_map"]
        absmax = NestedAbsmax(absmax, parts[".nested_absmax"], code, offset)
    packed = parts[""].contiguous().flatten().view(torch.uint8)[: _packed_bytes(shape)]
    form = empty_form(shape, DENSE_DTYPES[state["dtype"]], levels.device, state["blocksize"])
    return Weight4bit(packed, levels, form, absmax)
