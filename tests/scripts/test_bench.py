"""Arithmetic and tables of scripts/bench.py and scripts/bench/. Measuring needs a GPU."""

import os
import re
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser, Namespace
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
LAYER_KERNELS = str(SCRIPTS / "bench" / "layer_kernels.py")


@pytest.fixture
def scripts(monkeypatch):
    """The scripts as modules, with the sys.path that they run with."""
    monkeypatch.syspath_prepend(str(SCRIPTS / "bench"))
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = ("bench", "profile_step", "scaling")
    yield [import_module(name) for name in names]
    more = "measuring results bench_steps step_batches energy fp8_losses measure_load"
    more += " training_step probe random_checkpoint first_step"
    for name in (*names, *more.split(), "whole_job", "whole_job.compare"):
        sys.modules.pop(name, None)


def test_the_floor_counts_products_and_causal_attention(scripts):
    """4 x parameters x tokens at 790 TFLOP/s, and the causal half of attention."""
    measuring = import_module("measuring")
    for shape, products, attention in (("1b", 51.2, 4.9), ("8b", 311.3, 19.5)):
        raw = measuring.SHAPES[shape]
        short = measuring.floor_ms(raw, 4096, 2)  # as many tokens, almost no attention
        assert short == pytest.approx(products, abs=0.1)
        assert measuring.floor_ms(raw, 4, 2048) - short == pytest.approx(attention, abs=0.1)


