"""Checks of capture, add and inputs_embeds, for every function that takes them. Reads no values."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.arguments import Rule, argument_problems, describe
from fastlora.models.capture import INSIDE, Taps, place_names
from fastlora.models.each_row import Inputs
from fastlora.models.input_checks import check_call
from fastlora.models.spec import Spec
from fastlora.models.state import ModelState

_ADD = "add:"  # before a place's name, in the inputs that run row by row


def prepared_inputs(
    base: Any,
    spec: Any,
    inputs: Mapping[str, Any],
    capture: Any = None,
    add: Any = None,
    inputs_embeds: Any = None,
) -> tuple[Inputs, list[str]]:
    """(inputs of a forward pass with the tensors of `add` and `inputs_embeds`, problems).

    All tensors of the result have b rows or one row. Without input_ids the result has zeros in
    their place, of which the model reads the shape only.

    Args:
        base: a base tree.
        spec: a Spec. If it or `base` is something else, nothing is checked here.
        inputs: the integer inputs of the forward pass, by name.
        capture: expected: None or a list or tuple of names of places.
        add: expected: None or a dict, name of a place -> floating-point tensor that broadcasts to
            [b, t, d].
        inputs_embeds: expected: None or a floating-point tensor [b, t, d]; then input_ids is None.
    """
    made = dict(inputs)
    if capture is None and add is None and inputs_embeds is None:
        return made, []
    if not isinstance(spec, Spec) or not isinstance(base, dict) or "norm" not in base:
        return made, []
    d, device = spec.config.hidden_size, base["norm"].device
    problems = [] if capture is None else _capture_problems(spec, capture)
    if inputs_embeds is not None:
        problems += _embeds_problems(inputs.get("input_ids"), inputs_embeds, d, device)
        made["inputs_embeds"] = inputs_embeds
        if inputs.get("input_ids") is None:
            shape = _shape(inputs_embeds, inputs)
            made["input_ids"] = torch.zeros(shape, dtype=torch.int64, device=device)
    if add is not None:
        problems += _add_problems(spec, add, made.get("input_ids"), device)
    if problems:
        return {name: x for name, x in made.items() if name != "inputs_embeds"}, problems
    return made | {_ADD + name: _three_dims(x) for name, x in (add or {}).items()}, []


def checked_inputs(
    function: str,
    model: tuple[Any, Any, Any],
    inputs: Mapping[str, Any],
    seed: Any,
    adapter_ids: Any,
    capture: Any = None,
    add: Any = None,
    inputs_embeds: Any = None,
    **more: tuple[Any, Rule],
) -> Inputs:
    """`prepared_inputs`, after a check of all arguments of a pure function. Reads no values.

    Args:
        function: its name, for the error.
        model: adapter, base and spec.
        inputs: as `prepared_inputs`.
        seed: as `check_call`.
        adapter_ids: as `check_call`.
        capture: as `prepared_inputs`.
        add: as `prepared_inputs`.
        inputs_embeds: as `prepared_inputs`.
        more: other arguments, each with its rule.

    Raises:
        ValueError: listing every argument that is wrong.
    """
    made, problems = prepared_inputs(*model[1:], inputs, capture, add, inputs_embeds)
    problems += argument_problems(more)
    check_call(function, *model, made, seed, adapter_ids, problems)
    return made


def needed_entries(inputs_embeds: Any) -> tuple[str, ...]:
    """The entries that a batch for a loss must have."""
    return ("input_ids", "labels") if inputs_embeds is None else ("labels",)


def taps_of(inputs: Inputs, capture: Collection[str] | None) -> tuple[Taps, dict[str, Any]]:
    """(what a forward pass captures and adds, the decoder's inputs), from `prepared_inputs`."""
    given = {name: x for name, x in inputs.items() if x is not None and name != "labels"}
    add = {k.removeprefix(_ADD): x for k, x in given.items() if k.startswith(_ADD)}
    return Taps(capture or (), add), {k: x for k, x in given.items() if not k.startswith(_ADD)}


def constant_problems(model: ModelState, add: Any) -> list[str]:
    """Problems with the `add` of generation: vectors [d], for all rows and positions."""
    if add is None:
        return []
    spec, device = model.spec, model.base["norm"].device
    if problems := _add_problems(spec, add, None, device):
        return problems
    for name, x in add.items():
        if any(n != 1 for n in x.shape[:-1]):
            problems.append(
                f"add[{name!r}] has the shape {list(x.shape)}: generation adds one vector"
                f" [{spec.config.hidden_size}] to all rows and positions; functional.forward also"
                " adds tensors that differ between them"
            )
        elif not x.isfinite().all():
            problems.append(f"add[{name!r}] holds NaN or infinity")
    return problems


def _three_dims(x: Float[Tensor, "..."]) -> Float[Tensor, "_ _ _"]:
    return x[(None,) * (3 - x.dim())]


def _shape(inputs_embeds: Any, inputs: Mapping[str, Any]) -> Sequence[int]:
    """[b, t] of an input without ids; that of the labels if inputs_embeds has no such shape."""
    candidates = [inputs_embeds, inputs.get("labels"), *inputs.values()]
    fits = lambda x, dims: isinstance(x, Tensor) and x.dim() == dims and x.numel() > 0
    shapes = [x.shape[:2] for x in candidates if fits(x, 3 if x is inputs_embeds else 2)]
    return shapes[0] if shapes else (1, 1)


def _capture_problems(spec: Spec, capture: Any) -> list[str]:
    if isinstance(capture, str) or not isinstance(capture, list | tuple):
        return [f"capture={describe(capture)}: expected a list or tuple of names of places"]
    return _name_problems(spec, "capture", capture)


def _name_problems(spec: Spec, argument: str, names: Collection[Any]) -> list[str]:
    layers = spec.config.num_hidden_layers
    valid = set(place_names(layers))
    wrong = [describe(x) for x in names if not isinstance(x, str) or x not in valid]
    if not wrong:
        return []
    each = ", ".join(f"layers.I.{x}" for x in ("in", *INSIDE, "out"))
    return [
        f"{argument} has no place {', '.join(wrong)}; expected embed, {each}"
        f" with I from 0 to {layers - 1}, or norm"
    ]


def _embeds_problems(input_ids: Any, embeds: Any, d: int, device: torch.device) -> list[str]:
    problems = []
    if input_ids is not None:
        problems.append("input_ids and inputs_embeds are both given; pass one of them")
    is_float = isinstance(embeds, Tensor) and embeds.is_floating_point()
    if not is_float or embeds.dim() != 3 or embeds.shape[2] != d or not embeds.numel():
        expected = f"a non-empty floating-point tensor [b, t, {d}]"
        problems.append(f"inputs_embeds must be {expected}, got {describe(embeds)}")
    elif embeds.device != device:
        problems.append(f"inputs_embeds is on {embeds.device}, the model on {device}")
    return problems


def _add_problems(spec: Spec, add: Any, input_ids: Any, device: torch.device) -> list[str]:
    """Problems with `add`. If input_ids is not a tensor [b, t], b and t may be any numbers."""
    if not isinstance(add, dict):
        return [f"add={describe(add)}: expected a dict, name of a place -> tensor"]
    problems, d = _name_problems(spec, "add", add), spec.config.hidden_size
    known = isinstance(input_ids, Tensor) and input_ids.dim() == 2
    target = [*input_ids.shape, d] if known else ["b", "t", d]
    for name, x in add.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            problems.append(f"add[{name!r}] must be a floating-point tensor, got {describe(x)}")
        elif not _broadcasts(x, target):
            shown = ", ".join(map(str, target))
            problems.append(f"add[{name!r}] must broadcast to [{shown}], got {describe(x)}")
        elif x.device != device:
            problems.append(f"add[{name!r}] is on {x.device}, the model on {device}")
    return problems


def _broadcasts(x: Tensor, target: Sequence[int | str]) -> bool:
    """Whether x broadcasts to a shape, in which texts are any numbers."""
    pairs = zip(reversed(x.shape), reversed(target), strict=False)
    return x.dim() <= len(target) and all(n in (1, m) or isinstance(m, str) for n, m in pairs)
