"""Time causal attention by row length: fastlora's kernels beside cuDNN's.

    python scripts/bench/kernels/attention_lengths.py
    python scripts/bench/kernels/attention_lengths.py --sizes 256 --tiles   # tiles of one head size

Forward and backward passes of 8,192 tokens (of one row if the row is longer), bf16, each replayed
from a CUDA graph. fastlora's backward pass includes RoPE's gradient; cuDNN's does not. Head size
256 has the heads of Gemma 2 2B. "capped" are scores with a soft cap, "-" is a size that cuDNN
refuses.
"""

import argparse
from functools import partial

import torch
from graph_timing import timed
from torch import Tensor

from fastlora.ops.attention import flash_kernel
from fastlora.ops.attention.flash import Spans, make_spans
from fastlora.ops.attention.flash_kernel import flash_backward, flash_forward

HEADS, TOKENS = {64: (32, 8), 128: (32, 8), 256: (8, 4)}, 8192
aten = torch.ops.aten


def drawn(b: int, t: int, hd: int) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    gen = torch.Generator("cuda").manual_seed(0)
    new = partial(torch.randn, generator=gen, device="cuda", dtype=torch.bfloat16)
    h, kv = HEADS[hd]
    return [new(b, t, n, hd).transpose(1, 2) for n in (h, kv, kv, h)]


def cudnn(drawn: list[Tensor], times: int) -> tuple[float, float] | None:
    """Microseconds of both passes; None if cuDNN does not support the size."""
    q, k, v, dy = drawn
    run = lambda: aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)
    try:
        out, lse, *rest = run()
    except RuntimeError:
        return None
    cum_q, cum_k, max_q, max_k, seed, offset, _ = rest
    given = (dy, q, k, v, out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0)
    back = lambda: aten._scaled_dot_product_cudnn_attention_backward(*given, True)
    try:
        return timed([run] * times), timed([back] * times)
    except RuntimeError:
        return None


def ours(
    drawn: list[Tensor], table: Tensor, where: Spans | None, cap: float | None, times: int
) -> tuple[float, float]:
    """Microseconds of both passes through fastlora's kernels."""
    q, k, v, dy = drawn
    first, last = where or (None, None)
    out, lse = flash_forward(q, k, v, first, None, cap)
    given = (dy, q, k, v, out, lse, first, last, table, table, None, cap)
    forward = timed([lambda: flash_forward(q, k, v, first, None, cap)] * times)
    return forward, timed([lambda: flash_backward(*given)] * times)


# (queries, keys, warps, stages) to try for each kernel of head size 256.
TRIED = {
    "forward": [(128, 64, 8, 2), (128, 64, 8, 1), (128, 32, 8, 2), (64, 64, 4, 2)],
    "queries": [
        (128, 32, 8, 2), (128, 32, 8, 1), (128, 64, 8, 1), (64, 64, 8, 1), (64, 32, 4, 3),
    ],
    "keys": [
        (32, 64, 8, 2), (32, 64, 8, 3), (32, 64, 8, 1), (32, 64, 4, 2), (32, 128, 8, 2),
        (32, 128, 8, 1), (64, 64, 8, 1), (16, 64, 4, 2), (16, 128, 8, 2),
    ],
}  # fmt: skip


def tiles(hd: int) -> None:
    """Both passes of rows of 2,048 tokens with each tile of one kernel in place of its own."""
    given, t = drawn(4, 2048, hd), 2048
    table = torch.rand(1, t, hd, device="cuda", dtype=torch.bfloat16)
    print(f"{'kernel':>8}{'tile':>20}{'plain':>12}{'':>8}{'capped':>12}   us")
    for which, tried in TRIED.items():
        own = flash_kernel._TILES[hd][which]
        for tile in tried:
            flash_kernel._TILES[hd][which] = (*tile, None)
            try:
                pairs = [ours(given, table, None, cap, 8) for cap in (None, 50.0)]
                cells = "".join(f"{f:>12.0f}{g:>8.0f}" for f, g in pairs)
            except Exception as error:  # noqa: BLE001  what a compiler raises for a tile too large
                cells = f"   {type(error).__name__}"
            print(f"{which:>8}{tile!s:>20}{cells}", flush=True)
        flash_kernel._TILES[hd][which] = own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", choices=HEADS, default=[*HEADS])
    parser.add_argument("--tiles", action="store_true", help="of the first size")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    if args.tiles:
        tiles(args.sizes[0])
        return
    titles = ("ours", "cuDNN", "documents of 512", "capped")
    print(f"{'head_dim':>8}{'tokens':>8}" + "".join(f"{x:>20}" for x in titles) + "   us")
    for hd in args.sizes:
        for t in (512, 1024, 2048, 4096, 8192, 16384, 32768):
            b = max(1, TOKENS // t)
            times = max(1, 16384 // t)
            given = drawn(b, t, hd)
            table = torch.rand(1, t, hd, device="cuda", dtype=torch.bfloat16)
            index = torch.arange(t, device="cuda").expand(b, t)
            documents = make_spans(index // 512 * 512)
            columns = [
                ours(given, table, None, None, times),
                cudnn(given, times),
                ours(given, table, documents, None, times),
                ours(given, table, None, 50.0, times),
            ]
            shown = [f"{x[0]:>12.0f}{x[1]:>8.0f}" if x else f"{'-':>20}" for x in columns]
            print(f"{hd:>8}{t:>8}{''.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
