"""Tokens per second from a file of chats to packed sequences, beside datasets.map and TRL.

    python scripts/bench/data_pipeline.py                      # one core, and all cores
    python scripts/bench/data_pipeline.py --train FOLDER       # a model of random_checkpoint.py

Every row of the table is a process of its own on so many cores, and its time is that of reading,
encoding and packing, without imports. "cached" is the same data a second time. The rows of TRL do
what its SFTTrainer does: apply_chat_template with assistant masks through datasets.map, with as
many processes as cores, then pack_dataset("bfd").

The stream row takes steps of 8 x 2048 tokens at --rate tokens per second, without a model, and
tells how long they waited for data. With --train, a model is trained on a stream and then on the
same rows in memory, and the table has the waiting time of all steps after the first.

The rows of one core read the first eighth of the data. Figures go to stderr as they come, the table
goes to stdout and, as JSON, to $OUT/data_pipeline.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

LENGTH, BATCH = 2048, 8


class HuggingFace:
    """A stream by its methods: the rows of a file, without end."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __iter__(self) -> Any:
        for line in chain.from_iterable(map(open, repeat(self.path))):
            yield json.loads(line)

    def take(self, n: int) -> None:
        """Only its name is asked for."""

    def skip(self, n: int) -> None:
        """The same."""


