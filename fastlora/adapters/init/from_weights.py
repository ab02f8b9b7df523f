"""First factors of an adapter, read off the weights: PiSSA, OLoRA and LoftQ.

Each gives A0 and B0 with scaling * B0 A0 a part of W. What PEFT would leave in the base is
W - scaling * B0 A0 (llama/start.py). Decompositions are in float32, float64 of a float64 base.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import regex
import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.adapters.init.random import adapted_matrix
from fastlora.models.config import LlamaConfig
from fastlora.models.init_offset import with_offset
from fastlora.models.names import projection_path, projection_shape
from fastlora.models.params import EXPERTS, ROUTER, Adapter, Base, LoRA
from fastlora.models.spec import LoraConfig, Spec, Target
from fastlora.ops.quant.bitsandbytes import nf4_rounded


def weight_factors(
    spec: Spec, base: Base, generator: torch.Generator, loftq: tuple[int, int]
) -> list[dict[str, LoRA]]:
    """A0 and B0 of every target, read off the base's weights as `init_lora_weights` says."""
    assert spec.lora is not None, spec
    init = str(spec.lora.init_lora_weights)

    def found(layer: int, t: Target) -> LoRA:
        weight = adapted_matrix(base, layer, t.name)
        return factors(weight, init, t.r, t.scaling, generator, loftq)

    return [{t.name: found(i, t) for t in ts} for i, ts in enumerate(spec.lora.targets)]


def start_from_factors(
    base: Base, adapter: Adapter, found: Sequence[Mapping[str, LoRA]]
) -> tuple[Base, Adapter]:
    """(base with these start factors, adapter that begins as them), in the adapter's dtype.

    The two share no memory: an optimiser may write to the adapter's. All else of a record, a DoRA
    magnitude, stays: it is that of W, which the sum still is.
    """
    layers = tuple(
        {
            name: record._replace(a=found[i][name].a.to(record.a), b=found[i][name].b.to(record.b))
            for name, record in records.items()
        }
        for i, records in enumerate(adapter["layers"])
    )
    kept = [{n: LoRA(x.a.clone(), x.b.clone()) for n, x in records.items()} for records in layers]
    return with_offset(base, kept), Adapter(**adapter | {"layers": layers})


# Read off the weights alone, by `factors`; with a batch as well, by fastlora.initialize.
OF_WEIGHTS = r"pissa|pissa_niter_\d+|olora|loftq"

OF_DATA = ("eva", "corda", "lora_ga")

_SQUARE_ROOTS = r"pissa.*|loftq|corda"  # A and B get sqrt(S / scaling) each


def reads_weights(init: bool | str) -> bool:
    """Whether `factors` knows this value of init_lora_weights."""
    return isinstance(init, str) and regex.fullmatch(OF_WEIGHTS, init) is not None


def moves_base(init: bool | str) -> bool:
    """Whether such an adapter counts from what it left of the base, and not from the base."""
    return reads_weights(init) or init in ("corda", "lora_ga")


def factors(
    weight: Float[Tensor, "d_out d_in"],
    init: str,
    r: int,
    scaling: float,
    generator: torch.Generator,
    loftq: tuple[int, int],
) -> LoRA:
    """A0 and B0 of one projection. No gradient flows.

    Args:
        weight: of the base.
        init: "pissa": the r largest singular directions of W, half of each value's root on either
            side (Meng et al. 2024, arXiv:2404.02948). "pissa_niter_N": the same from a randomised
            decomposition with N power iterations. "olora": the first r columns of Q and rows of R
            in W = Q R (Büyükakyüz 2024, arXiv:2406.01775). "loftq": of what quantisation leaves
            (Li et al. 2023, arXiv:2310.08659).
        r: at most min(d_out, d_in).
        scaling: of the low-rank term; positive, save for "olora".
        generator: on the CPU; only "pissa_niter_N" draws.
        loftq: bits and iterations; only "loftq" reads them.
    """
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if init == "olora":
        q, upper = torch.linalg.qr(weight)
        return LoRA(upper[:r].contiguous(), q[:, :r].contiguous())
    if init == "loftq":
        return _loftq(weight, r, scaling, *loftq)
    if init == "pissa":
        return largest_directions(weight, r, scaling)
    iterations = int(init.removeprefix("pissa_niter_"))
    return balanced(*randomised_svd(weight, r, iterations, generator), scaling)


def balanced(
    u: Float[Tensor, "d_out r"],
    s: Float[Tensor, "r"],
    vh: Float[Tensor, "r d_in"],
    scaling: float,
) -> LoRA:
    """A and B with scaling * B A = U S V', the root of S / scaling on each side."""
    root = (s / scaling).sqrt()
    return LoRA(root[:, None] * vh, u * root)


