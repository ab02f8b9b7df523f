"""stack and unstack: several models over one base as one tree of adapters, and back."""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlora.arguments import describe
from fastlora.errors import raise_problems
from fastlora.models.init_offset import has_offset
from fastlora.models.params import TARGETS, Adapter, ExpertLoRA, LoRA
from fastlora.models.spec import LoraConfig, Spec, Target
from fastlora.models.stacks import stack_size
from fastlora.models.state import ModelState, require_adapter
from fastlora.ops.dispatch import transforms_active


def stack(models: Sequence[ModelState]) -> tuple[Adapter, Spec]:
    """(one adapter tree whose leaves are [n, ...], the spec to run it with).

    The tensors are copies, through which gradients flow. Ranks are filled up with zeros, and a
    projection that only other models adapt gets zeros. These zeros stay exactly zero in training:
    the gradient of a padded row of A is a product with the padded column of B, which is zero, and
    the other way round. Scalings may differ: the spec carries those of each model.

    Args:
        models: models with LoRA in the decoder layers over the same base tensors. Their specs are
            equal except for the adapters' ranks, alphas, rank-stabilised scalings and targets.

    Raises:
        ValueError: there is no model; one has no adapter; models have different bases, dropout or
            ways to run; an adapter has DoRA, lora_bias, adapted or copied embeddings,
            heads or other tensors, trained rows, fake quantisation or an initial offset. Lists all
            problems.
    """
    raise_problems(ValueError, "these models cannot be stacked:", stack_problems(models))
    parts = [require_adapter(model) for model in models]
    leaves = [x for _, tree in parts for x in tree_leaves(tree)]
    dtype = reduce(torch.promote_types, (x.dtype for x in leaves))
    layers, targets, factors = [], [], []
    for i in range(len(parts[0][1]["layers"])):
        own = [{t.name: t for t in lora.targets[i]} for lora, _ in parts]
        names = [name for name in TARGETS if any(name in mine for mine in own)]
        layers.append(
            {n: _stacked([tree["layers"][i].get(n) for _, tree in parts], dtype) for n in names}
        )
        each = [_target([mine.get(name) for mine in own]) for name in names]
        targets.append(tuple(target for target, _ in each))
        factors.append(tuple((t.name, f) for t, f in each if f is not None))
    spec = models[0].spec
    r = max((t.r for layer in targets for t in layer), default=1)
    lora = replace(parts[0][0], r=r, targets=tuple(targets))
    spec = replace(spec, lora=lora, stack_factors=tuple(factors) if any(factors) else ())
    return Adapter(layers=tuple(layers)), spec


def unstack(stack: Adapter, models: Sequence[ModelState]) -> list[Adapter]:
    """The adapters of a stack, each with the ranks, targets and dtypes of its model.

    The tensors are copies, so that the stack's memory can be freed. Gradients flow through them.

    Args:
        stack: the first result of `stack`, or a tree of the same shapes, such as gradients.
        models: those that were given to `stack`, in the same order.

    Raises:
        ValueError: an argument is of another class, the stack has another number of adapters than
            there are models, or a model's targets, ranks or layers are not those of its adapter
            in the stack. Beyond a model's rank the stack's values must be zero, which is not
            checked under a torch.func transform.
    """
    problems = _list_problems(models)
    is_tree = isinstance(stack, dict) and "layers" in stack
    if not is_tree or stack_size(stack) is None:
        problems.append(f"stack={_shown(stack)}: expected a result of functional.stack")
    elif not problems and stack_size(stack) != len(models):
        problems.append(f"stack: got {len(models)} models for a stack of {stack_size(stack)}")
    if not problems:
        problems = [x for i, model in enumerate(models) for x in _unlike(stack, i, model)]
    raise_problems(ValueError, "functional.unstack cannot use these arguments:", problems)
    return [_unstacked(stack, i, model) for i, model in enumerate(models)]


def _shown(tree: Any) -> str:
    """Describe an argument without the values of its tensors."""
    is_tree = isinstance(tree, dict | list | tuple | Tensor)
    return f"a {type(tree).__name__} that is no stack" if is_tree else describe(tree)


def _unlike(stack: Adapter, i: int, model: ModelState) -> list[str]:
    """Why adapter i of a stack is not that of a model: the first difference."""
    if model.adapter is None:
        return [f"model {i} has no adapter"]
    layers = model.adapter["layers"]
    if len(layers) != len(stack["layers"]):
        return [f"model {i} has {len(layers)} layers, the stack {len(stack['layers'])}"]
    for number, (records, own) in enumerate(zip(stack["layers"], layers, strict=True)):
        for name in records | own:
            if reason := _record_difference(records.get(name), own.get(name), i):
                cure = "; give the models in the order in which they were stacked"
                return [f"model {i} {reason} {name} of layer {number}{cure}"]
    return []


