"""Time the attention of one decoding step beside torch's SDPA.

    python scripts/bench/kernels/decode_attention.py [--tiles]

bf16, the heads of Llama's 1B and 8B. Microseconds per call within a CUDA graph, launches included.
The calls rotate among caches of at least 90 MB, so that L2 holds none of them. "masked" is SDPA
over the whole cache with a mask, which a captured graph needs; "exact" is SDPA over the tokens
alone, and without a mask. "bandwidth" is the time in which 4 TB/s reads all keys and values once.
"""

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from graph_timing import timed
from torch import Tensor

from fastlora.ops.decode.attention_kernel import Tile, decode_forward

HEADS, KV_HEADS = 32, 8
# (rows, tokens of a row, length of the cache, whether the rows' tokens vary from 0 to twice that)
CASES = [
    (1, 128, 256, False), (1, 128, 4096, False), (1, 512, 1024, False), (1, 2048, 4096, False),
    (1, 32768, 65536, False), (4, 2048, 4096, False), (8, 2048, 4096, False),
    (16, 2048, 4096, False), (32, 512, 1024, False), (32, 2048, 4096, False),
    (32, 2048, 4096, True), (128, 1024, 2048, False),
]  # fmt: skip


def drawn(b: int, tokens: int, s: int, hd: int, ragged: bool) -> tuple[list[Tensor], list[list]]:
    """The arguments before the caches, and the caches and lengths of each call."""
    gen = torch.Generator("cuda").manual_seed(0)
    new = partial(torch.randn, generator=gen, device="cuda", dtype=torch.bfloat16)
    angles = torch.rand(b, hd // 2, generator=gen, device="cuda").repeat(1, 2)
    rope = [angles.cos().bfloat16(), angles.sin().bfloat16()]
    lengths = torch.full((b,), tokens, device="cuda")
    if ragged:
        lengths = torch.linspace(0, 2 * tokens - 1, b, device="cuda").long()
    count = max(3, -(-90_000_000 // (b * KV_HEADS * tokens * hd * 4)))
    caches = [new(2, b, KV_HEADS, s, hd) for _ in range(count)]
    return [new(b, n, hd) for n in (HEADS, KV_HEADS, KV_HEADS)] + rope, [
        [*pair, lengths] for pair in caches
    ]


def by_sdpa(q: Tensor, rest: list, tokens: int | None) -> Tensor:
    """SDPA over the first `tokens` entries of the caches; None: over all, with a mask."""
    k, v, lengths = rest
    mask = None
    if tokens is None:
        mask = torch.arange(k.shape[2], device="cuda") <= lengths[:, None]
        mask = mask[:, None, None]
    k, v = k[:, :, :tokens], v[:, :, :tokens]
    return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, enable_gqa=True)


def tiles(b: int, s: int) -> list[Tile]:
    """Tiles to compare, each with and without programmatic dependent launch."""
    splits = {max(1, min(n * 132 // (b * KV_HEADS), s // 128)) for n in (1, 2, 4)}
    return [Tile(n, x, pdl=pdl) for n in (64, 128) for x in sorted(splits) for pdl in (True, False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", action="store_true", help="also time other tiles")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    print(f"{'hd':>4}{'rows':>5}{'tokens':>8}{'cache':>7}", end="")
    print(f"{'ours':>8}{'masked':>8}{'exact':>8}{'bandwidth':>11}   us")
    for hd in (64, 128):
        for b, tokens, s, ragged in CASES:
            given, calls = drawn(b, tokens, s, hd, ragged)
            run = lambda rest, how, given=given: decode_forward(*given, *rest, None, how)  # pyright: ignore
            times = [timed([partial(run, rest, None) for rest in calls])]
            for seen in (None, tokens):
                times.append(timed([partial(by_sdpa, given[0], rest, seen) for rest in calls]))
            times.append(b * KV_HEADS * tokens * hd * 4 / 4e6)
            print(f"{hd:>4}{b:>5}{'~' * ragged + str(tokens):>8}{s:>7}", end="")
            print("{:>8.2f}{:>8.1f}{:>8.1f}{:>11.2f}".format(*times), end="", flush=True)
            others = tiles(b, s) if args.tiles else []
            for how in others:
                time = timed([partial(run, rest, how) for rest in calls])
                mark = "p" if how.pdl else ""
                print(f"  {how.keys}/{how.splits}{mark} {time:.2f}", end="")
            print(flush=True)


if __name__ == "__main__":
    main()
