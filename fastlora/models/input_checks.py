"""Checks of models, specs and batches, for every function that takes them.

Classes, names, shapes and dtypes are checked everywhere, by `check_call` in functional.py and by
`input_problems` elsewhere: this takes microseconds and works under torch.func and torch.compile.
`input_problems` also checks device, length and values. Looking at values waits for the GPU.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fastlora.arguments import FLAG, Rule, argument_problems, describe, instance, one_of
from fastlora.errors import raise_problems
from fastlora.models.examples import number_of_examples
from fastlora.models.params import Adapter
from fastlora.models.record_checks import record_problems
from fastlora.models.spec import Spec, is_recompute
from fastlora.models.stacks import runs_in_groups, stack_size
from fastlora.models.state import ModelState
from fastlora.ops.dispatch import kernel_problem, transforms_active
from fastlora.ops.loss.ignore import IGNORE
from fastlora.runtime.per_example import PerExample

MODEL = instance(
    ModelState,
    "a fastlora.Model (fastlora.load returns a pair: write"
    " `model, tokenizer = fastlora.load(...)` and pass model)",
)

# The choices of a spec that `Model.with_spec` changes.
SPEC_CHOICES = {
    "recompute": Rule(is_recompute, '"none", "selective", "full", "offload" or a number in [0, 1]'),
    "compile": Rule(
        lambda x: type(x) is bool or (type(x) is str and x == "auto"), '"auto", True or False'
    ),
    "kernels": one_of("auto", "torch", "triton"),
    "deterministic": FLAG,
}

# Entries of a batch, all of shape [b, t]. position_ids may be [1, t], shared by all rows.
BATCH_ENTRIES = ("input_ids", "labels", "attention_mask", "position_ids", "segment_ids")


def spec_problems(changed: Mapping[str, Any], device: torch.device) -> list[str]:
    """Problems with new values of recompute, compile, kernels and deterministic."""
    problems = argument_problems({name: (x, SPEC_CHOICES[name]) for name, x in changed.items()})
    asks_for_triton = changed.get("kernels") == "triton"
    if asks_for_triton and (impossible := kernel_problem(device)):
        problems.append(impossible)
    return problems


def check_adapter(old: Adapter | None, new: Any) -> None:
    """Check that `new` can take the place of a model's adapter.

    Raises:
        ValueError: the model has no adapter, or a tree, shape or dtype differs.
    """
    if old is None:
        raise ValueError(
            "this model has no LoRA spec; call fastlora.lora or fastlora.load_adapter."
        )
    # The structure includes the class of each record, so LoRA does not replace DoRA.
    old_leaves, old_structure = tree_flatten(old)
    new_leaves, new_structure = tree_flatten(new)
    if old_structure != new_structure:
        raise ValueError(
            f"adapter={_shown(new)}: with_adapter needs a tree of the same structure as"
            " model.adapter."
        )
    shapes = [
        f"leaf {i}: {_shown(n)}, expected {tuple(o.shape)} of a floating-point dtype"
        for i, (o, n) in enumerate(zip(old_leaves, new_leaves, strict=True))
        if not isinstance(n, Tensor) or n.shape != o.shape or not n.is_floating_point()
    ]
    raise_problems(ValueError, "with_adapter got tensors that do not fit model.adapter:", shapes)


def check_inputs(model: ModelState, inputs: Mapping[str, Any], more: Sequence[str] = ()) -> None:
    """Check the integer inputs of a forward pass, by name; None means that one is not given.

    Args:
        model: the model.
        inputs: input_ids and, if not None, other BATCH_ENTRIES; or those of `prepared_inputs`.
        more: problems that the caller found; they are listed first.

    Raises:
        ValueError: listing every wrong class, shape, dtype, device, length and value.
    """
    integers = {name: x for name, x in inputs.items() if name in BATCH_ENTRIES}
    given = "inputs_embeds" if "inputs_embeds" in inputs else "input_ids"
    problems = [*more, *input_problems(model.spec, integers, model.base["norm"].device, given)]
    raise_problems(ValueError, "the model cannot run this input:", problems)


def check_batch(model: ModelState, batch: Any) -> None:
    """Check a batch for a loss: its entries, and then as `check_inputs`.

    Raises:
        ValueError: as `check_inputs`, and for missing or unknown entries.
    """
    raise_problems(
        ValueError, f"a batch is a dict of {sorted(BATCH_ENTRIES)}:", entry_problems(batch)
    )
    check_inputs(model, batch)


def batches_problems(spec: Spec, batches: Sequence[Any], needed: tuple[str, ...]) -> list[str]:
    """Problems with batches of data, each of which needs these entries and a real token."""
    if not batches:
        return ["batches is empty: expected at least one dict with input_ids."]
    problems = []
    for i, batch in enumerate(batches):
        wrong = entry_problems(batch, needed) or input_problems(spec, batch)
        # The statistics divide by the number of real tokens.
        if not wrong and (mask := batch.get("attention_mask")) is not None and not mask.any():
            wrong = ["attention_mask has no real token"]
        problems += [f"batches[{i}]: {problem}" for problem in wrong]
    return problems


def entry_problems(
    batch: Any, needed: tuple[str, ...] = ("input_ids", "labels"), name: str = "batch"
) -> list[str]:
    """Problems with the names of a batch's entries."""
    if not isinstance(batch, Mapping):
        return [f"{name}={_shown(batch)}: expected a dict of tensors, {', '.join(needed)}, ..."]
    problems = [f"missing {entry}" for entry in needed if batch.get(entry) is None]
    unknown = [entry for entry in batch if entry not in BATCH_ENTRIES]
    return problems + [f"unknown entry {entry!r}" for entry in unknown]