def write_rows(path: Path, count: int) -> None:
    """Chats of four turns with about 500 tokens each, from the demo's rows."""
    from fastlora.checkpoints.hub import DEMO  # noqa: PLC0415

    lines = (DEMO / "train.jsonl").read_text().splitlines()
    texts = [message["content"] for line in lines for message in json.loads(line)["messages"]]
    with path.open("w") as file:
        for n in range(count):
            parts = [texts[(n * 31 + i * 7) % len(texts)] for i in range(28)]
            messages = [
                {"role": role, "content": "\n".join([f"{n}.{i}", *parts[i * 7 : i * 7 + 7]])}
                for i, role in enumerate(["user", "assistant"] * 2)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def ours(path: str, cores: int) -> dict[str, float]:
    """Encode and pack, then read the same data from the cache, then make batches."""
    from fastlora.data.batches import batches  # noqa: PLC0415
    from fastlora.data.packing import pack  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        seconds, found = [], []
        for _ in range(2):
            started = perf_counter()
            found = pack(_examples(path), LENGTH)
            seconds.append(perf_counter() - started)
        tokens = sum(int((sequence.segment_ids > 0).sum()) for sequence in found)
        started = perf_counter()
        made = sum(1 for _ in islice(batches(found, BATCH, seed=0), 100))
        batch_ms = (perf_counter() - started) / made * 1e3
    fill = tokens / (len(found) * LENGTH)
    return dict(tokens=tokens, seconds=seconds[0], cached=seconds[1], batch_ms=batch_ms, fill=fill)


def _examples(path: str) -> Any:
    from fastlora.checkpoints.hub import DEMO  # noqa: PLC0415
    from fastlora.data.encoding import RowLimits  # noqa: PLC0415
    from fastlora.data.reading import read_examples  # noqa: PLC0415
    from fastlora.text.tokenizer import Tokenizer  # noqa: PLC0415

    tokenizer = Tokenizer.from_folder(DEMO)
    assert tokenizer is not None
    return read_examples(path, tokenizer, RowLimits(LENGTH, too_long="drop"))[0]


def trl(path: str, cores: int) -> dict[str, float]:
    """What SFTTrainer does with the same rows."""
    import datasets  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer  # noqa: PLC0415
    from trl import data_utils  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    from fastlora.checkpoints.hub import DEMO  # noqa: PLC0415

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {name: encoded[name] for name in ("input_ids", "assistant_masks")}

    with tempfile.TemporaryDirectory() as cache:
        started = perf_counter()
        rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
        processes = cores if cores > 1 else None
        encoded = rows.map(encode, remove_columns=rows.column_names, num_proc=processes)
        packed = data_utils.pack_dataset(encoded, LENGTH, "bfd", {"num_proc": processes})
        seconds = perf_counter() - started
        tokens = sum(map(len, packed["input_ids"]))
    return dict(tokens=tokens, seconds=seconds, fill=tokens / (len(packed) * LENGTH))


def stream(path: str, cores: int) -> dict[str, float]:
    """Steps at a fixed rate that take their data from a stream."""
    from fastlora.checkpoints.hub import DEMO  # noqa: PLC0415
    from fastlora.data.batches import batches  # noqa: PLC0415
    from fastlora.data.encoding import RowLimits  # noqa: PLC0415
    from fastlora.data.row_steps import row_context  # noqa: PLC0415
    from fastlora.data.sources import sources_of  # noqa: PLC0415
    from fastlora.data.streams import Stream, StreamSettings  # noqa: PLC0415
    from fastlora.text.tokenizer import Tokenizer  # noqa: PLC0415

    rate, steps = float(os.environ["RATE"]), int(os.environ["STEPS"])
    tokenizer = Tokenizer.from_folder(DEMO)
    assert tokenizer is not None
    limits = RowLimits(LENGTH, too_long="drop")
    context = row_context(tokenizer, "responses")
    how = StreamSettings(context, limits, None, 0, True, 0, lambda examples: None)
    started = perf_counter()
    opened = Stream(sources_of(HuggingFace(path), "data"), how, "data")
    first, waits = perf_counter() - started, []
    found = opened.steps(None, BATCH, 1, batches)
    for _ in range(steps):
        asked = perf_counter()
        next(found)
        waits.append(perf_counter() - asked)
        sleep(max(0.0, BATCH * LENGTH / rate - waits[-1]))
    opened.close()
    return dict(first=first, steps=steps, rate=rate, waited=opened.waited, longest=max(waits[1:]))


def training(path: str, cores: int) -> dict[str, float]:
    """A model trained on a stream, then on rows in memory."""
    import fastlora  # noqa: PLC0415
    from fastlora.checkpoints.hub import DEMO  # noqa: PLC0415
    from fastlora.data import streams  # noqa: PLC0415

    waits: list[float] = []

    class Watched(streams.Background):
        def __next__(self) -> Any:
            started = perf_counter()
            try:
                return super().__next__()
            finally:
                waits.append(perf_counter() - started)

    streams.Background = Watched  # pyright: ignore[reportPrivateImportUsage]
    steps = int(os.environ["STEPS"])
    model, _ = fastlora.load(os.environ["TRAIN"], max_seq_length=LENGTH)
    model = fastlora.lora(model, recompute="none")
    tokenizer = fastlora.Tokenizer.from_folder(DEMO)
    given: dict[str, Any] = dict(
        batch_size=BATCH // 2, progress=False, too_long="drop", max_steps=steps
    )
    result = {}
    for name, data in (("stream", HuggingFace(path)), ("memory", path)):
        _, history = fastlora.train(model, tokenizer, data, **given)
        # The first steps compile and record.
        result[f"{name}_step"] = median(history.seconds[20:])
        result[f"{name}_slowest"] = max(history.seconds[20:])
    # The first wait is for the first block, before the first step.
    rate = BATCH // 2 * LENGTH / result["stream_step"]
    return result | dict(blocks=len(waits), waited=sum(waits[1:]), rate=rate)


MEASURES = {"ours": ours, "trl": trl, "stream": stream, "training": training}


def child(measure: str, path: str, cores: int, **variables: Any) -> dict[str, Any]:
    """The result of a measure in a process that may use so many cores."""
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    environment |= {"RAYON_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "true"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, __file__, "--measure", measure, "--rows", path]
    done = subprocess.run(
        [*command, "--cores", str(cores)], env=environment, stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        return {"error": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, or start the processes that do."""
    arguments = parse_arguments()
    available = sorted(os.sched_getaffinity(0))
    if arguments.measure:
        os.sched_setaffinity(0, available[: arguments.cores])
        print(json.dumps(MEASURES[arguments.measure](arguments.rows, arguments.cores)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path, part = Path(folder) / "rows.jsonl", Path(folder) / "part.jsonl"
        write_rows(path, arguments.count)
        write_rows(part, arguments.count // 8)
        results = measure_all(arguments, str(path), str(part), len(available))
    print(table(results))
    if out := os.environ.get("OUT"):
        (Path(out) / "data_pipeline.json").write_text(json.dumps(results, indent=1))


def measure_all(arguments: argparse.Namespace, path: str, part: str, cores: int) -> dict[str, Any]:
    """Name of a row -> its figures."""
    results = {}

    def measure(name: str, *given: Any, **variables: Any) -> None:
        if arguments.only and arguments.only not in name:
            return
        results[name] = child(*given, **variables)
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)

    has_trl = find_spec("trl") is not None and find_spec("datasets") is not None
    for n in dict.fromkeys([1, cores]):
        rows = part if n == 1 else path
        measure(f"fastlora, {n} cores", "ours", rows, n)
        if has_trl:
            measure(f"datasets.map + TRL, {n} cores", "trl", rows, n)
    given = dict(RATE=arguments.rate, STEPS=arguments.steps)
    measure("stream", "stream", path, cores, **given)
    if arguments.train:
        measure("training", "training", path, cores, TRAIN=arguments.train, **given)
    return results


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| | tokens | s | tokens/s | cached s | ms a batch | filled |", "|---" * 7 + "|"]
    for name, r in results.items():
        if "tokens" in r:
            rate = r["tokens"] / r["seconds"]
            rest = [f"{r['cached']:.2f}", f"{r['batch_ms']:.2f}"] if "cached" in r else ["", ""]
            cells = [name, f"{r['tokens']:,}", f"{r['seconds']:.1f}", f"{rate:,.0f}", *rest]
            lines.append("| " + " | ".join([*cells, f"{r['fill']:.1%}"]) + " |")
        else:
            lines.append(
                f"\n{name}: " + ", ".join(f"{key} {value:,.4g}" for key, value in r.items())
            )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--count", type=int, default=80_000, help="rows of about 500 tokens")
    add("--rate", type=float, default=86_000, help="tokens per second that the stream must give")
    add("--steps", type=int, default=300, help="of the stream, and of --train")
    add("--only", help="measure the rows whose name contains this text")
    add("--train", help="the folder of a model to train on a stream")
    add("--measure", choices=[*MEASURES], help=argparse.SUPPRESS)
    add("--rows", help=argparse.SUPPRESS)
    add("--cores", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
