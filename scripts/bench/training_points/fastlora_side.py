"""The same points with fastlora: fastlora_side.py FOLDER > ROWS."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from points import FORMS, ROWS, try_points
from safetensors.torch import load_file

import fastlora
from fastlora.data.encoding import RowLimits
from fastlora.data.reading import read_examples

SCRIPTS = Path(__file__).parents[2]
FOLDER = Path(sys.argv[1])
BASE, TOKENIZER = fastlora.load("demo", dtype="float32", max_seq_length=512, device="cpu")


def run(
    rows: Any = ROWS, name: str | None = None, dropout: float = 0.0, length: int = 128, **given: Any
):
    model = fastlora.lora(
        BASE,
        r=4,
        lora_alpha=4,
        lora_dropout=dropout,
        max_seq_length=length,
        target_modules=["q_proj", "v_proj", "down_proj"],
    )
    settings = dict(max_steps=2, batch_size=4, learning_rate=1e-3, packing=False, progress=False)
    folder = None if name is None else FOLDER / name
    return fastlora.train(model, TOKENIZER, rows, output_dir=folder, **settings | given)[1]


def losses(*args: Any, **given: Any) -> list[float]:
    return [round(x, 4) for x in run(*args, **given).losses]


def form(rows):
    return lambda: dict(losses=losses(rows), trained=run(rows).tokens[0])


def weight_zero():
    rows = [
        {"messages": [*r["messages"], *[m | {"weight": 0} for m in r["messages"]]]}
        for r in ROWS[:4]
    ]
    same = [{"messages": [*r["messages"], *r["messages"]]} for r in ROWS[:4]]
    count = lambda rows: run(rows, max_steps=1).tokens
    return dict(trained_with_weight_0=count(rows), without_the_key=count(same))


def packing():
    return dict(
        padded=losses(ROWS[:4], max_steps=1),
        packed=losses(ROWS[:4], max_steps=1, packing=True, length=512),
    )


def resume():
    same = dict(dropout=0.1, max_steps=6, save_every=3)
    run(name="whole", **same)
    run(name="parts", resume=FOLDER / "whole/checkpoint-3", **same)
    a, b = (load_file(FOLDER / x / "adapter_model.safetensors") for x in ("whole", "parts"))
    return dict(same_bits=all(torch.equal(a[k], b[k]) for k in a))


def too_long():
    return {
        way: losses(length=40, too_long=way, packing=True) for way in ("drop", "truncate", "split")
    }


def early():
    history = run(
        eval_data=ROWS[:4], max_steps=9, learning_rate=0.5, eval_every=1, early_stopping=1
    )
    return dict(stopped_after=len(history.steps), of=9)


def nan():
    model = fastlora.lora(BASE, r=4)
    model = model.with_adapter(
        torch.utils._pytree.tree_map(lambda x: torch.full_like(x, float("nan")), model.adapter)
    )
    return fastlora.train(model, TOKENIZER, ROWS, max_steps=3, progress=False)[1].losses


def files():
    run(name="files", max_steps=2, log="jsonl")
    return sorted(p.name for p in (FOLDER / "files").iterdir())


def schedules():
    given = dict(
        cosine={},
        linear={},
        constant={},
        cosine_with_restarts=dict(num_cycles=2),
        wsd=dict(num_decay_steps=1),
    )
    return {n: len(losses(lr_scheduler=n, lr_scheduler_kwargs=k)) for n, k in given.items()}


class Stream:
    """The methods by which fastlora knows an IterableDataset of Hugging Face's datasets."""

    def __iter__(self):
        return iter(ROWS)

    def take(self, n): ...

    def skip(self, n): ...


def cache():
    """Seconds of reading the same file twice, and the bytes of the file between."""
    os.environ["XDG_CACHE_HOME"] = str(FOLDER / "cache")
    path, limits, seconds = FOLDER / "many.jsonl", RowLimits(512), []
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS] * 3000))
    for _ in range(2):
        started = time.perf_counter()
        read_examples(path, TOKENIZER, limits)
        seconds.append(round(time.perf_counter() - started, 2))
    return dict(seconds=seconds, bytes=[p.stat().st_size for p in FOLDER.glob("cache/*/*/*.rows")])


def script(*command: object) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, *map(str, command))
    return subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, check=True)


def live_page():
    shown = script("watch.py", FOLDER / "files", "--once").stdout
    return dict(
        shown=shown.split("/")[-1].strip(), bytes=(FOLDER / "files/watch.html").stat().st_size
    )


def one_command():
    config = FOLDER / "run.toml"
    config.write_text("max_steps = 2\nmax_seq_length = 512\nprogress = false\n")
    done = script("finetune.py", "--config", config, "--output", FOLDER / "command")
    return done.stdout.strip().splitlines()[-1]


POINTS = {f"rows: {n}": form(rows) for n, rows in FORMS.items()} | {
    "weight_zero": weight_zero,
    "too_long": lambda: losses(length=24),
    "too_long: ways": too_long,
    "packing": packing,
    "schedules": schedules,
    "loraplus": lambda: losses(learning_rates={"B": 16e-3}),
    "neftune": lambda: losses(neftune_alpha=5.0),
    "best": lambda: losses(
        name="best",
        eval_data=ROWS[:4],
        max_steps=3,
        learning_rate=0.5,
        eval_every=1,
        keep_best=True,
        save_every=1,
    ),
    "early": early,
    "resume": resume,
    "resume_with_other_settings": lambda: losses(
        name="other", max_steps=6, learning_rate=5e-2, resume=FOLDER / "whole/checkpoint-3"
    ),
    "nan": nan,
    "files": files,
    "card": lambda: len((FOLDER / "files/README.md").read_text().split()),
    "plot": lambda: run().plot(FOLDER / "losses.png") or (FOLDER / "losses.png").stat().st_size,
    "tensorboard": lambda: losses(name="tb", log="tensorboard"),
    "bad_row": lambda: losses([*ROWS, {"messages": None}]),
    "bad_row: skip": lambda: losses([*ROWS, {"messages": None}], on_bad_row="skip"),
    "overwrites": lambda: [losses(name="twice", learning_rate=x) for x in (1e-3, 2e-3)],
    "unknown setting": lambda: losses(neftune_noise_alpha=5.0),
    "losses": lambda: losses(loss="dft"),
    "streaming": lambda: losses(Stream(), max_steps=3),
    "cache": cache,
    "live page": live_page,
    "one command": one_command,
}

if __name__ == "__main__":
    print(json.dumps(dict(library="fastlora", point="versions", result=fastlora.__version__)))
    try_points("fastlora", POINTS)