def input_problems(
    spec: Spec,
    inputs: Mapping[str, Any],
    device: torch.device | None = None,
    given: str = "input_ids",
) -> list[str]:
    """Problems with the inputs of a forward pass, by name.

    Args:
        spec: the model's.
        inputs: "input_ids" and, if they are not None, other BATCH_ENTRIES.
        device: the model's; None: inputs on any device are accepted.
        given: the caller's argument that has the tokens.
    """
    problems = tensor_problems(inputs)
    has_wrong_tensors, ids = bool(problems), inputs["input_ids"]
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return problems
    if ids.shape[1] > (longest := spec.max_seq_length):
        problems.append(
            f"{given} has {ids.shape[1]} tokens a row; max_seq_length is {longest}. "
            "Load with a larger max_seq_length, or shorten the input: nothing is cut off in silence"
        )
    # Comparisons of values across devices would raise torch's own error, without the cure.
    if device is not None and device != ids.device:
        problems.append(f"input_ids is on {ids.device}, the model on {device}; move one of them")
        return problems
    return problems if has_wrong_tensors else problems + _value_problems(spec, inputs)


def tensor_problems(inputs: Mapping[str, Any]) -> list[str]:
    """Problems with classes, shapes and dtypes of the inputs of a forward pass. Reads no values."""
    ids = inputs["input_ids"]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
        return [f"input_ids must be a non-empty int64 tensor [b, t], got {_shown(ids)}."]
    problems = []
    for name, x in inputs.items():
        if name == "input_ids" or (x is None and name != "labels"):
            continue
        if not isinstance(x, Tensor) or _is_not_integer(x) or not _fits(name, x, ids):
            expected = list(ids.shape)
            problems.append(f"{name} must be an integer tensor {expected}, got {_shown(x)}")
    return problems