def largest_directions(weight: Float[Tensor, "d_out d_in"], r: int, scaling: float) -> LoRA:
    """A and B with scaling * B A the best of rank r, half of each singular value's root on either
    side."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return balanced(u[:, :r], s[:r], vh[:r], scaling)


def randomised_svd(
    matrix: Float[Tensor, "rows columns"], rank: int, iterations: int, generator: torch.Generator
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank"], Float[Tensor, "rank columns"]]:
    """U, S and V' of about the largest singular directions (Halko et al. 2011, arXiv:0909.4061,
    algorithms 4.4 and 5.1), without oversampling, as torch.svd_lowrank has it.

    Not torch.svd_lowrank itself: it draws from the global generator.
    """
    noise = torch.randn(matrix.shape[1], rank, generator=generator, dtype=matrix.dtype)
    q, _ = torch.linalg.qr(matrix @ noise.to(matrix.device))
    for _ in range(iterations):
        q, _ = torch.linalg.qr(matrix.mT @ q)
        q, _ = torch.linalg.qr(matrix @ q)
    u, s, vh = torch.linalg.svd(q.mT @ matrix, full_matrices=False)
    return q @ u, s, vh


def _loftq(
    weight: Float[Tensor, "d_out d_in"], r: int, scaling: float, bits: int, iterations: int
) -> LoRA:
    """Alternates Q = quantised(W - s B A) with s B A = the r largest directions of W - Q.

    PEFT leaves out the scaling: its sum is off by (s - 1) B A (peft 0.21.2, loftq_utils.py:48).
    """
    quantised = _QUANTISERS[bits]
    lora = None
    for _ in range(iterations):
        rest = weight if lora is None else weight - scaling * lora.b @ lora.a
        lora = largest_directions(weight - quantised(rest).to(weight.dtype), r, scaling)
    assert lora is not None, iterations
    return lora


def int8_rounded(weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
    """The matrix after a round trip through 8-bit integers, one scale a row: max|row| / 127
    (Dettmers et al. 2022, arXiv:2208.07339, section 2; PEFT's 8 bits)."""
    step = weight.abs().amax(dim=-1, keepdim=True) / 127
    # A row of zeros has a step of its own size: 0 / tiny is 0, where 0 / 0 is none.
    return (weight / step.clamp(min=torch.finfo(weight.dtype).tiny)).round() * step


_QUANTISERS: dict[int, Callable[[Tensor], Tensor]] = {4: nf4_rounded, 8: int8_rounded}


def loftq_settings(config: object, init: bool | str) -> tuple[tuple[int, int], list[str]]:
    """((bits, iterations), what is wrong with the given LoftQConfig or dict).

    An empty config is PEFT's LoftQConfig(): 4 bits, 1 iteration.
    """
    default = (4, 1)
    if config is None or config == {}:
        return default, []
    if init != "loftq":
        return default, [
            f"loftq_config={config!r:.200} without init_lora_weights='loftq' would do nothing; give"
            " both or neither."
        ]
    keys = ("loftq_bits", "loftq_iter")
    given = config if isinstance(config, dict) else getattr(config, "__dict__", None)
    expected = "expected {'loftq_bits': 4 or 8, 'loftq_iter': 1 or more}."
    if given is None or given.keys() - set(keys):
        return default, [f"loftq_config={config!r:.200}: {expected}"]
    bits, iterations = (given.get(key, d) for key, d in zip(keys, default, strict=True))
    problems = []
    if type(bits) is not int or bits not in _QUANTISERS:
        problems.append(f"loftq_config: loftq_bits={bits!r:.200}; {expected}")
    if type(iterations) is not int or iterations < 1:
        problems.append(f"loftq_config: loftq_iter={iterations!r:.200}; {expected}")
    return (bits, iterations), problems


def factor_problems(lora: LoraConfig, config: LlamaConfig, init: bool | str) -> list[str]:
    """Ranks and scalings that an initialisation from singular vectors cannot have."""
    needs = 2 if init == "lora_ga" else 1  # one set of directions for A, another for B
    problems = []
    for i, targets in enumerate(lora.targets):
        for t in targets:
            path, least = projection_path(i, t.name), min(projection_shape(config, t.name))
            if t.name in (*EXPERTS, ROUTER):
                problems.append(f"{init!r} does not reach {path}: a mixture's experts and router.")
                continue
            if needs * t.r > least:
                problems.append(
                    f"{init!r} cannot give {path} rank {t.r}: its matrix has {least} singular"
                    f" directions; expected a rank of at most {least // needs}."
                )
            bad = t.scaling <= 0 or not math.isfinite(t.scaling)
            if bad and regex.fullmatch(_SQUARE_ROOTS, str(init)):
                problems.append(
                    f"{init!r} takes the root of 1 / scaling, but {path} has lora_alpha"
                    f" {t.lora_alpha:g}; expected more than 0."
                )
    return problems
