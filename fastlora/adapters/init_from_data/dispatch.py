"""initialize(): first weights of an adapter from what data says about the base.

Layer by layer, by pure functions of layer.py's pieces: what enters each projection, and for
"lora_ga" the gradient of the loss by its weight. One layer's statistics are on the device at a
time; the batches' hidden states wait on the host in between.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from fastlora.adapters.init_from_data.corda import corda
from fastlora.adapters.init_from_data.eva import eva
from fastlora.adapters.init_from_data.lora_ga import lora_ga
from fastlora.adapters.init_from_data.settings import (
    InitSettings,
    choice_problems,
    fresh_adapter_problems,
)
from fastlora.errors import raise_problems
from fastlora.models.input_checks import batches_problems
from fastlora.models.self_contained import parked_originals, unpark_originals
from fastlora.models.state import Batch, StateT


def initialize(
    model: StateT,
    batches: Iterable[Batch],
    method: str,
    *,
    rho: float = 2.0,
    tau: float = 0.99,
    use_label_mask: bool = True,
    whiten: bool = False,
    adjust_scaling_factors: bool = True,
    corda_method: str = "ipm",
    direction: str = "ArB2r",
    scale: str = "stable",
    stable_gamma: float = 16,
    random_state: int = 3407,
) -> StateT:
    """The model with its fresh adapter's A and B taken from data; the given one is unchanged.

    It still equals its base, whose tensors stay as they are: "eva" leaves B zero; for "corda" and
    "lora_ga" what PEFT would subtract from the base is kept beside it (llama/start.py), and the
    model is saved as an adapter of twice the rank. Only the base is run, without dropout.

    Args:
        model: with a fresh adapter, as `fastlora.lora` gives it: B is zero.
        batches: dicts as `model.loss` takes them; labels may be absent, save for "lora_ga". Read
            once, and kept on the host with one hidden state a token ("lora_ga": one a layer).
        method: "eva": A is the main directions of each projection's inputs, and ranks move to where
            these explain most of their variance (Paischer et al. 2024, arXiv:2410.07170); a
            projection left with rank 0 loses its adapter.
            "corda": A and B are the main directions of W C, C the covariance of the inputs (Yang et
            al. 2024, arXiv:2406.05223).
            "lora_ga": A and B are directions of the loss's gradient by W, the mean over the batches
            (Wang et al. 2024, arXiv:2407.05000).
        rho: eva: the largest rank is round(rho * r); 1 moves none.
        tau: eva: a component has settled where its cosine with that of the batch before is at
            least this. Once all of an input have, later batches do not change them.
        use_label_mask: eva: tokens whose label is -100 do not count, where there are labels.
        whiten: eva: divide directions by the root of their singular value.
        adjust_scaling_factors: eva: alpha grows with the rank, so the scaling stays.
        corda_method: "ipm": the largest directions, to learn; "kpm": the smallest, to keep.
        direction: lora_ga: which of the first 2r directions go to A and to B: "ArB2r": A the first
            r, B the others; "A2rBr": the reverse; "ArBr": alternating; "random".
        scale: lora_ga: "stable": B grows with d_out**(1/4) / stable_gamma**(1/2); "weight_svd": B's
            largest value is W's; "gd_scale": both are divided by the scaling; "unit".
        stable_gamma: lora_ga: see `scale`.
        random_state: lora_ga: of a private generator that draws on the CPU.

    Raises:
        ValueError: listing everything that cannot be: an unknown method, an argument of another
            method, a batch that does not fit, an adapter that is not fresh, a rank without enough
            directions; or if the data has fewer counted tokens a batch than "eva" has components.

    Padding never counts. Statistics are in float32, float64 of a float64 base; sources of the rules
    where papers leave a choice: peft 0.21.2 (tuners/lora/eva.py, corda.py, layer.py:619), with
    exact decompositions in place of randomised ones, but for "lora_ga".
    """
    choices = InitSettings(
        rho=rho,
        tau=tau,
        use_label_mask=use_label_mask,
        whiten=whiten,
        adjust_scaling_factors=adjust_scaling_factors,
        corda_method=corda_method,
        direction=direction,
        scale=scale,
        stable_gamma=stable_gamma,
        random_state=random_state,
    )
    heading = "fastlora.initialize cannot do this:"
    raise_problems(ValueError, heading, choice_problems(method, choices))
    raise_problems(ValueError, heading, fresh_adapter_problems(model, method, choices))
    found = list(batches)
    needed = ("input_ids", "labels") if method == "lora_ga" else ("input_ids",)
    raise_problems(ValueError, heading, batches_problems(model.spec, found, needed))
    device = model.base["norm"].device
    found = [{name: x.to(device) for name, x in batch.items()} for batch in found]
    whole = replace(model, base=unpark_originals(model.base))
    with torch.no_grad():
        make = {"eva": eva, "corda": corda, "lora_ga": lora_ga}[method]
        made = make(whole, found, choices)
    base = {**made.base, **parked_originals(model.base)}
    return replace(made, base=base)
