"""Weights in a file as bitsandbytes' integration in transformers writes them, in 4 and 8 bits.

Beside N.weight, which holds the bytes, in 4 bits: N.weight.absmax, .quant_map, .nested_absmax,
.nested_quant_map (the last two with double quantisation) and .quant_state.bitsandbytes__nf4 (or
__fp4), a JSON text in a tensor. In 8 bits: N.SCB, and N.weight_format, which says 0.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.checkpoints.tensors import Entry, entry_tensors, read_entries, unique_names
from fastlora.errors import raise_problems
from fastlora.models.config import LlamaConfig
from fastlora.models.names import LM_HEAD, projection_weights
from fastlora.ops.quant.bitsandbytes import bitsandbytes
from fastlora.ops.quant.weights import (
    LEVELS,
    NESTED_BLOCK,
    NestedAbsmax,
    Quantized,
    Weight4bit,
    Weight8bit,
    empty_form,
    quant_type,
)

_STATE = ".quant_state.bitsandbytes__"

_OF_4BIT = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")

_OF_8BIT = (".SCB", ".weight_format")

_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what bitsandbytes dequantises

_LARGEST = torch.finfo(torch.float32).max

_FORMS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# What packed bytes may be stored as: FSDP moves only tensors of one dtype.
_STORAGE = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}


def quantizable(config: LlamaConfig) -> list[str]:
    """Names of what may be quantised in a file: the projections, and the head."""
    return [*projection_weights(config), LM_HEAD]


def check_quantizable(config: LlamaConfig, dtypes: Iterable[torch.dtype]) -> None:
    """Refuse, before any work, what `quantize_4bit` does not do.

    Raises:
        ValueError: for a mixture of experts, or matrices in a dtype that bitsandbytes does not
            read.
        ModuleNotFoundError: without bitsandbytes.
    """
    problems = []
    if any(config.sparse_layers):
        problems.append(
            f"{config.model_type}: experts stay in 16 bits in this version, and are nearly all of"
            " a mixture; load it without load_in_4bit."
        )
    if wrong := sorted({str(d) for d in dtypes} - {str(d) for d in _FORMS.values()}):
        problems.append(f"{wrong}: bitsandbytes quantises {list(_FORMS)}; give one as dtype.")
    raise_problems(ValueError, "The base cannot be put into 4 bits:", problems)
    bitsandbytes()


class Stored(NamedTuple):
    """One quantised weight of a file."""

    entries: dict[str, Entry]  # "" is the weight's own; ".absmax", ... what stands beside it

    @property
    def kind(self) -> str:
        """ "nf4" or "fp4" (or what else a state's name says), "int8"; "mixed" is none."""
        states = [p.removeprefix(_STATE) for p in self.entries if p.startswith(_STATE)]
        of_8bit = [p for p in self.entries if p in _OF_8BIT]
        of_4bit = [p for p in self.entries if p in _OF_4BIT]
        if len(states) > 1 or (of_8bit and (states or of_4bit)):
            return "mixed"
        return "int8" if of_8bit else states[0] if states else "4 bits"

    @property
    def state(self) -> Entry | None:
        """The entry of its quant_state."""
        return next((e for p, e in self.entries.items() if p.startswith(_STATE)), None)


# ── reading ───────────────────────────────────────────────────────────────────────────────
def split_quantized(
    entries: Mapping[str, Entry],
) -> tuple[dict[str, Entry], dict[str, Stored]]:
    """(entries of dense tensors, name of a quantised weight -> what is stored of it)."""
    dense: dict[str, Entry] = {}
    found: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        weight, part = _owner(name)
        if part:
            found.setdefault(weight, {})[part] = entry
        else:
            dense[name] = entry
    for weight, parts in found.items():
        if weight in dense:
            parts[""] = dense.pop(weight)
    return dense, {weight: Stored(parts) for weight, parts in found.items()}


def _owner(name: str) -> tuple[str, str]:
    """(the weight that a tensor belongs to, which part of it); "" of a dense one."""
    for part in _OF_8BIT:
        if name.endswith(part):
            return f"{name.removesuffix(part).removesuffix('.weight')}.weight", part
    weight, state, kind = name.rpartition(_STATE)
    if state and weight.endswith(".weight"):
        return weight, f"{_STATE}{kind}"
    for part in _OF_4BIT:
        if name.endswith(f".weight{part}"):
            return name.removesuffix(part), part
    return name, ""


def read_quantized(
    stored: Mapping[str, Stored], *, device: torch.device | str
) -> dict[str, Quantized]:
    """Name -> record, of what `quantized_problems` finds nothing wrong with; on the CPU, views of
    the files."""
    states = _states(stored)
    if any(s.kind in LEVELS for s in stored.values()) and torch.device(device).type == "cpu":
        bitsandbytes()  # dequantises there
    flat = {
        f"{n}\n{p}": e
        for n, s in stored.items()
        for p, e in s.entries.items()
        if not p.startswith(_STATE)
    }
    read: dict[str, dict[str, Tensor]] = {}
    for key, tensor in entry_tensors(flat, device=device):
        name, part = key.split("\n")
        read.setdefault(name, {})[part] = tensor
    levels = {
        k: torch.tensor(LEVELS[k], device=device)
        for k in {s.kind for s in stored.values()} & {*LEVELS}
    }
    return {
        n: Weight8bit(read[n][""], read[n][".SCB"])
        if s.kind == "int8"
        else _weight_4bit(read[n], states[n], levels[s.kind])
        for n, s in stored.items()
    }


def _weight_4bit(read: Mapping[str, Tensor], state: dict[str, Any], levels: Tensor) -> Weight4bit:
    shape, absmax = tuple(state["shape"]), read[".absmax"]
    if "nested_offset" in state:
        offset = torch.tensor(float(state["nested_offset"]), device=levels.device)
        code = read[".nested_quant_map"]
        absmax = NestedAbsmax(absmax, read[".nested_absmax"], code, offset)
    packed = read[""].contiguous().flatten().view(torch.uint8)[: _bytes(shape)]
    form = empty_form(shape, _FORMS[state["dtype"]], levels.device, state["blocksize"])
    return Weight4bit(packed, levels, form, absmax)


def _bytes(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // 2)


def _states(stored: Mapping[str, Stored]) -> dict[str, Any]:
    """Name -> what its quant_state says; None where it is no JSON object."""
    entries = {n: s.state for n, s in stored.items() if s.state is not None}
    small = {n: e for n, e in entries.items() if e.dtype == "U8" and math.prod(e.shape) <= 4096}
    return dict.fromkeys(entries) | {n: _json(t) for n, t in read_entries(small).items()}


def _json(tensor: Tensor) -> dict[str, Any] | None:
    try:
        value = json.loads(tensor.numpy().tobytes(), object_pairs_hook=unique_names)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# ── checks ────────────────────────────────────────────────────────────────────────────────
def quantized_problems(
    stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What is wrong with a checkpoint's quantised weights; only headers and states are read.

    Args:
        stored: of `split_quantized`.
        expected: name -> shape, of the matrices that may be quantised.
    """
    states, maps, problems = _states(stored), _maps(stored), []
    for name, s in stored.items():
        if name not in expected:
            keys = [e.key for part, e in s.entries.items() if part]
            problems.append(f"unexpected  {keys[:5]}: only projections and head may be quantised")
            continue
        if s.kind == "int8":
            found = _problems_8bit(s, expected[name])
        elif s.kind in LEVELS:
            found = _problems_4bit(s, expected[name], states.get(name), maps.get(name))
        else:
            keys = [part[1:] for part in s.entries if part]
            found = [f"{s.kind}: expected the parts of nf4, fp4 or int8, found {keys}"]
        problems += [f"quantised   {name}: {problem}" for problem in found]
    return problems


def _maps(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    entries = {
        n: s.entries[".quant_map"]
        for n, s in stored.items()
        if ".quant_map" in s.entries and s.entries[".quant_map"].shape == (16,)
    }
    return read_entries(entries)


def _problems_8bit(s: Stored, shape: tuple[int, ...]) -> Iterator[str]:
    yield from _differences(s, {"": ("I8", shape), ".SCB": ("F32", shape[:1])})
    if ".weight_format" in s.entries:
        (value,) = read_entries({"": s.entries[".weight_format"]}).values()
        if value.numel() != 1 or value.item() != 0:
            yield "weight_format is not 0, rows in order; save it again with bitsandbytes >= 0.45"


def _problems_4bit(
    s: Stored, shape: tuple[int, ...], state: Any, levels: Tensor | None
) -> Iterator[str]:
    if state is None:
        yield f"{_STATE[1:]}{s.kind} is no JSON object in U8"
        return
    if problem := _state_problem(state, s.kind, shape):
        yield problem
        return
    blocks = -(-math.prod(shape) // state["blocksize"])
    nested = "nested_offset" in state
    wanted = {".absmax": ("U8" if nested else "F32", (blocks,)), ".quant_map": ("F32", (16,))}
    if nested:
        groups = -(-blocks // NESTED_BLOCK)
        wanted |= {".nested_absmax": ("F32", (groups,)), ".nested_quant_map": ("F32", (256,))}
    yield from _differences(s, wanted)
    if strange := [p[1:] for p in s.entries if p in _OF_4BIT and p not in wanted]:
        yield f"{strange} are there, but the state has no nested_offset"
    yield from _packed_problem(s, shape)
    if levels is not None and not torch.equal(levels, torch.tensor(LEVELS[s.kind])):
        yield f"quant_map is not {s.kind}'s, which is all that bitsandbytes reads"


def _state_problem(state: dict[str, Any], kind: str, shape: tuple[int, ...]) -> str | None:
    """A value of another type is never equal: 64.0 == 64 is, and is no size."""
    rules: dict[str, tuple[Any, ...]] = {
        "quant_type": (kind,),
        "blocksize": _BLOCKS,
        "dtype": tuple(_FORMS),
        "shape": (list(shape),),
    }
    if "nested_offset" in state:
        rules |= {"nested_blocksize": (NESTED_BLOCK,), "nested_dtype": ("float32",)}
        offset = state["nested_offset"]
        if type(offset) not in (int, float) or not -_LARGEST <= offset <= _LARGEST:
            return f"nested_offset={offset!r:.80}; expected a number in float32"
    for key, allowed in rules.items():
        value = state.get(key)
        if repr(value) not in map(repr, allowed):
            return f"{key}={value!r:.80}; expected one of {list(allowed)}"
    return None


def _packed_problem(s: Stored, shape: tuple[int, ...]) -> Iterator[str]:
    """Packed bytes may be of any dtype, whose last element may be filled up."""
    if "" not in s.entries:
        yield "missing, though its statistics are there"
        return
    entry, needed = s.entries[""], _bytes(shape)
    size = _STORAGE.get(entry.dtype, 0)
    if not size or not needed <= math.prod(entry.shape) * size < needed + size:
        yield f"file has {entry.dtype} {entry.shape}; expected {needed:,} bytes for {shape}"


def _differences(s: Stored, wanted: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[str]:
    for part, (dtype, shape) in wanted.items():
        entry, what = s.entries.get(part), part[1:] or "weight"
        if entry is None:
            yield f"{what} is missing; expected {dtype} {shape}"
        elif (entry.dtype, entry.shape) != (dtype, shape):
            yield f"{what}: file has {entry.dtype} {entry.shape}; expected {dtype} {shape}"


# ── writing ───────────────────────────────────────────────────────────────────────────────
def stored_tensors(name: str, weight: Weight4bit) -> dict[str, Tensor]:
    """Key -> tensor, as transformers writes a weight in 4 bits."""
    rows, columns, block, _ = weight.form.shape
    kind = quant_type(weight)
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": block,
        "dtype": str(weight.form.dtype).removeprefix("torch."),
        "shape": [rows, columns],
    }
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
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors | {f"{name}{_STATE}{kind}": text}


# Of config.json, as BitsAndBytesConfig writes it (transformers 5.23).
QUANTIZATION_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "uint8",
}
