"""How far fastlora's base models are from transformers': family x dtype x case, on the CPU.

    PYTHONPATH=tests python -m oracles.transformers_table

    prompts    logits of 1, 7 and 24 tokens (past windows, dynamic RoPE)   max|Δ| / max(1, absmax)
    left       real positions of a left-padded batch                          the same
    right      of a right-padded one                                          the same
    packed     documents in packed rows against each alone                    the same
    loss       of a batch with ignored labels                                 |Δ| / loss
    greedy     24 new ids of single prompts and of a left-padded batch        share that differs
    nf4        7 tokens, both quantised on load (no mixtures)                 as the first
    bfloat16   error against float32 on the same numbers, in units of transformers' own error

Exits with 1 if a figure exceeds its tolerance. The tests in tests/models and tests/generation hold
the same measures to the same tolerances.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging

from oracles.checkpoints import FAMILIES
from oracles.pairs import Pair, read_pair
from oracles.quantized_bases import quantised_difference
from oracles.transformers_side import (
    LENGTHS,
    greedy_difference,
    losses,
    packed,
    padded,
    prompts,
    rounding,
    widened,
)


def bfloat16(pair: Pair, t: int) -> float:
    ours, theirs = rounding(pair, widened(pair), t)
    return ours / theirs


# dtype, name -> (measure, tolerance)
CASES: dict[tuple[torch.dtype, str], tuple[Callable[[Pair], float | None], float]] = {
    **{(torch.float32, f"t={t}"): (lambda pair, t=t: prompts(pair, t), 1e-5) for t in LENGTHS},
    (torch.float32, "left"): (lambda pair: padded(pair, "left"), 1e-5),
    (torch.float32, "right"): (lambda pair: padded(pair, "right"), 1e-5),
    (torch.float32, "packed"): (packed, 1e-5),
    (torch.float32, "loss"): (losses, 1e-5),
    (torch.float32, "greedy"): (greedy_difference, 0.0),
    (torch.float32, "nf4"): (lambda pair: quantised_difference(pair.folder, torch.float32), 1e-5),
    **{(torch.bfloat16, f"t={t}"): (lambda pair, t=t: bfloat16(pair, t), 1.5) for t in LENGTHS},
}


def main() -> int:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
    short = {torch.float32: "f32", torch.bfloat16: "bf16"}
    names = [f"{short[dtype]} {name}" for dtype, name in CASES]
    print(f"{'family':16}" + "".join(f"{name:>12}" for name in names))
    wrong = 0
    for family in FAMILIES:
        figures = measured(family)
        over = [
            name
            for name, figure, (_, limit) in zip(names, figures, CASES.values(), strict=True)
            if figure is not None and not figure <= limit  # NaN too
        ]
        wrong += len(over)
        shown = "".join(f"{'-':>12}" if f is None else f"{f:12.1e}" for f in figures)
        print(f"{family:16}{shown}  {'FAILS ' + ', '.join(over) if over else 'ok'}")
    print(f"{'tolerance':16}" + "".join(f"{limit:12.1e}" for _, limit in CASES.values()))
    print(f"{wrong} figures exceed their tolerance")
    return min(wrong, 1)


def measured(family: str) -> list[float | None]:
    """The figure of every case for one family. None: the case does not apply."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = {
            dtype: read_pair(family, Path(folder) / str(dtype), dtype)
            for dtype in (torch.float32, torch.bfloat16)
        }
        return [measure(pairs[dtype]) for (dtype, _), (measure, _) in CASES.items()]


if __name__ == "__main__":
    sys.exit(main())
