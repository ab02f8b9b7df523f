"""The candidates of `decode_linear.py --sweep`: checked in parallel processes, then timed in one.

A process of its own compiles, runs and checks each candidate, which fills Triton's cache, and a
candidate that stops with an error of the GPU does not end the sweep. A candidate is wrong if its
largest error against float64 exceeds 1.5 times that of plain torch, or if a second run differs.
"""

import math
import multiprocessing
import os
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import decode_linear as bench
import torch
from torch import Tensor

from fastlora.ops.decode.linear import product_reference
from fastlora.ops.decode.linear_launch import Tile, launch_product
from fastlora.ops.decode.product import EMPTY, Product

PRODUCTS = ("qkv", "o", "gate_up", "down")
WORKERS = 14
BYTES = 240e6  # of weights in one graph, four times the size of L2
ALLOWED = 1.5  # times the error of plain torch

MMA = [
    Tile(16, 1024, 8, 1, mma=True),
    Tile(16, 1024, 8, 2, mma=True),
    Tile(16, 1024, 8, 1, mma=True, registers=80),
    Tile(16, 1024, 4, 1, mma=True, registers=128),
    Tile(16, 1024, 4, 2, mma=True, registers=128),
    Tile(32, 1024, 8, 1, mma=True, registers=80),
    Tile(32, 1024, 8, 2, mma=True, registers=128),
]
VECTOR = [Tile(4, 2048, 4), Tile(4, 1024, 4), Tile(8, 1024, 4, registers=128), Tile(8, 2048, 8)]
MATRIX = [
    Tile(16, 128, 4, 2),
    Tile(64, 128, 4, 2),
    Tile(32, 256, 4, 2),
    Tile(64, 64, 4, 3),
    Tile(64, 128, 8, 3),
    Tile(32, 128, 4, 3),
]
SPLIT = [
    Tile(64, 64, 4, 6, splits=2),
    Tile(64, 64, 4, 6, splits=4),
    Tile(64, 128, 4, 4, splits=2),
    Tile(64, 128, 4, 4, splits=4),
    Tile(32, 128, 4, 4, splits=2),
    Tile(128, 64, 4, 4, splits=4),
]


class Task(NamedTuple):
    shape: str
    name: str
    batch: int
    bits: int
    tile: Tile | None  # None: the library's present choice

    def __str__(self) -> str:
        tile = "default" if self.tile is None else describe(self.tile)
        return f"{self.shape} {self.name:<8}b{self.batch:<3}{self.bits:>3} bits  {tile}"


class Checked(NamedTuple):
    task: Task
    error: float  # the largest, over the largest value
    plain: float  # that of plain torch
    same: bool  # whether a second run gave the same bits
    seconds: float
    failure: str = ""

    @property
    def right(self) -> bool:
        return not self.failure and self.same and self.error <= ALLOWED * self.plain


def describe(tile: Tile) -> str:
    kernel = "mma" if tile.mma else f"split {tile.splits}" if tile.splits > 1 else ""
    registers = f"<= {tile.registers} registers" if tile.registers else ""
    size = f"{tile.rows} x {tile.columns}, {tile.warps} warps, {tile.stages} stages"
    return " ".join(x for x in (size, kernel, registers) if x)


def tasks(sweeps: list[str], shapes: list[str]) -> Iterator[Task]:
    """The candidates, the most important first."""
    for shape in shapes:
        if "packed" in sweeps:
            mma = MMA if shape == "8b" else MMA[:5]
            for tile in [None, *mma, *(VECTOR if shape == "8b" else VECTOR[:1])]:
                yield from (Task(shape, name, 1, 4, tile) for name in PRODUCTS)
        if "split" in sweeps:
            for tile in [None, *SPLIT]:
                yield from (Task(shape, name, 32, 16, tile) for name in ("qkv", "o", "down"))
        if "packed" in sweeps and shape == "8b":
            for tile in [None, *MATRIX]:
                yield from (Task(shape, name, 32, 4, tile) for name in PRODUCTS)


def choose(task: Task) -> None:
    """Sets the options that bench.product reads."""
    bench.OPTIONS.shape, bench.OPTIONS.batch = task.shape, task.batch
    bench.OPTIONS.bits, bench.OPTIONS.rank = task.bits, 16


def made(task: Task) -> Product:
    """A product with random weights."""
    choose(task)
    return bench.product(task.name)


def inputs(task: Task) -> tuple[Tensor, Tensor | None]:
    d, f, _, h, _, hd = bench.SHAPES[task.shape]
    columns = {"down": f, "o": h * hd}.get(task.name, d)
    x = bench.dense(task.batch, columns) * 50
    return x, bench.dense(task.batch, d) if task.name in ("o", "down") else None


# ── 1. checks ─────────────────────────────────────────────────────────────────────────────
def check(task: Task) -> Checked:
    begin = time.time()
    one, other = made(task), made(task)
    (x, residual), (x_2, _) = inputs(task), inputs(task)
    run = lambda x, p, q: launch_product(x, p, residual, q.low, task.tile)
    first = run(x, one, other)
    run(x, other, one)
    second = run(x, one, other)
    run(x, other, one)
    third = run(x_2, one, other)  # wrong if it reads the low-rank products of another x
    if x.is_cuda:
        torch.cuda.synchronize()
    seconds = time.time() - begin
    same = all(torch.equal(y, z) for y, z in zip(first, second, strict=True))
    wide = None if residual is None else residual.double()
    error = plain = 0.0
    for given, found in ((x, second), (x_2, third)):
        truth = product_reference(given.double(), one, wide)
        error = max(error, worst(found, truth))
        plain = max(plain, worst(product_reference(given, one, residual), truth))
    return Checked(task, error, plain, same, seconds)