def test_a_first_step_counts_all_calls_of_a_part(scripts, monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    marks = [("graph_launches()", "main", a, b) for a, b in ((1.0, 1.5), (3.0, 3.25))]
    import_module("first_step").note({"marks": marks, "total_s": 4.0}, "empty")
    (row,) = import_module("results").read(tmp_path / "first_step.jsonl")
    assert row["figures"] == {"graph_launches()_s": 0.75, "total_s": 4.0, "cache": "empty"}


FACTS = {"shape": "1b", "batch": 4, "seq": 2048, "card": "H200"}


def row(setting, ms, **more):
    figures = {"ms": ms, "spread_ms": 1.0, "tokens_s": 10, "floor_ms": 50.0, "peak_gib": 3.5}
    return FACTS | figures | {"setting": setting, "first_s": 9.0, "last_loss": 0.5} | more


def test_the_report_gives_ratio_and_share_of_the_floor(scripts):
    bench, *_ = scripts
    failed = {"setting": "liger", "error": ["no such package"]}
    text = bench.report(FACTS, [row("none", 100.0), row("unsloth", 125.0), failed], "unsloth")
    title, _, none, unsloth, liger = text.strip().split("\n")
    assert title == "shape 1b, batch 4, seq 2048, card H200"
    assert none.split()[-2:] == ["1.25", "50%"] and unsloth.split()[-2:] == ["1.00", "40%"]
    assert "no such package" in liger
    assert "1.25" not in bench.report(FACTS, [row("none", 100.0), row("hf", 125.0)], "unsloth")


def test_every_argument_of_a_step_reaches_its_process(scripts, monkeypatch):
    """An argument that is not passed on would be measured at its default."""
    measuring = import_module("measuring")
    parser = ArgumentParser()
    measuring.add_step_arguments(parser)
    given = "--shape 8b --layers 3 --batch 1 --seq 512 --rank 8 --targets q_proj v_proj".split()
    given += "--dropout 0.1 --kernels torch --use-dora --lora-bias --load-in-4bit".split()
    given += "--documents 128 --cuda-graph --deterministic --base-precision fp8".split()
    given += "--energy 2 --chats".split()
    args = parser.parse_args(given)
    for name, value in vars(args).items():
        assert name == "folder" or value != parser.get_default(name), f"{name}: give it a value"
    args.steps, args.warm, args.cache = 7, 2, None
    seen = {}

    class Done:
        stdout, stderr = 'RESULT {"ms": 1}', ""

    monkeypatch.setattr(measuring.subprocess, "run", lambda c, **_: seen.update(command=c) or Done)
    assert measuring.in_own_process("none", Path("somewhere"), args) == {"ms": 1}
    parser.add_argument("--one")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--warm", type=int)
    again = vars(parser.parse_args(seen["command"][2:]))
    for name, value in vars(args).items():
        if name not in ("cache", "folder"):
            assert again[name] == value, name
    assert again["one"] == "none" and again["folder"] == Path("somewhere")


def test_a_row_names_the_command_that_gives_it_again(scripts):
    """With every option but the defaults, and without options that a peer does not have."""
    measuring = import_module("measuring")
    parser = ArgumentParser()
    measuring.add_step_arguments(parser)
    measuring.add_timing_arguments(parser)
    command = lambda setting, given: measuring.command_of(setting, parser.parse_args(given.split()))
    timing = "--steps 10 --warm 3"
    assert command("none", "") == (
        f"python scripts/bench.py --shape 1b --recompute none --peers {timing}"
    )
    given = "--shape 8b --batch 2 --targets q_proj v_proj --load-in-4bit --cuda-graph"
    same = "python scripts/bench.py --shape 8b --batch 2 --targets q_proj v_proj --load-in-4bit"
    assert command("0.4", given) == f"{same} --cuda-graph --recompute 0.4 --peers {timing}"
    assert command("unsloth-gc", given) == f"{same} --recompute --peers unsloth-gc {timing}"


def test_rows_name_the_checkpoint_that_was_given(scripts):
    given = dict(shape="1b", folder=Path("here"), device="cpu", dtype="float32", peer=True)
    command = import_module("measure_load").command_of
    same = "python scripts/bench/measure_load.py"
    assert command(Namespace(**given, load_in_4bit=False)) == (
        f"{same} --folder here --device cpu --dtype float32 --peer"
    )
    given |= dict(folder=None, dtype="auto")
    assert command(Namespace(**given, load_in_4bit=True)) == (
        f"{same} --shape 1b --device cpu --load-in-4bit --peer"
    )
    sizes = dict(steps=12, batch=2, length=64, learning_rate=2e-4, chats=90)
    command = import_module("fp8_losses").command_of
    told = command(Namespace(shape="1b", folder="demo", **sizes))
    assert told == (
        "python scripts/bench/fp8_losses.py --folder demo --steps 12 --batch 2 --length 64"
        " --learning-rate 0.0002 --chats 90"
    )
    assert "--shape 1b" in command(Namespace(shape="1b", folder=None, **sizes))


def test_rows_are_appended_and_read_back(scripts, tmp_path):
    results = import_module("results")
    file = tmp_path / "rows.jsonl"
    assert results.read(file) == []
    rows = [results.row("python scripts/bench.py", {"ms": ms}) for ms in (1.0, 2.0)]
    for new in rows:
        results.append(file, new)
    assert results.read(file) == rows
    assert rows[0].keys() == {"date", "commit", "machine", "command", "figures"}
    assert {"card", "torch"} <= rows[0]["machine"].keys()


def test_every_cited_key_is_a_row_of_the_results(scripts):
    """Comments and pages cite measurements by key; a row's format is that of results.row."""
    rows = import_module("results").read(SCRIPTS / "bench" / "results.jsonl")
    keys = [row["key"] for row in rows if "key" in row]
    assert len(keys) == len(set(keys))
    for row in rows:
        assert {"date", "commit", "machine", "command", "figures"} <= row.keys()
        assert all(isinstance(x, str | int | float) for x in row["figures"].values()), row
    files = [*(ROOT / "fastlora").rglob("*.py"), *ROOT.glob("scripts/**/*.md"), ROOT / "README.md"]
    cited = {
        key
        for file in files
        for key in re.findall(r"\b[a-z0-9][a-z0-9.-]*-20\d\d-\d\d-\d\d\b", file.read_text())
    }
    assert cited and cited <= set(keys), cited - set(keys)


def test_a_profile_counts_overlap_once(scripts):
    _, profile_step, _ = scripts
    kernel = profile_step.Kernel
    kernels = [kernel("a", 0, 10), kernel("copy", 5, 27), kernel("a", 30, 40), kernel("b", 31, 32)]
    assert profile_step.busy_us(kernels) == 37
    title, _, first, *_ = profile_step.table(kernels, 2, 2, 0.01, 30).split("\n")
    assert "0.02 ms from first kernel to last, busy 0.02; 2 kernels; 1.0 waits" in title
    assert first.split() == ["0.011", "59.5%", "110.0%", "0.5", "22.0", "copy"]


def test_one_size_changes_at_a_time(scripts):
    *_, scaling = scripts
    center = {"seq": 2048, "batch": 4, "rank": 16, "layers": 16}
    for sweep, sizes in scaling.points(center):
        others = {**center, **scaling.SWEEPS[sweep][1]}
        assert {k: v for k, v in sizes.items() if k != sweep} == {
            k: v for k, v in others.items() if k != sweep
        }
    measured = [(sweep, sizes[sweep]) for sweep, sizes in scaling.points(center)]
    assert len(measured) == len(set(measured)) == 23


def test_an_interrupted_sweep_continues(scripts):
    """A point is skipped if it was measured or failed; rows of other sweeps do not count."""
    *_, scaling = scripts
    rows = [row("full", 100.0, sweep="rank", rank=8), row("none", 9.0, sweep="layers", layers=4)]
    rows += [{"sweep": "rank", "rank": 256, "setting": "full", "error": ["out of memory"]}]
    there = lambda sweep, value, setting: scaling.is_there(
        rows, sweep=sweep, setting=setting, **{sweep: value}
    )
    assert there("rank", 8, "full") and there("rank", 256, "full") and there("layers", 4, "none")
    assert not there("rank", 16, "full") and not there("rank", 8, "none")
    assert not there("seq", 2048, "full") and not there("layers", 8, "none")


def test_the_plot_is_drawn_with_gaps(scripts, tmp_path):
    *_, scaling = scripts
    center = {"seq": 2048, "batch": 4, "rank": 16, "layers": 16}
    rows = [
        row(setting, 100.0, sweep=sweep, torch="2.11", **sizes)
        for setting in ("selective", "full")
        for sweep, sizes in scaling.points(center)
    ]
    del rows[7]["tokens_s"], rows[7]["peak_gib"]
    rows[7]["error"] = ["out of memory"]
    scaling.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.compile
def test_inductors_kernels_are_listed_without_a_gpu(tmp_path):
    """No kernel rotates or concatenates attention's gradients: attention writes the final ones."""
    script = [
        sys.executable,
        str(SCRIPTS / "bench" / "layer_kernels.py"),
        "--code",
        str(tmp_path / "code"),
    ]
    told = subprocess.run(script, check=True, capture_output=True, text=True, timeout=300).stdout
    forward, backward = told.strip().split("backward: ")
    assert re.match(r"forward: \d+ kernels of Inductor's, at least \d+ us", forward)
    assert (
        "fastlora.lora_swiglu_backward" in backward and "triton" in (tmp_path / "code").read_text()
    )
    assert "fastlora.flash_attention_backward" in backward
    rows = re.findall(r"(?m)^ +(\d+\.\d) +\d+\.\d +(.*)$", backward)  # MiB, and the kernel's name
    assert rows and all(float(size) < 2 or "cat" not in what for size, what in rows)


@pytest.mark.compile
@pytest.mark.parametrize("shape", ["30b-a3b", "8x7b"])
def test_no_kernel_of_a_mixture_reads_back_what_it_stored(shape):
    """Without ops/gradient_barrier.py one kernel of each shape would: the gradient of RMSNorm over
    the keys, and of the RMSNorm before two experts. Shorter sequences give other kernels."""
    script = [sys.executable, LAYER_KERNELS, "--shape", shape]
    script += ["--recompute", "selective"]
    environ = os.environ | {"TRITON_INTERPRET": "0"}  # conftest.py's 1 would run kernels
    run = dict(check=True, capture_output=True, text=True, timeout=300, env=environ)
    told = subprocess.run(script, **run).stdout
    assert "backward: " in told and "settle_" in told
    assert "reads back" not in told


def test_a_kernel_that_reads_back_is_found(scripts):
    read_back = import_module("layer_kernels").read_back
    kernel = """
@triton.jit
def {}(a, b):
    for start in tl.range(0, n, BLOCK):
        x = tl.load(a + start)
        {}
    for start in tl.range(0, n, BLOCK):
        y = tl.load({} + start)
        tl.store(b + start, y)
''', device_str='cuda')
"""
    races = kernel.format("races", "tl.store(c + start, x)", "c")
    other = kernel.format("other", "tl.store(c + start, x)", "a")
    in_place = kernel.format("in_place", "x = x + 1", "b")
    assert read_back(races + other + in_place) == ["races"]
    sys.modules.pop("layer_kernels")


def test_a_family_is_compared_by_its_share_of_the_floor(scripts):
    families = import_module("families")
    llama = dict(setting="none", ms=100.0, spread_ms=1.0, peak_gib=3.0, floor_ms=60.0)
    good = families.line("gemma2-2b", "none", llama | {"floor_ms": 55.0}, llama)
    bad = families.line("gemma2-2b", "none", llama | {"floor_ms": 50.0}, llama)
    assert "55%" in good and "0.92  meets the bar" in good and "0.83  below 0.9" in bad
    assert "failed: ['x']" in families.line("gemma2-2b", "none", {"error": ["x"]}, llama)


def test_a_window_lowers_the_floor(scripts):
    measuring = import_module("measuring")
    raw = measuring.SHAPES["gemma3-1b"]
    wide = raw | {"sliding_window": 8192}
    assert measuring.floor_ms(raw, 1, 8192) < measuring.floor_ms(wide, 1, 8192)
    full = raw | {"layer_types": ["full_attention"] * 26}
    assert measuring.floor_ms(wide, 1, 8192) == pytest.approx(measuring.floor_ms(full, 1, 8192))


def test_packed_chats_in_one_row_are_the_same_documents(scripts):
    """fastlora's rows with segments and the peers' single row: equal tokens, labels, positions."""
    module = import_module("step_batches")
    packed = next(x for x in module.chats(2, 512) if module.real_tokens(x) < 1024)
    row = module.one_row(packed, lengths=True)
    segments = packed["segment_ids"]
    documents = [
        (packed[name][i][segments[i] == n], name)
        for name in ("input_ids", "labels")
        for i in range(2)
        for n in range(1, int(segments[i].max()) + 1)
    ]
    sizes = row.pop("packed_seq_lengths").tolist()
    assert len(sizes) > 3 and sum(sizes) == module.real_tokens(packed)
    positions = row.pop("position_ids")[0].split(sizes)
    assert all(x.tolist() == list(range(n)) for x, n in zip(positions, sizes, strict=True))
    for name, flat in row.items():
        expected = [x for x, of in documents if of == name]
        assert [x.tolist() for x in flat[0].split(sizes)] == [x.tolist() for x in expected], name
    # Rows of random tokens have no label that is left out; the first of a document gets one.
    one = Namespace(shape="1b", batch=2, seq=12, documents=4, chats=False, one="unsloth")
    whole = module.step_batches(one, "cpu")[0]
    assert whole["labels"][0, ::4].eq(-100).all() and whole["labels"].eq(-100).sum() == 6
    assert whole["packed_seq_lengths"].tolist() == [4] * 6


def test_energy_is_that_of_the_steps(scripts, monkeypatch):
    """300 W for steps of 20 ms with 6 tokens: 6 J a step, 1,000 J for 1,000 tokens."""
    module, clock, threads = import_module("energy"), [0.0], threading.enumerate()

    class Nvml:
        joules = lambda self: 300 * clock[0]
        watts = lambda self: 299.0
        sm_mhz = lambda self: 1980

    def step(i):
        clock[0] += 0.02

    monkeypatch.setattr(module, "Nvml", Nvml)
    monkeypatch.setattr(module, "PERIOD_S", 1e-4)
    monkeypatch.setattr(module.torch.cuda, "synchronize", lambda: time.sleep(0.01))
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    found = module.energy(step, step_ms=20.0, tokens=6, seconds=1.0)
    assert found["joules_1000_tokens"] == pytest.approx(1000) and found["watts"] == 300
    assert found["energy_steps"] == 50 and found["energy_ms"] == 20.0
    assert found["sampled_watts"] == 299 and found["sm_mhz"] == 1980

    def fail(i):
        raise MemoryError

    with pytest.raises(MemoryError):
        module.energy(fail, 20.0, 6, 1.0)
    assert set(threading.enumerate()) <= set(threads)  # or the process would not end

    def refused(self):
        raise RuntimeError("nvmlDeviceGetTotalEnergyConsumption returned 3")

    monkeypatch.setattr(Nvml, "joules", refused)
    assert "returned 3" in module.energy(step, 20.0, 6, 1.0)["energy"]


def test_losses_in_fp8_are_compared_by_means_of_ten(scripts):
    compared = import_module("fp8_losses").compared
    plain = [4.0 - 0.01 * i for i in range(30)]
    table, figures = compared(plain, [x * (1.005 if i < 20 else 1.02) for i, x in enumerate(plain)])
    assert "0.50%" in table and "2.00%" in table and "beyond 1%" in table
    assert figures["largest_difference"] == pytest.approx(0.02)
    assert "within 1%" in compared(plain, plain)[0]
