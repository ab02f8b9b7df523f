"""Weighted sums of adapters, here and in PEFT's add_weighted_adapter."""

from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import model as peft_lora_model

from fastlora.adapters.create import lora
from fastlora.adapters.edits.combining import combine
from fastlora.formats.peft.writing import save_adapter
from fastlora.models.names import projection_path
from oracles.peft_cases import FORWARD
from oracles.peft_side import difference, fast, hf_logits, logits, peft_read, with_random_adapter

# The models that are combined: arguments of `lora`.
EQUAL = (
    dict(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    dict(r=4, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"]),
    dict(r=4, lora_alpha=9, target_modules=["q_proj", "v_proj", "down_proj"]),
)

PARTLY = (  # not the same modules
    dict(r=4, target_modules=["q_proj", "up_proj"]),
    dict(r=4, lora_alpha=3, target_modules=["up_proj", "o_proj"]),
)

UNEQUAL = (  # not the same ranks either
    dict(r=4, target_modules=["q_proj", "up_proj", "k_proj"], rank_pattern={"up_proj": 2}),
    dict(r=3, lora_alpha=7, target_modules=["up_proj", "o_proj", "k_proj"]),
)

TIES = dict(density=0.6)
FREQUENCY = dict(density=0.45, majority_sign_method="frequency")

# name -> models, weights, method, its arguments
COMBINE_CASES = {
    "cat": (EQUAL, (0.7, 0.2, 1.5), "cat", {}),
    "cat, negative": (UNEQUAL, (1.0, -0.6), "cat", {}),
    "cat, one model": (EQUAL[1:2], (-0.8,), "cat", {}),
    "svd": (EQUAL, (0.7, 0.2, 1.5), "svd", {}),
    "svd, negative": (UNEQUAL, (0.9, -1.3), "svd", {}),
    "svd, rank 2": (UNEQUAL, (0.9, 1.3), "svd", dict(svd_rank=2)),
    "svd, whole": (UNEQUAL, (0.9, 1.3), "svd", dict(svd_rank=9)),
    "linear": (EQUAL, (0.7, 0.2, 1.5), "linear", {}),
    "linear, negative": (EQUAL, (0.7, -0.9, 1.5), "linear", {}),
    "linear, zero": (EQUAL, (0.7, 0.0, 1.5), "linear", {}),
    "linear, partly": (PARTLY, (0.7, -1.1), "linear", {}),
    "linear, one model": (EQUAL[1:2], (-0.8,), "linear", {}),
    "ties": (EQUAL, (0.7, 0.9, 1.5), "ties", TIES),
    "ties, negative": (EQUAL, (0.7, -0.9, 1.5), "ties", TIES),
    "ties, frequency": (EQUAL, (0.7, 0.9, 1.5), "ties", FREQUENCY),
    "ties, partly": (PARTLY, (0.7, 1.1), "ties", TIES),
    "magnitude_prune": (EQUAL, (0.7, 0.9, 1.5), "magnitude_prune", TIES),
    "magnitude_prune, negative": (EQUAL, (0.7, 0.9, -1.5), "magnitude_prune", TIES),
    "dare_linear": (EQUAL, (0.7, -0.9, 1.5), "dare_linear", dict(density=0.7, seed=5)),
    "dare_ties": (EQUAL, (0.7, 0.9, 1.5), "dare_ties", FREQUENCY | dict(seed=5)),
    "dare_ties, partly": (PARTLY, (0.7, 1.1), "dare_ties", dict(density=0.7, seed=2**63)),
}


def adapted_models(*arguments):
    """Models with random adapters over one base."""
    base = fast(FORWARD)
    return [with_random_adapter(lora(base, **a), seed=i) for i, a in enumerate(arguments)]


def deltas(model, wide=torch.float64):
    """Module name -> delta_W, float64."""
    return {
        projection_path(i, t.name): t.scaling * (x.b.to(wide) @ x.a.to(wide))
        for i, targets in enumerate(model.spec.lora.targets)
        for t in targets
        for x in [model.adapter["layers"][i][t.name]]
    }


def furthest(found, expected):
    """max|Δ| over every module, relative to the largest value; the modules are the same."""
    assert found.keys() == expected.keys()
    scale = max(1.0, *(x.abs().max().item() for x in expected.values()))
    return max((found[k] - x).abs().max().item() for k, x in expected.items()) / scale


class Mixed(NamedTuple):
    deltas: dict[str, torch.Tensor]
    logits: torch.Tensor


def write_folders(models, folder):
    for i, model in enumerate(models):
        save_adapter(model, folder / str(i))


def peft_mixed(folder, weights, monkeypatch, combination_type, seed=0, **kwargs):
    """PEFT's combination of the adapters in folder/0, folder/1, ..."""
    names = [f"a{i}" for i in range(len(weights))]
    theirs = peft_read(FORWARD, folder / "0", adapter_name="a0")
    for i in range(1, len(weights)):
        theirs.load_adapter(folder / str(i), f"a{i}")
    # PEFT calls this after it draws the new adapter's first weights and before the first mask.
    seeded = lambda *_: torch.manual_seed(seed)
    monkeypatch.setattr(peft_lora_model, "_freeze_adapter", seeded)
    with torch.random.fork_rng(devices=[]):
        theirs.base_model.add_weighted_adapter(
            names, list(weights), "mix", combination_type=combination_type, **kwargs
        )
    theirs.set_adapter("mix")
    found = {
        name.removeprefix("base_model.model."): module.get_delta_weight("mix").detach().double()
        for name, module in theirs.named_modules()
        if isinstance(module, LoraLayer) and "mix" in module.lora_A
    }
    return Mixed(found, hf_logits(theirs.eval()))


def combine_difference(case, folder, monkeypatch):
    """(logits of our combination against PEFT's, its matrices against PEFT's)."""
    arguments, weights, method, kwargs = COMBINE_CASES[case]
    models = adapted_models(*arguments)
    mixed = combine(models, weights, method, **kwargs)
    write_folders(models, folder)
    expected = peft_mixed(folder, weights, monkeypatch, method, **kwargs)
    assert max(x.abs().max().item() for x in expected.deltas.values()) > 0.05
    found = difference(logits(mixed), expected.logits, logits(fast(FORWARD)))
    return found, furthest(deltas(mixed), expected.deltas)
