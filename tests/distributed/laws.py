"""What each rank of a job runs: small runs of train, and what they return. See server.py."""

import hashlib
import os
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora import functional as FL
from fastlora.checkpoints.hub import DEMO
from fastlora.data import streams
from fastlora.distributed import data_parallel, process_group
from fastlora.training import common_run
from fastlora.training import step as steps
from fastlora.training.logging.open import on_all_ranks
from oracles.training_runs import LENGTHS, WORDS
from oracles.trees import randomised

RANK = lambda: int(os.environ.get("RANK", 0))

ROWS = [
    {"prompt": f"{n}:", "completion": " " + " ".join((WORDS * 3)[n : n + length])}
    for n, length in enumerate(LENGTHS * 2)
]
PAIRS = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in ROWS[:8]
]
QUIET: dict[str, Any] = dict(progress=False, learning_rate=2e-3, batch_size=1)


def adapted(
    dropout: float = 0.0, seed: int = 0, shard: int | None = None
) -> tuple[fastlora.Model, fastlora.Tokenizer]:
    """The base that the fixture wrote, with a random adapter, and the demo's tokenizer."""
    given = dict(max_seq_length=64, device="cpu", shard=shard if "RANK" in os.environ else None)
    model, _ = fastlora.load(Path(os.environ["RANKS_BASE"]), **given)
    how = dict(lora_dropout=dropout, target_modules=["q_proj", "down_proj"])
    model = fastlora.lora(model, r=2, recompute="full" if shard else "none", **how)
    tokenizer = fastlora.Tokenizer.from_folder(DEMO)
    assert tokenizer is not None
    return model.with_adapter(randomised(model.adapter, seed)), tokenizer


def flat(model: Any) -> Tensor:
    """All tensors of the adapter side by side."""
    return torch.cat([x.reshape(-1) for x in tree_leaves(model.adapter)])


def bits(model: Any) -> str:
    """A hash of the adapter."""
    return hashlib.sha256(flat(model).numpy().tobytes()).hexdigest()


def outcome(model: Any, history: fastlora.History, scratch: Path, name: str) -> dict[str, Any]:
    """What the parent compares; rank 0 also writes the adapter."""
    if RANK() == 0:
        torch.save(flat(model), scratch / f"{name}.pt")
    found = dict(losses=history.losses, tokens=history.tokens, norms=history.grad_norms)
    return found | dict(bits=bits(model), evals=history.eval_losses)


def data_of(kind: str) -> Any:
    """Rows, pairs, or rows as a Hugging Face stream."""
    if kind == "stream":  # in small blocks, so that a run reaches several
        streams.BLOCK_TOKENS, streams._LEAST_SEQUENCES = 500, 4
        return Stream(ROWS)
    return {"pairs": PAIRS, "odd": ROWS[:17]}.get(kind, ROWS)


class Stream:
    """Rows with the methods of a Hugging Face stream."""

    def __init__(self, rows: list[Any]):
        """Keep the rows."""
        self.rows = rows

    def __iter__(self):
        """From the first row on."""
        return iter(self.rows)

    def take(self, n: int) -> "Stream":
        """The first rows."""
        return Stream(self.rows[:n])

    def skip(self, n: int) -> "Stream":
        """The other rows."""
        return Stream(self.rows[n:])


