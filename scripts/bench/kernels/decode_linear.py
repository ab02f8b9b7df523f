"""Time the products of a decode step, each with several tiles, and a whole decode step.

    python scripts/bench/kernels/decode_linear.py tiles 1b --batch 1 --bits 16 [--compile 3/14]
    python scripts/bench/kernels/decode_linear.py step 8b --batch 32 --bits 4 [--rank 0]
    python scripts/bench/kernels/decode_linear.py --sweep packed split [--limit 150]

Random weights of Llama-3.2-1B's or Llama-3.1-8B's shape, adapters on all seven projections. A CUDA
graph runs one product of every layer, or a whole step, so that L2 never holds the weights. `tiles`
prints microseconds for one launch and the bandwidth of reading the weights; `step` prints
milliseconds. --compile i/n only compiles every nth tile: several processes fill Triton's cache.
--sweep checks and times candidates of both shapes (decode_sweep.py) within --limit seconds:
"packed" those for 4-bit weights, "split" those for 32 rows and dense weights.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastlora.ops.decode.attention import decode_attention
from fastlora.ops.decode.linear import decode_product
from fastlora.ops.decode.linear_launch import Tile, launch_product
from fastlora.ops.decode.product import Part, Product, prepare_product
from fastlora.ops.quant.weights import LEVELS, NestedAbsmax, Weight, Weight4bit, empty_form, parts

V = 128256
SHAPES = {  # d, f, layers, heads, kv heads, head size
    "1b": (2048, 8192, 16, 32, 8, 64),
    "8b": (4096, 14336, 32, 32, 8, 128),
}
OPTIONS = argparse.Namespace()


def dense(*shape: int) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(0, 0.02)


def weight(rows: int, columns: int) -> Weight:
    if OPTIONS.bits == 16:
        return dense(rows, columns)
    blocks = rows * columns // 64
    byte = lambda n: torch.randint(0, 256, (n,), device="cuda", dtype=torch.uint8)
    code = torch.linspace(-1, 1, 256, device="cuda")
    scale = torch.full((-(-blocks // 256),), 0.02, device="cuda")
    absmax = NestedAbsmax(byte(blocks), scale, code, torch.tensor(0.04, device="cuda"))
    levels = torch.tensor(LEVELS["nf4"], device="cuda")
    form = empty_form((rows, columns), torch.bfloat16, "cuda")
    return Weight4bit(byte(rows * columns // 2), levels, form, absmax)


def part(rows: int, columns: int) -> Part:
    r = OPTIONS.rank
    a, b = (dense(r, columns), dense(rows, r)) if r else (None, None)
    return Part(weight(rows, columns), a, b, scaling=2.0)


def product(name: str) -> Product:
    d, f, _, h, kv, hd = SHAPES[OPTIONS.shape]
    norm, b = torch.ones(d, device="cuda", dtype=torch.bfloat16), OPTIONS.batch
    match name:
        case "qkv":
            parts = [part(h * hd, d), part(kv * hd, d), part(kv * hd, d)]
            made = prepare_product(parts, b, norm=norm, eps=1e-5)
        case "o":
            made = prepare_product([part(d, h * hd)], b)
        case "gate_up":
            made = prepare_product([part(f, d), part(f, d)], b, norm=norm, eps=1e-5, gated=True)
        case "down":
            made = prepare_product([part(d, f)], b)
        case _:
            made = prepare_product([Part(dense(V, d))], b, norm=norm, eps=1e-5)
    assert made is not None
    return made


def graphed(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def timed(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Milliseconds of one replay: the median of five runs of `replays`."""
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / replays)
    return statistics.median(times[1:])


