"""Points with mlx-lm's `lora` command: mlx_side.py FOLDER > ROWS."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx_lm
import numpy as np
from points import DEMO, FORMS, ROWS, try_points
from safetensors.numpy import load_file

FOLDER = Path(sys.argv[1])
SCHEDULES = {
    "cosine_decay": [4],
    "linear_schedule": [0.0, 4],
    "exponential_decay": [0.9],
    "warmup_stable_decay": [4],
}


def run(
    rows: list[dict], name: str = "run", iters: int = 4, seed: int = 0, **config: Any
) -> dict[str, Any]:
    data, adapter = FOLDER / f"{name}-data", FOLDER / name
    data.mkdir(parents=True, exist_ok=True)
    for part in ("train", "valid"):
        (data / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = dict(
        model=str(DEMO),
        train=True,
        data=str(data),
        adapter_path=str(adapter),
        iters=iters,
        batch_size=4,
        steps_per_report=1,
        steps_per_eval=100,
        val_batches=1,
        learning_rate=1e-3,
        num_layers=-1,
        seed=seed,
    )
    (FOLDER / f"{name}.yaml").write_text(json.dumps(settings | config))
    done = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "lora", "-c", FOLDER / f"{name}.yaml"],
        capture_output=True,
        text=True,
    )
    # The table of losses has colours, and an arrow in each row.
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    seen = [line for line in lines if re.search("[▲▼]|WARNING|[Tt]runcat|nan", line)][:6]
    files = sorted(path.name for path in adapter.glob("*"))
    return dict(rc=done.returncode, seen=seen if done.returncode == 0 else lines[-2:], files=files)


def resume():
    run(ROWS, "whole", iters=6, save_every=3)
    run(
        ROWS,
        "parts",
        iters=3,
        save_every=3,
        resume_adapter_file=str(FOLDER / "whole/0000003_adapters.safetensors"),
    )
    a, b = (load_file(FOLDER / x / "adapters.safetensors") for x in ("whole", "parts"))
    return dict(
        same_bits=all(np.array_equal(a[k], b[k]) for k in a),
        largest_difference=max(float(np.abs(a[k] - b[k]).max()) for k in a),
    )


POINTS = {
    "unknown setting": lambda: run(ROWS, "unknown", packing=True, early_stopping=1),
    "bad_row": lambda: run([*ROWS, {"messages": None}], "bad"),
    "nan": lambda: run(ROWS, "nan", learning_rate=1e38),
    "loggers: jsonl": lambda: run(ROWS, "log", report_to="jsonl"),
    "loggers: wandb": lambda: run(ROWS, "wandb", report_to="wandb"),
    "overwrites": lambda: [run(ROWS, "twice", iters=1), run(ROWS, "twice", iters=1)],
    "masks": lambda: run(ROWS, "masked", mask_prompt=True),
    "masks of text": lambda: run(FORMS["text"], "maskedtext", mask_prompt=True),
    "too_long": lambda: run(ROWS, "long", max_seq_length=24),
    "resume": resume,
    **{f"rows: {n}": lambda rows=rows, n=n: run(rows, n.split()[0]) for n, rows in FORMS.items()},
    **{
        f"schedule: {name}": lambda name=name, end=end: run(
            ROWS, name, lr_schedule=dict(name=name, warmup=1, arguments=[1e-3, *end])
        )
        for name, end in SCHEDULES.items()
    },
}

if __name__ == "__main__":
    print(json.dumps(dict(library="mlx-lm", point="versions", result=mlx_lm.__version__)))
    try_points("mlx-lm", POINTS)