def runs(scratch: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The outcome of each case, by name; a case has arguments of `train`."""
    results = {}
    for name, case in cases.items():
        given = QUIET | case
        dropout, kind = given.pop("dropout", 0.0), given.pop("kind", "rows")
        ordered = given.pop("ordered", False)
        if given.pop("evaluates", False):
            given["eval_data"] = ROWS[:5]  # three batches of two rows, for two ranks
        model, tokenizer = adapted(dropout, shard=given.pop("shard", None))
        model = model.with_spec(deterministic=ordered)
        trained, history = fastlora.train(model, tokenizer, data_of(kind), **given)
        results[name] = outcome(trained, history, scratch, name)
    return results


def counted(scratch: Path) -> dict[str, int]:
    """The collectives of a run of five steps beyond those of a run of two, by name."""
    counts: Counter[str] = Counter()
    for name in ("all_reduce", "all_gather_single", "all_to_all_single", "broadcast"):
        original = getattr(dist, name)

        def counting(*args: Any, name: str = name, original: Any = original, **given: Any) -> Any:
            counts[name] += 1
            return original(*args, **given)

        setattr(dist, name, counting)
    found = []
    for count in (2, 5):
        counts.clear()
        fastlora.train(*adapted(), ROWS, **QUIET, max_steps=count)
        found.append(dict(counts))
    return {name: found[1][name] - found[0][name] for name in found[1]}


# ── faults ────────────────────────────────────────────────────────────────────────────────
def killed_run(scratch: Path, step: int, rank: int, out: str, **changed: Any) -> dict[str, Any]:
    """Ten steps with a checkpoint after each second one; a rank kills itself after a step.

    Only the first attempt is killed.
    """

    def log(record: dict[str, Any]) -> None:
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            if record["step"] == step and RANK() == rank:
                os.kill(os.getpid(), signal.SIGKILL)

    given = QUIET | dict(max_steps=10, save_every=2, resume="auto", output_dir=scratch / out)
    model, tokenizer = adapted(0.1)
    given |= dict(log=on_all_ranks(log), packing=False) | changed
    trained, history = fastlora.train(model, tokenizer, ROWS, **given)
    return outcome(trained, history, scratch, out)


def odd_arguments(fact: str) -> tuple[fastlora.Model, Any, dict[str, Any]]:
    """(model, rows, arguments of train) that differ from the other ranks' in one fact."""
    model, _ = adapted(seed=int(fact == "hash of the adapter"))
    rows = ROWS[:-1] if fact == "hash of the training data" else ROWS
    given = {
        "hash of eval_data": dict(eval_data=ROWS[:2]),
        "learning_rate": dict(learning_rate=3e-3),
    }.get(fact, {})
    if fact == "spec.kernels":
        model = model.with_spec(kernels="torch")
    if fact == "hash of the base model":
        model.base["norm"].mul_(1.5)
    if fact == "version of torch":
        found = common_run.versions()
        common_run.versions = lambda: found | {"torch": "2.10"}
    return model, rows, QUIET | given


def disagreeing(scratch: Path, facts: list[str]) -> dict[str, str]:
    """The error of a run in which rank 1 has another value of one fact, by fact."""
    found, versions = {}, common_run.versions
    for fact in facts:
        model, rows, given = odd_arguments(fact if RANK() == 1 else "")
        try:
            fastlora.train(model, adapted()[1], rows, max_steps=1, **given)
        except ValueError as error:
            found[fact] = str(error)
        common_run.versions = versions
    return found


def hanging(scratch: Path, rank: int) -> str:
    """The error of the other rank when one does not come back from `log`."""
    data_parallel.STEP_SECONDS = 1.5

    def log(record: dict[str, Any]) -> None:
        if record["step"] == 2 and RANK() == rank:
            time.sleep(5)

    try:
        fastlora.train(*adapted(), ROWS, **QUIET, log=on_all_ranks(log), max_steps=4)
    except (TimeoutError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def absent(scratch: Path) -> str:
    """The error of rank 0 when rank 1 does not call train."""
    process_group.MEET_SECONDS = 1.0
    dist.init_process_group("gloo")
    if RANK() == 1:
        time.sleep(2)
        return ""
    try:
        fastlora.train(*adapted(), ROWS, **QUIET, max_steps=4)
    except TimeoutError as error:
        return str(error)
    return ""


def raising(scratch: Path) -> list[str]:
    """The errors of all ranks when one raises: in `log`, and before the first step."""
    found = []

    def log(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            raise KeyError("the user's log")

    missing = scratch / "missing.jsonl" if RANK() == 1 else ROWS
    for data, given in ((ROWS, dict(log=log)), (missing, {})):
        try:
            fastlora.train(*adapted(), data, **QUIET, max_steps=4, **given)
        except (KeyError, RuntimeError, FileNotFoundError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def not_finite(scratch: Path) -> str:
    """The error of a run in which the batch of rank 1 alone has a NaN."""

    def loss(adapter, base, spec, batch, *, seed):
        total, _ = FL.loss_sum(adapter, base, spec, batch, seed=seed)
        return total * (float("nan") if RANK() == 1 else 1.0)

    try:
        fastlora.train(*adapted(), ROWS, **QUIET, max_steps=4, loss=loss)
    except FloatingPointError as error:
        return str(error)
    return ""


def signalled(scratch: Path) -> dict[str, Any]:
    """SIGTERM to rank 1 during step 2: where each rank stops."""

    def log(record: dict[str, Any]) -> None:
        if record["step"] == 2 and RANK() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    given = QUIET | dict(max_steps=8, output_dir=scratch / "stopped", log=on_all_ranks(log))
    try:
        fastlora.train(*adapted(), ROWS, **given)
    except SystemExit as error:
        steps = error.history.steps  # pyright: ignore[reportAttributeAccessIssue]
        return dict(code=error.code, steps=len(steps))
    return {}


def drifting(scratch: Path) -> str:
    """The error of a run whose optimizer does something else on rank 1."""

    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(1e-3 * RANK())

    try:
        fastlora.train(*adapted(), ROWS, **QUIET, max_steps=4, optimizer=Odd)
    except RuntimeError as error:
        return str(error)
    return ""


def in_turn(scratch: Path) -> list[bool]:
    """Whether the first rank of the node was done when each other one began."""
    seen = []
    with data_parallel.joined(torch.device("cpu")) as ranks:
        for what in ("a", "b"):
            with ranks.first_on_node(what):
                if RANK() == 0:
                    time.sleep(0.2)
                    (scratch / what).touch()
                seen.append((scratch / what).exists())
            ranks.meet(what)
    return seen


def own_group(scratch: Path) -> list[bool]:
    """Whether the user's process group is there after a run, and serves."""
    dist.init_process_group("gloo")
    fastlora.train(*adapted(), ROWS, **QUIET, max_steps=1)
    fastlora.find_learning_rate(*adapted(), ROWS, steps=20, progress=False, high=1e3)
    one = torch.ones(1)
    dist.all_reduce(one)
    return [dist.is_initialized(), one.item() == dist.get_world_size()]


def restarts(scratch: Path) -> list[float]:
    """Sums of ones over two starts that share a store, as torchrun's restarts do."""
    address = "127.0.0.1", int(os.environ["MASTER_PORT"])
    server = (
        dist.TCPStore(*address, is_master=True, wait_for_workers=False) if RANK() == 0 else None
    )
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    found = []
    for start in range(2):
        if start == 1 and RANK() == 1:
            time.sleep(0.5)  # rank 0 finds this rank's earlier address first
        process_group.start_group(torch.device("cpu"))
        one = torch.ones(1)
        dist.all_reduce(one)
        found.append(one.item())
        dist.barrier()
        dist.destroy_process_group()
    if server is not None:  # the others may still be reading from it
        time.sleep(0.3)
    return found


def bench(scratch: Path, parts: list[str]) -> None:
    """scripts/bench/multi_gpu.py with tiny shapes."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/bench"))
    import multi_gpu

    options = ["multi_gpu.py", "--tiny", "--out", str(scratch / "rows.jsonl"), "--parts", *parts]
    sys.argv = options
    multi_gpu.work(multi_gpu.arguments())
    if RANK() == 0:
        (scratch / "table.md").write_text(multi_gpu.table(scratch / "rows.jsonl"))


def samples(scratch: Path, out: str) -> dict[str, Any]:
    """A run with everything that follows a step, on the first rank's files only."""
    given = dict(eval_data=ROWS[:5], eval_every=2, keep_best=True, early_stopping=2)
    given |= dict(sample_prompts=["a rank"], sample_tokens=4, output_dir=scratch / out)
    given |= dict(max_steps=12, save_every=2, keep=1, log="jsonl", learning_rate=1e-30)
    trained, history = fastlora.train(*adapted(), ROWS, **QUIET | given)
    return outcome(trained, history, scratch, out) | dict(steps=len(history.steps))


def rescaled(scratch: Path) -> list[float]:
    """The scales of a step over a sharded float16 base whose gradient overflows on rank 1 alone."""
    base, tokenizer = Path(os.environ["RANKS_BASE"]), adapted()[1]
    half, _ = fastlora.load(base, max_seq_length=64, dtype="float16", device="cpu", shard=2)
    tried, run = [], steps._micro_batch
    steps._micro_batch = lambda *given: tried.append(given[2].item()) or run(*given)
    steps._overflows = lambda loss, gradient: RANK() == 1 and len(tried) == 1
    fastlora.train(fastlora.lora(half, r=2), tokenizer, ROWS, **QUIET, max_steps=1)
    return tried


def sharding(scratch: Path, names: list[str]) -> dict[str, Any]:
    """Name -> the failures of a law of oracles/sharding_laws.py, or its traceback, which ends it.

    A process that had an error runs no further laws, so the others would wait for it.
    """
    from oracles import sharding_laws

    found: dict[str, Any] = dict.fromkeys(names, "not run")
    for name in names:
        try:
            found[name] = getattr(sharding_laws, name)(scratch)
        except Exception:  # noqa: BLE001  reported by the test
            found[name] = traceback.format_exc()
            break
    return found


def gguf(scratch: Path) -> list[bool]:
    """Whether rank 0's file has the bytes of the whole model's, and all have the same report."""
    (model, tokenizer), (whole, _) = adapted(shard=2), adapted()
    report = model.save_gguf(scratch / "sharded.gguf", tokenizer, pre="gpt-2")
    if RANK() == 0:
        whole.save_gguf(scratch / "whole.gguf", tokenizer, pre="gpt-2")
    dist.barrier()
    one, other = ((scratch / f"{name}.gguf").read_bytes() for name in ("sharded", "whole"))
    return [one == other, report.bytes == len(one)]
