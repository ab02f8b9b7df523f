"""input_checks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fastlora.errors import raise_problems
from fastlora.models.params import Adapter
from fastlora.models.spec import Spec, is_recompute
from fastlora.models.state import Batch, ModelState
from fastlora.ops.dispatch import kernel_problem, transforms_active
from fastlora.ops.loss.linear_cross_entropy import IGNORE


# ── checks ────────────────────────────────────────────────────────────────────────────────
def spec_problems(changed: dict[str, Any], device: torch.device) -> list[str]:
    """What is wrong with new values of recompute, compile, kernels and deterministic."""
    impossible = kernel_problem(device) if changed.get("kernels") == "triton" else None
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "recompute": (is_recompute, '"none", "selective", "full", "offload" or a number in [0, 1]'),
        "compile": (lambda x: x == "auto" or isinstance(x, bool), '"auto", True or False'),
        "kernels": (lambda x: x in ("auto", "torch", "triton"), '"auto", "torch" or "triton"'),
        "deterministic": (lambda x: isinstance(x, bool), "True or False"),
    }
    return [
        f"{name} must be {rules[name][1]}, got {value!r}"
        for name, value in changed.items()
        if not rules[name][0](value)
    ] + ([impossible] if impossible else [])


def check_adapter(old: Adapter | None, new: Adapter) -> None:
    if old is None:
        raise ValueError(
            "this model has no LoRA spec; call fastlora.lora or fastlora.load_adapter."
        )
    old_leaves, old_structure = tree_flatten(old)
    new_leaves, new_structure = tree_flatten(new)
    if old_structure != new_structure:
        raise ValueError("with_adapter got a tree of another structure than model.adapter.")
    shapes = [
        f"leaf {i}: {tuple(n.shape)} {n.dtype}, expected {tuple(o.shape)} of a floating-point dtype"
        for i, (o, n) in enumerate(zip(old_leaves, new_leaves, strict=True))
        if n.shape != o.shape or not n.is_floating_point()
    ]
    raise_problems(ValueError, "with_adapter got tensors that do not fit model.adapter:", shapes)


def check_inputs(model: ModelState, inputs: dict[str, Tensor | None]) -> None:
    """Shapes, dtypes, length and range of the [b, t] integer inputs of a forward pass."""
    ids = inputs["input_ids"]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
        got = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids must be a non-empty int64 tensor [b, t], got {got}.")
    problems = [
        f"{name} must be an integer tensor {list(ids.shape)}, got {list(x.shape)} {x.dtype}"
        for name, x in inputs.items()
        if x is not None
        and (
            x.is_floating_point() or (x.shape != ids.shape and not _shared_positions(name, x, ids))
        )
    ]
    if ids.shape[1] > (longest := model.spec.max_seq_length):
        problems.append(
            f"input_ids has {ids.shape[1]} tokens a row; max_seq_length is {longest}. "
            "Load with a larger max_seq_length, or shorten the input: nothing is cut off in silence"
        )
    if (device := model.base["norm"].device) != ids.device:
        problems.append(f"input_ids is on {ids.device}, the model on {device}; move one of them")
    else:
        problems += _range_problems(model, inputs)
    raise_problems(ValueError, "the model cannot run this input:", problems)


def _shared_positions(name: str, x: Tensor, ids: Tensor) -> bool:
    return name == "position_ids" and x.shape == (1, ids.shape[1])


def _range_problems(model: ModelState, inputs: dict[str, Tensor | None]) -> list[str]:
    """Values that cannot be. Looks at them, so on CUDA it waits for the device."""
    if transforms_active() or torch.compiler.is_compiling():
        return []  # values are not to be looked at there
    v = model.spec.config.vocab_size
    rules: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
        "input_ids": (lambda x: (x < 0) | (x >= v), f"ids of the vocabulary [0, {v})"),
        "labels": (
            lambda x: ((x < 0) | (x >= v)) & (x != IGNORE),
            f"ids of the vocabulary [0, {v}), or {IGNORE}",
        ),
        "attention_mask": (lambda x: (x != 0) & (x != 1), "0 and 1"),
        "position_ids": (lambda x: x < 0, "0 or more"),
    }
    problems = []
    for name, (is_wrong, expected) in rules.items():
        if (x := inputs.get(name)) is not None and bool((wrong := is_wrong(x)).any()):
            values = sorted(set(x[wrong].tolist()))[:5]
            problems.append(f"{name} holds {values}; expected {expected}")
    return problems


def check_batch(model: ModelState, batch: Batch) -> None:
    optional = ("attention_mask", "position_ids", "segment_ids")
    known = {"input_ids", "labels", *optional}
    problems = [f"missing {name}" for name in ("input_ids", "labels") if name not in batch]
    problems += [f"unknown entry {name!r}" for name in sorted(set(batch) - known)]
    raise_problems(ValueError, f"a batch is a dict of {sorted(known)}:", problems)
    check_inputs(model, {k: batch.get(k) for k in ("input_ids", "labels", *optional)})


def batches_problems(spec: Spec, batches: Sequence[Any], method: str) -> list[str]:
    if not batches:
        return ["batches is empty: expected at least one dict with input_ids."]
    problems = []
    for i, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            problems.append(
                f"batches[{i}] is a {type(batch).__name__}; expected a dict of tensors."
            )
        else:
            problems += [f"batches[{i}]: {p}" for p in _one_batch_problems(spec, batch, method)]
    return problems


_ENTRIES = ("input_ids", "labels", "attention_mask", "position_ids", "segment_ids")


def _one_batch_problems(spec: Spec, batch: Mapping[str, Any], method: str) -> list[str]:
    needed = ("input_ids", "labels") if method == "lora_ga" else ("input_ids",)
    problems = [f"missing {name}" for name in needed if name not in batch]
    problems += [f"unknown entry {name!r}" for name in sorted(batch.keys() - set(_ENTRIES))]
    if problems:
        return problems
    ids = batch["input_ids"]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
        return ["input_ids must be a non-empty int64 tensor [b, t]"]
    shapes = (tuple(ids.shape), (1, ids.shape[1]))
    problems = [
        f"{name} must be an integer tensor {list(ids.shape)}"
        for name, x in batch.items()
        if not isinstance(x, Tensor)
        or x.is_floating_point()
        or tuple(x.shape) not in shapes[: 1 + (name == "position_ids")]
    ]
    if ids.shape[1] > spec.max_seq_length:
        problems.append(f"{ids.shape[1]} tokens a row; max_seq_length is {spec.max_seq_length}")
    if "attention_mask" in batch and not problems and not batch["attention_mask"].any():
        problems.append("attention_mask has no real token")
    if int(ids.min()) < 0 or int(ids.max()) >= spec.config.vocab_size:
        problems.append(f"ids outside the vocabulary [0, {spec.config.vocab_size})")
    return problems