def worst(ys: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    errors = [
        float((y.double() - t).abs().max() / t.abs().max()) for y, t in zip(ys, truth, strict=True)
    ]
    return math.inf if any(math.isnan(e) for e in errors) else max(errors)


def worker(waiting: Any, done: Any) -> None:
    while True:
        task = waiting.get()
        if task is None:
            return
        try:
            done.put(check(task))
        except Exception as error:  # noqa: BLE001  of the compiler or the GPU
            done.put(Checked(task, math.inf, 0.0, False, 0.0, f"{type(error).__name__}: {error}"))
            if "CUDA" in str(error) and "out of resource" not in str(error):
                return  # this process cannot use the GPU any more


def check_all(todo: list[Task], seconds: float) -> list[Checked]:
    """The results that arrive within `seconds`."""
    begin, context = time.time(), multiprocessing.get_context("spawn")
    waiting, done, results = context.Queue(), context.Queue(), []
    for task in [*todo, *[None] * WORKERS]:
        waiting.put(task)
    processes = [context.Process(target=worker, args=(waiting, done)) for _ in range(WORKERS)]
    for process in processes:
        process.start()
    while len(results) < len(todo):
        left = begin + seconds - time.time()
        try:
            results.append(done.get(timeout=max(min(left, 1.0), 0.01)))
        except queue.Empty:
            if left <= 0 or not any(process.is_alive() for process in processes):
                break
    waiting.cancel_join_thread()
    for process in processes:  # those that hang in a kernel or compile
        process.kill()
    return results


# ── 2. times ──────────────────────────────────────────────────────────────────────────────
class Stack:
    """Products of one kind with more weights in all than L2 holds."""

    def __init__(self, task: Task):
        choose(task)
        first = bench.product(task.name)
        count = min(max(2, math.ceil(BYTES / bench.bytes_of(first))), 64)
        self.products = [first, *(bench.product(task.name) for _ in range(count - 1))]
        self.x, self.residual = inputs(task)

    def microseconds(self, task: Task) -> float:
        products = self.products
        for p in products:
            if p.low is not None:
                p.low.fill_(EMPTY)

        def run() -> None:
            for i, p in enumerate(products):
                launch_product(self.x, p, self.residual, products[i - 1].low, task.tile)

        # The last launch leaves its own `low` to the first one of the next run.
        return 1e3 * bench.timed(bench.graphed(run), 12) / len(products)


def sweep() -> None:
    begin = time.time()
    out = Path(os.environ.get("OUT", ".")) / "decode_sweep.txt"
    with out.open("w") as file:

        def say(text: str) -> None:
            print(text, flush=True)
            file.write(text + "\n")
            file.flush()

        todo = list(tasks(bench.OPTIONS.sweep, bench.OPTIONS.shapes))
        say(f"{torch.__version__} {torch.cuda.get_device_name()}, {len(todo)} candidates")
        results = check_all(todo, bench.OPTIONS.limit * 0.62)
        for r in results:
            if not r.right:
                say(f"WRONG {r.task}: error {r.error:.2e}, plain {r.plain:.2e}, same bits "
                    f"{r.same} {r.failure[:160]!r}")  # fmt: skip
        missing = set(todo) - {r.task for r in results}
        say(f"checked {len(results)} in {time.time() - begin:.0f} s; not reached: {len(missing)}")
        for task in sorted(missing, key=todo.index)[:8]:
            say(f"MISSING {task}")
        report([r for r in results if r.right], todo, begin, say)
        say(f"{time.time() - begin:.0f} s in all")


def report(results: list[Checked], todo: list[Task], begin: float, say: Any) -> None:
    """Times the candidates of one product after the other, and prints them, fastest first."""
    groups: dict[tuple, list[Checked]] = {}
    best = []
    for r in sorted(results, key=lambda r: todo.index(r.task)):
        groups.setdefault(r.task[:4], []).append(r)
    for checked in groups.values():
        stack, rows = Stack(checked[0].task), []
        size = bench.bytes_of(stack.products[0])
        for r in checked:
            if time.time() - begin > bench.OPTIONS.limit:
                say(f"no time left for {r.task}")
                continue
            rows.append((stack.microseconds(r.task), r))
        rows.sort(key=lambda row: row[0])
        old = [us for us, r in rows if r.task.tile is None]
        best += [
            f"{old[0] if old else math.nan:8.2f} -> {us:.2f} us {r.task}" for us, r in rows[:1]
        ]
        for us, r in rows:
            ratio = r.error / r.plain
            say(f"{us:8.2f} us {size / us / 1e6:5.2f} TB/s  {r.task}  error {ratio:.2f} of plain")
        del stack
        torch.cuda.empty_cache()
    say("\n".join(["default -> best", *best]))
