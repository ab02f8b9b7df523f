"""A long run: memory stays flat, steps stay as fast, and no step waits for data.

90 steps, and memory only; with --full 2,000, and blocks of a stream of the full size.
"""

from itertools import chain, pairwise, repeat
from statistics import median
from time import perf_counter

import pytest

from fastlora.checkpoints.hub import DEMO
from fastlora.data import streams
from fastlora.data.rows import read_rows
from fastlora.training.loop import train

ROWS = read_rows(DEMO / "train.jsonl")


class HuggingFace:
    """A stream by its methods, of rows without end."""

    def __iter__(self):
        return chain.from_iterable(repeat(ROWS))

    def take(self, n): ...

    def skip(self, n): ...


def resident_mb() -> float:
    with open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


@pytest.mark.parametrize("source", ["list", "stream"])
def test_memory_is_flat_and_speed_steady(model, tokenizer, source, request, monkeypatch, tmp_path):
    full = request.config.getoption("--full")
    # Nothing may grow after `warm` steps.
    steps, warm = (2000, 100) if full else (90, 30)
    if not full:
        monkeypatch.setattr(streams, "BLOCK_TOKENS", 2**13)
    memory, times = [], []

    def log(record: dict) -> None:
        memory.append(resident_mb())
        times.append(perf_counter())

    # What train holds is measured, not what pytest keeps of the rows.
    data = ROWS[:200] if source == "list" else HuggingFace()
    given = dict(max_steps=steps, batch_size=2, progress=False, too_long="drop")
    train(model, tokenizer, data, log=log, output_dir=tmp_path, save_every=steps // 4, **given)
    grown = max(memory[warm:]) - memory[warm]
    seconds = [b - a for a, b in zip(times[warm:], times[warm + 1 :], strict=False)]
    half = len(seconds) // 2
    early, late = median(seconds[:half]), median(seconds[half:])
    print(f"{source}: {steps} steps, {grown:.1f} MB more than after step {warm};", end=" ")
    print(f"median step {early * 1e3:.2f} ms in the first half, {late * 1e3:.2f} ms in the second")
    assert grown < 20
    # A leak grows in most fifths of the steps; the allocator's blocks come now and then.
    fifth = (steps - warm) // 5
    parts = memory[warm::fifth]
    assert median(b - a for a, b in pairwise(parts)) < 1
    assert late < 1.5 * early or not full  # other tests may run beside the short form