def _record_difference(record: Any, own: Any, i: int) -> str:
    """How adapter i of a stacked record differs from a model's record; "" if it does not."""
    if record is None:
        return "has an adapter, and the stack has none, on"
    a, b = record.a[i], record.b[i]
    r = 0 if own is None else own.a.shape[-2]
    if r > a.shape[-2]:
        return f"has rank {r}, and the stack {a.shape[-2]}, on"
    beyond = a.narrow(-2, r, a.shape[-2] - r), b.narrow(-1, r, b.shape[-1] - r)
    readable = not transforms_active() and not torch.compiler.is_compiling()
    if readable and any(x.numel() and bool(x.any()) for x in beyond):
        given = "no adapter" if own is None else f"rank {r}"
        return f"has {given}, and its adapter in the stack has a larger rank, on"
    return ""


def _unstacked(stack: Adapter, i: int, model: ModelState) -> Adapter:
    _, adapter = require_adapter(model)
    layers = []
    for layer, mine in zip(stack["layers"], adapter["layers"], strict=True):
        own: dict[str, Any] = {}
        for name, old in mine.items():
            r, record = old.a.shape[-2], layer[name]
            a, b = record.a[i].narrow(-2, 0, r), record.b[i].narrow(-1, 0, r)
            a, b = (x.to(old.a.dtype).clone(memory_format=torch.contiguous_format) for x in (a, b))
            own[name] = old._replace(a=a, b=b)
        layers.append(own)
    return Adapter(layers=tuple(layers))


def _stacked(records: Sequence[Any], dtype: torch.dtype) -> LoRA | ExpertLoRA:
    """The records of one matrix, or of all experts' matrices, as one; None is an absent record."""
    first = next(record for record in records if record is not None)
    r = max(record.a.shape[-2] for record in records if record is not None)

    def padded(record: Any) -> tuple[Tensor, Tensor]:
        absent = record is None
        record = first if absent else record
        more = r - record.a.shape[-2]
        a = F.pad(record.a.to(dtype), (0, 0, 0, more))
        b = F.pad(record.b.to(dtype), (0, more))
        return (torch.zeros_like(a), torch.zeros_like(b)) if absent else (a, b)

    a, b = zip(*map(padded, records), strict=True)
    return type(first)(torch.stack(a), torch.stack(b))


def _target(own: Sequence[Target | None]) -> tuple[Target, tuple[float, ...] | None]:
    """(one projection's settings in the stack, the scalings of each adapter if they differ)."""
    given = [target for target in own if target is not None]
    r = max(target.r for target in given)
    scalings = {target.scaling for target in given}
    scaling = scalings.pop() if len(scalings) == 1 else 1.0
    target = Target(name=given[0].name, r=r, lora_alpha=scaling * r, scaling=scaling)
    if not scalings:
        return target, None
    return target, tuple(1.0 if target is None else target.scaling for target in own)


# ── checks ────────────────────────────────────────────────────────────────────────────────


def stack_problems(models: Sequence[ModelState]) -> list[str]:
    """A line for each reason why `stack` refuses these models."""
    if problems := _list_problems(models):
        return problems
    problems = [f"model {i} {reason}" for i, m in enumerate(models) for reason in _alone(m)]
    if problems:
        return problems
    return [
        f"model {i} {reason} model 0"
        for i, m in enumerate(models)
        for reason in _beside(m, models[0])
    ]


def _list_problems(models: Any) -> list[str]:
    is_list = isinstance(models, Sequence) and all(isinstance(m, ModelState) for m in models)
    if is_list and models:
        return []
    return [f"models={describe(models)}: expected a list of one model or more"]


def _alone(model: ModelState) -> list[str]:
    """What a model has that a stack cannot have."""
    lora, adapter = model.spec.lora, model.adapter
    if lora is None or adapter is None:
        return ["has no adapter; fastlora.lora attaches one"]
    found = {
        "has DoRA (use_dora)": lora.use_dora,
        "has biases of B (lora_bias)": lora.lora_bias,
        "adapts the embedding or the head": bool({"embed_tokens", "lm_head"} & adapter.keys()),
        "trains copies of tensors (modules_to_save, bias)": "replaced" in adapter,
        "trains rows of tokens (trainable_token_indices)": "tokens" in adapter,
        "is fake quantised (qat_scheme)": lora.qat_scheme is not None,
        "has an initial offset (init_lora_weights)": has_offset(model.base),
        "is a stack already": stack_size(adapter) is not None,
    }
    return [what for what, present in found.items() if present]


def _beside(model: ModelState, first: ModelState) -> list[str]:
    """What differs between two models that must be equal in a stack."""
    mine, theirs = tree_leaves(model.base), tree_leaves(first.base)
    same = len(mine) == len(theirs) and all(x is y for x, y in zip(mine, theirs, strict=True))
    problems = [] if same else ["has other base tensors than"]
    dropout = lambda m: _lora(m).lora_dropout
    if dropout(model) != dropout(first):
        problems.append(f"has lora_dropout {dropout(model)}, unlike the {dropout(first)} of")
    if replace(model.spec, lora=None) != replace(first.spec, lora=None):
        problems.append("runs in another way (with_spec, max_seq_length) than")
    return problems


def _lora(model: ModelState) -> LoraConfig:
    return require_adapter(model)[0]
