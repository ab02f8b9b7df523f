"""First factors A0 and B0 computed from the base's weights: PiSSA, OLoRA and LoftQ.

scaling * B0 A0 is a part of W. PEFT subtracts it from the base; fastlora leaves W unchanged and
stores A0 and B0 beside it (models/init_offset.py). Decompositions run in float32, or in float64 if
the base has that dtype.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.adapters.init.decompositions import (
    factors_from_svd,
    low_rank_factors,
    randomised_svd,
)
from fastlora.adapters.init.loftq import LoftQSettings, loftq_factors
from fastlora.adapters.init.random import adapted_matrix
from fastlora.models.init_offset import with_offset
from fastlora.models.names import projection_path
from fastlora.models.params import Adapter, AdapterRecord, Base, LoRA
from fastlora.models.spec import Spec, Target


def weight_factors(
    spec: Spec,
    base: Base,
    generator: torch.Generator,
    loftq: LoftQSettings = LoftQSettings(),  # noqa: B008  frozen
) -> list[dict[str, LoRA]]:
    """A0 and B0 of every target, one dict per layer, as `init_lora_weights` says.

    Args:
        spec: `spec.lora.init_lora_weights` is a method that reads weights.
        base: dense or quantised; quantised matrices are dequantised first.
        generator: on the CPU; only "pissa_niter_N" draws from it.
        loftq: only "loftq" reads these.

    Raises:
        ValueError: naming the first matrix that holds NaN or infinity.
    """
    assert spec.lora is not None, spec
    init = str(spec.lora.init_lora_weights)

    def factors(layer: int, t: Target) -> LoRA:
        weight = adapted_matrix(base, layer, t.name)
        if not weight.isfinite().all():
            raise ValueError(
                f"init_lora_weights={init!r} decomposes the base's matrices, but"
                f" {projection_path(layer, t.name)}.weight holds NaN or infinity; load the"
                " checkpoint again."
            )
        return projection_factors(weight, init, t.r, t.scaling, generator, loftq)

    return [{t.name: factors(i, t) for t in targets} for i, targets in enumerate(spec.lora.targets)]


def projection_factors(
    weight: Float[Tensor, "d_out d_in"],
    init: str,
    r: int,
    scaling: float,
    generator: torch.Generator,
    loftq: LoftQSettings,
) -> LoRA:
    """A0 and B0 of one projection. No gradient flows.

    Args:
        weight: the base's matrix.
        init: "pissa": the r largest singular directions of W, with half of each singular value's
            square root on either side (Meng et al. 2024, arXiv:2404.02948). "pissa_niter_N": the
            same from a randomised decomposition with N power iterations. "olora": the first r
            columns of Q and rows of R in W = Q R (Büyükakyüz 2024, arXiv:2406.01775). "loftq": the
            error of quantising W (Li et al. 2023, arXiv:2310.08659).
        r: at most min(d_out, d_in).
        scaling: of the low-rank product; positive, except for "olora", which does not use it.
        generator: on the CPU; only "pissa_niter_N" draws from it.
        loftq: only "loftq" reads these.
    """
    # torch has no QR and no SVD in 16 bits.
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if init == "olora":
        q, upper = torch.linalg.qr(weight)
        # Copies, because views would keep all of Q and R in memory.
        return LoRA(upper[:r].contiguous(), q[:, :r].contiguous())
    if init == "loftq":
        return loftq_factors(weight, r, scaling, loftq)
    if init == "pissa":
        return low_rank_factors(weight, r, scaling)
    iterations = int(init.removeprefix("pissa_niter_"))
    return factors_from_svd(*randomised_svd(weight, r, iterations, generator), scaling)


def set_initial_factors(
    base: Base, adapter: Adapter, factors: Sequence[Mapping[str, LoRA]]
) -> tuple[Base, Adapter]:
    """Start an adapter at A0 and B0, and store frozen copies of them in the base.

        base    {"layers": ({"q_proj": {"weight": W}, ...}, ...)}
        adapter {"layers": ({"q_proj": (A, B)}, ...)}
        factors [{"q_proj": (A0, B0)}, ...]
    ->  base    {"layers": ({"q_proj": {"weight": W, "offset": (A0, B0)}, ...}, ...)}
        adapter {"layers": ({"q_proj": (A0, B0)}, ...)}

    A0 and B0 are rounded to the adapter's dtype. Base and adapter share no memory, because an
    optimizer may write to the adapter's. A DoRA magnitude stays: it is the norm of W, and the
    weight of the new model still is W.
    """

    def replaced(record: AdapterRecord, new: LoRA) -> AdapterRecord:
        return record._replace(a=new.a.to(record.a), b=new.b.to(record.b))

    layers = tuple(
        {name: replaced(record, new[name]) for name, record in records.items()}
        for records, new in zip(adapter["layers"], factors, strict=True)
    )
    # Copies of the rounded values, so that the offset cancels A0 and B0 exactly.
    frozen = [{n: LoRA(x.a.clone(), x.b.clone()) for n, x in records.items()} for records in layers]
    return with_offset(base, frozen), Adapter(**adapter | {"layers": layers})