def _is_not_integer(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _fits(name: str, x: Tensor, ids: Tensor) -> bool:
    """Whether an input has the shape of input_ids; position_ids may be one row for all."""
    return x.shape == ids.shape or (name == "position_ids" and x.shape == (1, ids.shape[1]))


def _value_problems(spec: Spec, inputs: Mapping[str, Tensor | None]) -> list[str]:
    """Values out of range. On CUDA this waits for the device."""
    # Tensors have no values under a transform or while torch.compile traces.
    if transforms_active() or torch.compiler.is_compiling():
        return []
    v = spec.config.vocab_size
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


def check_call(
    function: str,
    adapter: Any,
    base: Any,
    spec: Any,
    inputs: Mapping[str, Any],
    seed: Any = None,
    adapter_ids: Any = None,
    more: Sequence[str] = (),
) -> None:
    """Check the arguments of a pure function of (adapter, base, spec, inputs). Reads no values.

    Args:
        function: its name, for the error.
        adapter: expected: None, an adapter tree, or what value_and_grad(per_example=...) passes.
        base: expected: a base tree.
        spec: expected: a Spec.
        inputs: tensors by name; see `tensor_problems`. Names that no batch has are passed over.
        seed: expected: None, an int in [0, 2**63), or an integer tensor without dimensions; for a
            stack also one of an element for each adapter.
        adapter_ids: expected: None, or an integer tensor that says which adapter of a stack each
            row [b] or each token [b, t] has.
        more: problems that the caller found.

    Raises:
        ValueError: listing every argument that is wrong.
    """
    examples = adapter if isinstance(adapter, PerExample) else None
    adapter = adapter if examples is None else examples.tree
    integers = {name: x for name, x in inputs.items() if name in BATCH_ENTRIES}
    problems = [*_tree_problems(adapter, base, spec), *more, *tensor_problems(integers)]
    if adapter is not None and not problems:
        problems += autocast_problems(base)
    n = None if problems else stack_size(adapter)
    if n is not None and examples is not None:
        problems.append("per_example needs one adapter, and this is a stack; FL.unstack it")
    if not _is_seed(seed, n):
        problems.append(
            f"seed={_shown(seed)}: expected None, a whole number in [0, 2**63), or an integer"
            " tensor without dimensions" + ("" if n is None else f", or one of {n}, for the stack")
        )
    if examples is not None and not problems:
        n = number_of_examples(examples, adapter_ids, inputs["input_ids"])
    if not problems and (adapter_ids is not None or n is not None):
        problems = _adapter_id_problems(adapter, base, spec, n, adapter_ids, inputs, seed)
    raise_problems(ValueError, f"{function} cannot use these arguments:", problems)


def autocast_problems(base: Any) -> list[str]:
    """Problems with a torch.autocast around this call: it must have the dtype of the base.

    autocast casts only some of our products, so operands would differ in dtype. It never casts
    float64. The check takes a microsecond and works in compiled code.
    """
    device, of_base = base["norm"].device.type, base["norm"].dtype
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return []
    if (dtype := torch.get_autocast_dtype(device)) == of_base or of_base == torch.float64:
        return []
    return [
        f"torch.autocast to {dtype} is on, and the base has {of_base}. Leave out autocast, which"
        ' fastlora does not need; for computation in 16 bits, fastlora.load(..., dtype="bfloat16")'
    ]


def _is_seed(seed: Any, n: int | None) -> bool:
    # Under torch.func.vmap over seeds, each is a tensor without dimensions too.
    if isinstance(seed, Tensor):
        return not _is_not_integer(seed) and (seed.dim() == 0 or seed.shape == (n,))
    # Not RANDOM_SEED.accepts: under torch.compile an int may be a symbol.
    is_int = isinstance(seed, int | torch.SymInt) and not isinstance(seed, bool)
    return seed is None or (is_int and 0 <= seed < 2**63)


def _adapter_id_problems(
    adapter: Any,
    base: Any,
    spec: Any,
    n: int | None,
    adapter_ids: Any,
    inputs: Mapping[str, Any],
    seed: Any,
) -> list[str]:
    """Problems with adapter_ids, or with the rows of a stack of n adapters without them."""
    b, t = inputs["input_ids"].shape
    if adapter is None:
        return ["adapter_ids is given, but adapter is None; pass a stack of adapters"]
    if n is None:
        return ["adapter_ids is given, but adapter is not a stack; functional.stack makes one"]
    if adapter_ids is None:
        if b % n == 0:
            return []
        return [f"{b} rows cannot be shared equally by a stack of {n} adapters; pass adapter_ids"]
    is_tensor = isinstance(adapter_ids, Tensor) and not _is_not_integer(adapter_ids)
    if not is_tensor or adapter_ids.shape not in ((b,), (b, t)):
        expected = f"an integer tensor [{b}], one number for each row, or [{b}, {t}]"
        return [f"adapter_ids must be {expected}, got {_shown(adapter_ids)}"]
    wrong = _token_id_problems(adapter, base, spec, seed) if adapter_ids.dim() == 2 else []
    readable = adapter_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not transforms_active() and ((adapter_ids < 0) | (adapter_ids >= n)).any():
        wrong.append(f"adapter_ids must be in [0, {n}), got {adapter_ids.unique().tolist()[:9]}")
    return wrong


def _token_id_problems(adapter: Any, base: Any, spec: Any, seed: Any) -> list[str]:
    given, problems = "adapter_ids has a number for each token", []
    if not runs_in_groups(adapter, base, spec):
        problems.append(
            f"{given}, which works for LoRA in the layers alone; pass one number for each row"
        )
    if isinstance(seed, Tensor) and seed.dim() == 1:
        problems.append(f"{given}, and seed one for each adapter; pass one seed")
    return problems


def _tree_problems(adapter: Any, base: Any, spec: Any) -> list[str]:
    problems = []
    if adapter is not None and not (isinstance(adapter, dict) and "layers" in adapter):
        problems.append(f"adapter={_shown(adapter)}: expected model.adapter, or None for the base")
    if not (isinstance(base, dict) and "layers" in base and "embed_tokens" in base):
        problems.append(f"base={_shown(base)}: expected model.base")
    if not isinstance(spec, Spec):
        problems.append(f"spec={_shown(spec)}: expected model.spec")
    # Shapes of the base are not compared: a walk over all tensors would slow down every step.
    if problems:
        return problems
    layers = spec.config.num_hidden_layers
    for name, tree in (("adapter", adapter), ("base", base)):
        if tree is not None and len(tree["layers"]) != layers:
            problems.append(f"{name} has {len(tree['layers'])} layers, but spec says {layers}")
    return problems if problems or adapter is None else record_problems(adapter, spec)


def _shown(x: Any) -> str:
    """Describe an argument without the values of its tensors."""
    if isinstance(x, Tensor):
        return f"a tensor {list(x.shape)} {x.dtype}"
    return f"a dict with keys {[*x][:6]}" if isinstance(x, dict) else describe(x)
