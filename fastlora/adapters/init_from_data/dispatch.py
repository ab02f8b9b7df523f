"""initialize(): sets a fresh adapter's A and B from what data says about the base."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from fastlora.adapters.init.methods import reads_weights
from fastlora.adapters.init_from_data.corda import corda
from fastlora.adapters.init_from_data.eva import eva
from fastlora.adapters.init_from_data.lora_ga import lora_ga
from fastlora.adapters.init_from_data.settings import (
    SETTINGS_OF_METHOD,
    InitSettings,
    init_model_problems,
)
from fastlora.arguments import argument_problems, iterable, method_problems, settings_from
from fastlora.errors import raise_problems
from fastlora.models.input_checks import MODEL, batches_problems
from fastlora.models.names import tensors_from_base
from fastlora.models.self_contained import parked_originals, unpark_originals
from fastlora.models.stacks import one_adapter_problems
from fastlora.models.state import Batch, StateT
from fastlora.ops.dispatch import refuse_transforms

_METHODS = {"eva": eva, "corda": corda, "lora_ga": lora_ga}

_BATCHES = iterable(
    "a list of batches, each a dict with input_ids (put a single batch into a list)"
)


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
    """Set A and B of a model's fresh adapter from data. The given model is unchanged.

        base    {"layers": ({"q_proj": {"weight": W}, ...}, ...)}
        adapter {"layers": ({"q_proj": (A, 0)}, ...)}
    ->  "eva":                adapter {"layers": ({"q_proj": (A1, 0)}, ...)}, base unchanged
        "corda", "lora_ga":   adapter {"layers": ({"q_proj": (A0, B0)}, ...)},
                              base {"layers": ({"q_proj": {"weight": W, "offset": (A0, B0)}}, ...)}

    The new model still equals its base: "eva" leaves B zero, and for the other two PEFT subtracts
    B0 A0 from the base, while here they are kept beside it (models/init_offset.py) and the model is
    saved as an adapter of twice the rank. Only the base is run, without dropout.

    Args:
        model: with a fresh adapter, as `fastlora.lora` returns it: B is zero.
        batches: dicts as `model.loss` takes them; labels are required for "lora_ga" only. Read
            once, and kept on the host with one hidden state per token ("lora_ga": one per layer).
        method: "eva": A is the principal components of each projection's inputs, and ranks move to
            the projections where these explain most variance (Paischer et al. 2024,
            arXiv:2410.07170). A projection that gets rank 0 loses its adapter.
            "corda": A and B are the main directions of W C, with C the covariance of the inputs
            (Yang et al. 2024, arXiv:2406.05223).
            "lora_ga": A and B are directions of the gradient of the loss with respect to W, a mean
            over the batches (Wang et al. 2024, arXiv:2407.05000).
        rho: eva: the largest rank is round(rho * r); 1 keeps every rank.
        tau: eva: a component has converged if its cosine with the one before the last batch is at
            least this. When all components of an input have converged, later batches do not change
            them.
        use_label_mask: eva: tokens whose label is -100 do not count, in batches with labels.
        whiten: eva: divide directions by the square root of their singular value.
        adjust_scaling_factors: eva: change alpha in proportion to the rank, so that the scaling
            stays.
        corda_method: "ipm": the largest directions, to learn new knowledge; "kpm": the smallest, to
            keep what the model knows.
        direction: lora_ga: which of the first 2r directions go to A and to B: "ArB2r": A the first
            r, B the others; "A2rBr": the reverse; "ArBr": alternating; "random".
        scale: lora_ga: "stable": B is multiplied by d_out**(1/4) / stable_gamma**(1/2);
            "weight_svd": B's largest singular value is W's; "gd_scale": both are divided by the
            scaling; "unit": neither is changed.
        stable_gamma: lora_ga: see `scale`.
        random_state: lora_ga: seeds a private generator, which draws on the CPU.

    Raises:
        ValueError: listing every problem: an unknown method, a setting of another method, a batch
            that does not fit, an adapter that is not fresh, a rank that exceeds the number of
            directions, a tensor of the base that holds NaN or infinity; or if no batch has as many
            counted tokens as "eva" needs components.

    Padding never counts. Statistics are in float32, or in float64 for a float64 base. Where a paper
    leaves a choice, the rule is that of peft 0.21.2 (tuners/lora/eva.py, corda.py, layer.py:619).
    Decompositions are exact, where PEFT's are randomised, except for "lora_ga".
    """
    refuse_transforms("fastlora.initialize")
    settings = settings_from(InitSettings, locals())
    heading = "fastlora.initialize cannot do this:"
    problems = argument_problems({"model": (model, MODEL), "batches": (batches, _BATCHES)})
    problems += method_problems(method, settings, SETTINGS_OF_METHOD)
    if isinstance(method, str) and reads_weights(method):
        problems.append(
            f"{method!r} needs no data; use fastlora.lora(model, init_lora_weights={method!r})"
        )
    raise_problems(ValueError, heading, problems)
    problems = one_adapter_problems(model) or init_model_problems(model, method, settings)
    raise_problems(ValueError, heading, problems)
    # Read once: `batches` may be an iterator.
    batch_list = list(batches)
    # The decompositions would fail, or give NaN, without naming a tensor.
    broken = [
        name
        for name, x in tensors_from_base(model.spec.config, model.base).items()
        if isinstance(x, torch.Tensor) and not x.isfinite().all()
    ]
    raise_problems(ValueError, f"{method!r} cannot read NaN or infinity in the base:", broken)
    needed = ("input_ids", "labels") if method == "lora_ga" else ("input_ids",)
    raise_problems(ValueError, heading, batches_problems(model.spec, batch_list, needed))

    # Moved once, before the run: the methods read each batch once per layer. Ids and masks take at
    # most 40 bytes per token. The hidden states, 8 KB per token of an 8B model, wait on the host
    # (layer_inputs.py).
    device = model.base["norm"].device
    batch_list = [{name: x.to(device) for name, x in batch.items()} for batch in batch_list]
    # The methods run the base, so they need the originals; the result shares the parked ones again.
    unparked = replace(model, base=unpark_originals(model.base))
    with torch.no_grad():
        initialized = _METHODS[method](unparked, batch_list, settings)
    return replace(initialized, base={**initialized.base, **parked_originals(model.base)})
