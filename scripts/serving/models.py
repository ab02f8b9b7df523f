"""The base and its adapters by name, as one model whose adapter is a stack.

A row of a batch names its adapter by a number. Number 0 is the base: an adapter of zeros.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora.adapters.targets import with_targets
from fastlora.errors import raise_problems
from fastlora.generation.text import text_stop_ids
from fastlora.models.params import TARGETS, Adapter, Base, LayerAdapter, LoRA
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import Extras, Target
from fastlora.models.state import ModelState, require_adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The models that the server and the chat run."""

    model: ModelState  # the adapter is a stack; None without adapters
    tokenizer: fastlora.Tokenizer
    adapter_ids: dict[str, int]  # name -> number in the stack; the first name is the base's

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a reply."""
        config = self.model.spec.config
        return tuple(text_stop_ids(self.tokenizer, config.eos_token_id, config.vocab_size))


def named_folder(text: str) -> tuple[str, str]:
    """A command's argument NAME=FOLDER as a pair."""
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=FOLDER")
    return name, folder


def load_served(
    name_or_path: str,
    adapters: Mapping[str, str],
    *,
    name: str | None = None,
    load_in_4bit: bool = False,
    max_seq_length: int | None = None,
) -> Served:
    """Load a base and adapters over it.

    Args:
        name_or_path: a folder, a Hub id or "demo". If it is an adapter's, its base is loaded too,
            and both are served.
        adapters: name -> PEFT folder or Hub id.
        name: of the base; None is the last part of `name_or_path`.
        load_in_4bit: quantise the base to NF4.
        max_seq_length: longest prompt and reply together; None is the model's.

    Raises:
        ValueError: the folder has no tokenizer, a name is given twice, or an adapter cannot share
            a batch with others. Lists all problems.
        FileNotFoundError, CheckpointError: as `fastlora.load` and `load_adapter`.
    """
    dtype = "auto" if torch.cuda.is_available() else "float32"  # bfloat16 is slow on most CPUs
    model, tokenizer = fastlora.load(
        name_or_path, dtype=dtype, load_in_4bit=load_in_4bit, max_seq_length=max_seq_length
    )
    if tokenizer is None:
        raise ValueError(f"{name_or_path} has no tokenizer.json; serving text needs one.")
    own = name_or_path.rstrip("/").split("/")[-1]
    base = fastlora.disable(model)
    named: dict[str, ModelState] = {}
    if model.adapter is not None:
        named[own] = model
        own = model.spec.name_or_path.rstrip("/").split("/")[-1]
    base_name = name or own
    twice = {base_name, *named} & set(adapters)
    if base_name in named:
        twice.add(base_name)
    problems = [f"the name {n!r} is used twice" for n in sorted(twice)]
    raise_problems(ValueError, "these models cannot be served:", problems)
    named |= {n: fastlora.load_adapter(base, folder) for n, folder in adapters.items()}
    stacked = stack(base, named) if named else base
    ids = {n: i for i, n in enumerate((base_name, *named))}
    return Served(model=stacked, tokenizer=tokenizer, adapter_ids=ids)


def stack(base: ModelState, models: Mapping[str, ModelState]) -> ModelState:
    """One model for the base (number 0) and all adapters (from 1 on, in this order).

    Leaves are [n + 1, ...]. Ranks are filled up with zeros, and each adapter's scaling is
    multiplied into its B, so that ranks, scalings and adapted modules may differ.

    Raises:
        ValueError: an adapter is not plain LoRA on the base's projections. Lists all of them.
    """
    originals = {name: self_contained(model) for name, model in models.items()}
    problems = [
        f"{name!r}: {reason}; merge it into its base (scripts/merge.py) and serve the folder alone"
        for name, model in originals.items()
        for reason in _not_stackable(base.base, model)
    ]
    raise_problems(ValueError, "these adapters cannot be served together:", problems)
    parts = [require_adapter(model) for model in originals.values()]
    dtype = reduce(torch.promote_types, (x.dtype for _, tree in parts for x in tree_leaves(tree)))
    layers: list[LayerAdapter] = []
    targets: list[tuple[Target, ...]] = []
    for i in range(base.spec.config.num_hidden_layers):
        scalings = [{t.name: t.scaling for t in lora.targets[i]} for lora, _ in parts]
        adapted = [name for name in TARGETS if any(name in s for s in scalings)]
        rows = [tree["layers"][i] for _, tree in parts]
        layer: LayerAdapter = {}
        for name in adapted:
            scaled: list[Any] = [
                (row[name], s[name]) if name in s else None
                for row, s in zip(rows, scalings, strict=True)
            ]
            layer[name] = _stacked(scaled, dtype)
        layers.append(layer)
        rank = lambda n, layer=layer: layer[n].a.shape[-2]
        targets.append(
            tuple(Target(name=n, r=rank(n), lora_alpha=rank(n), scaling=1.0) for n in adapted)
        )
    r = max((t.r for ts in targets for t in ts), default=1)
    # A first adapter's settings, except that alpha is the rank, for a scaling of 1.
    settings = replace(
        parts[0][0], r=r, lora_alpha=r, use_rslora=False, init_lora_weights=True, lora_dropout=0.0
    )
    lora = with_targets(settings, tuple(targets))
    spec = replace(base.spec, lora=lora)
    return replace(base, spec=spec, adapter=Adapter(layers=tuple(layers)))


def _stacked(scaled: Sequence[tuple[LoRA, float] | None], dtype: torch.dtype) -> LoRA:
    """A [n + 1, r, d_in] and B [n + 1, d_out, r]. None, and row 0, are zeros."""
    given = [part[0] for part in scaled if part is not None]
    r = max(lora.a.shape[0] for lora in given)
    n, d_in, d_out = len(scaled) + 1, given[0].a.shape[1], given[0].b.shape[0]
    a, b = (
        given[0].a.new_zeros(n, r, d_in, dtype=dtype),
        given[0].b.new_zeros(n, d_out, r, dtype=dtype),
    )
    for i, part in enumerate(scaled, 1):
        if part is not None:
            lora, scaling = part
            a[i, : lora.a.shape[0]] = lora.a.detach()
            b[i, :, : lora.b.shape[1]] = scaling * lora.b.detach()
    return LoRA(a, b)


def _not_stackable(base: Base, model: ModelState) -> list[str]:
    """Reasons why an adapter cannot be a row of a stack."""
    lora, adapter = require_adapter(model)
    reasons = []
    same = zip(tree_leaves(base), tree_leaves(model.base), strict=False)
    if any(x is not y for x, y in same):
        reasons.append("its folder changes the base's embedding or head")
    if lora.extras != Extras() or lora.bias != "none":
        reasons.append("it trains the embedding, the head, biases, norms or tokens")
    records = [record for layer in adapter["layers"] for record in layer.values()]
    if any(type(record) is not LoRA for record in records):
        reasons.append("it has DoRA magnitudes, biases of B, or experts' matrices")
    if lora.qat_scheme is not None:
        reasons.append("it is fake quantised")
    return reasons