def candidates(name: str) -> list[Tile]:
    if OPTIONS.tiles:
        sizes = (map(int, text.split(",")) for text in OPTIONS.tiles)
        return [Tile(rows, columns, warps) for rows, columns, warps in sizes]
    k = SHAPES[OPTIONS.shape][1 if name == "down" else 0]
    if OPTIONS.batch > 1:
        rows = (16, 32, 64) if OPTIONS.bits == 16 else (16, 32)
        depth = (
            ((64, 4), (128, 3), (128, 5), (256, 3)) if OPTIONS.bits == 16 else ((128, 2), (256, 2))
        )
        return [Tile(n, c, w, s) for n in rows for c, s in depth for w in (4, 8)]
    if OPTIONS.bits == 4:
        return [Tile(n, c, w) for n in (1, 2, 4, 8) for c in (2048, 4096) for w in (4, 8)]
    tiles = [Tile(n, c, w) for n in (1, 2, 4, 8) for c in (2048, 4096) if c <= k for w in (4, 8)]
    return [t for t in tiles if t.rows * t.columns // t.warps // 32 <= 128]


def tiles() -> None:
    d, f, _, h, _, hd = SHAPES[OPTIONS.shape]
    # 8B's layers have twice to four times the weights, so fewer of them exceed L2 (60 MB).
    repeats = 16 if OPTIONS.shape == "1b" else 8
    number, (index, count) = 0, map(int, OPTIONS.compile.split("/")) if OPTIONS.compile else (0, 0)
    for name in OPTIONS.products:
        # Two at least, because a launch must not clear its own `low`.
        made = [product(name) for _ in range(2 if name == "head" or count else repeats)]
        columns = f if name == "down" else h * hd if name == "o" else d
        x = torch.randn(OPTIONS.batch, columns, device="cuda", dtype=torch.bfloat16)
        residual = dense(OPTIONS.batch, d) if name in ("o", "down") else None
        rows = []
        for tile in candidates(name):
            for pdl in (True, False) if OPTIONS.both else (True,):
                number += 1
                if count and number % count != index:
                    continue
                run = partial(chain, made, x, residual, tile, pdl)
                try:
                    run()
                    torch.cuda.synchronize()
                    if not count:
                        rows.append((1e3 * timed(graphed(run), 20) / len(made), tile, pdl))
                except Exception as error:  # noqa: BLE001  a tile that does not fit
                    print("failed", name, tile, str(error)[:80].replace("\n", " "), flush=True)
        size = bytes_of(made[0])
        for us, tile, pdl in sorted(rows)[: OPTIONS.best]:
            print(
                f"{OPTIONS.shape} b{OPTIONS.batch} {OPTIONS.bits}bit r{OPTIONS.rank} {name:<8}"
                f"{us:8.2f} us {size / us / 1e6:6.2f} TB/s  {tuple(tile)} {'pdl' if pdl else ''}",
                flush=True,
            )


def chain(made: list[Product], x: Tensor, residual: Tensor | None, tile: Tile, pdl: bool) -> None:
    for i, one in enumerate(made):
        # low of the previous launch; a single product without low-rank terms has none
        launch_product(x, one, residual, made[i - 1].low, tile, pdl)


def bytes_of(one: Product) -> int:
    return sum(t.nbytes for w in one.weights for t in parts(w))


def step() -> None:
    d, _, layers, h, kv, hd = SHAPES[OPTIONS.shape]
    b, length = OPTIONS.batch, 256
    names = ("qkv", "o", "gate_up", "down")
    stack = [{name: product(name) for name in names} for _ in range(layers)]
    head, embedding = product("head"), dense(V, d)
    caches = [[dense(b, kv, 512, hd) for _ in range(2)] for _ in range(layers)]
    lengths = torch.full((b,), length, device="cuda")
    cos, sin = dense(b, hd), dense(b, hd)
    token = torch.arange(b, device="cuda")
    state: dict[str, Tensor] = {}

    def run() -> None:
        x = embedding[token]
        for p, (k_cache, v_cache) in zip(stack, caches, strict=True):
            q, k, v = decode_product(x, p["qkv"], clear=p["down"].low)
            if OPTIONS.attention:
                heads = decode_attention(
                    q.view(b, h, hd), k.view(b, kv, hd), v.view(b, kv, hd), cos, sin,
                    k_cache, v_cache, lengths, None,
                ).view(b, h * hd)  # fmt: skip
            else:
                heads = q
            (x,) = decode_product(heads, p["o"], x, clear=p["qkv"].low)
            (hidden,) = decode_product(x, p["gate_up"], clear=p["o"].low)
            (x,) = decode_product(hidden, p["down"], x, clear=p["gate_up"].low)
        (state["logits"],) = decode_product(x, head)
        state["next"] = state["logits"].argmax(-1)

    begin = time.time()
    graph = graphed(run)
    first = time.time() - begin
    graph.replay()
    before, differing = state["logits"].clone(), 0
    for _ in range(50):
        graph.replay()
        differing += int(not torch.equal(before, state["logits"]))
    ms = timed(graph, 50)
    size = sum(bytes_of(p[n]) for p in stack for n in names) + bytes_of(head)
    print(
        f"STEP {OPTIONS.shape} b{b} {OPTIONS.bits}bit r{OPTIONS.rank} attention "
        f"{OPTIONS.attention}: {ms:.3f} ms, {size / ms / 1e9:.2f} TB/s, first {first:.1f} s, "
        f"{differing} of 50 replays differ, finite {bool(before.isfinite().all())}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("tiles", "step"), nargs="?")
    parser.add_argument("shape", choices=SHAPES, nargs="?")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--attention", type=int, default=1)
    parser.add_argument("--both", type=int, default=0, help="also without PDL")
    parser.add_argument("--best", type=int, default=100)
    parser.add_argument("--compile", default="")
    parser.add_argument("--products", nargs="*", default=["qkv", "o", "gate_up", "down", "head"])
    parser.add_argument("--tiles", nargs="*", default=[])
    parser.add_argument("--sweep", nargs="+", choices=("packed", "split"), default=[])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["8b", "1b"])
    parser.add_argument("--limit", type=float, default=150, help="seconds for a sweep")
    parser.parse_args(namespace=OPTIONS)
    if OPTIONS.sweep:
        import decode_sweep  # noqa: PLC0415  imports this file

        decode_sweep.bench.OPTIONS = OPTIONS
        decode_sweep.sweep()
        return
    if OPTIONS.what is None or OPTIONS.shape is None:
        parser.error("give `tiles` or `step` and a shape, or --sweep")
    if not OPTIONS.compile and OPTIONS.what == "tiles":
        print(torch.__version__, torch.cuda.get_device_name(), *sys.argv[1:], flush=True)
    tiles() if OPTIONS.what == "tiles" else step()


if __name__ == "__main__":
    main()
