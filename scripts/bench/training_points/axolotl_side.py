"""Points with axolotl's command: axolotl_side.py FOLDER > ROWS."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import axolotl
import torch
from points import DEMO, FORMS, ROWS, try_points
from safetensors.torch import load_file

FOLDER = Path(sys.argv[1])
TYPES = {
    "messages": dict(type="chat_template", field_messages="messages"),
    "prompt": dict(
        type=dict(field_instruction="prompt", field_output="completion", format="{instruction}")
    ),
    "text": dict(type="completion"),
    "Alpaca": dict(type="alpaca"),
    "ShareGPT": dict(
        type="chat_template",
        field_messages="conversations",
        message_property_mappings=dict(role="from", content="value"),
    ),
}


def run(
    form: str = "messages", name: str = "run", rows: list[dict] | None = None, **config: Any
) -> dict[str, Any]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    data, out = FOLDER / f"{name}.jsonl", FOLDER / name
    rows = rows or FORMS[next(n for n in FORMS if n.startswith(form))]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    dataset = dict(path=str(data), ds_type="json", **TYPES[form])
    settings = dict(
        base_model=str(DEMO),
        datasets=[dataset],
        output_dir=str(out),
        adapter="lora",
        lora_r=4,
        lora_alpha=4,
        lora_target_modules=["q_proj", "v_proj"],
        sequence_len=128,
        micro_batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=2,
        learning_rate=1e-3,
        optimizer="adamw_torch",
        lr_scheduler="cosine",
        bf16=False,
        fp16=False,
        tf32=False,
        dataset_prepared_path=str(FOLDER / f"{name}-prepared"),
        logging_steps=1,
        val_set_size=0,
        save_strategy="no",
        sample_packing=False,
        seed=1,
        dataset_num_proc=1,
        chat_template="tokenizer_default",
    )
    path = FOLDER / f"{name}.yaml"
    path.write_text(json.dumps({k: v for k, v in (settings | config).items() if v is not None}))
    done = subprocess.run(
        [sys.executable, "-m", "axolotl.cli.main", "train", str(path), "--launcher", "python"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    text = done.stdout + done.stderr
    lines = [line[-250:] for line in text.splitlines() if line.strip()]
    seen = lines[-2:]
    if done.returncode == 0:
        seen = re.findall(r"'(?:loss|eval_loss)': '[^']*'|'tokens/trainable': \d+", text)
        seen += [line for line in lines if re.search("[Dd]ropp|[Tt]runcat|[Ss]kipp", line)][:3]
    return dict(rc=done.returncode, seen=seen, files=sorted(path.name for path in out.glob("*")))


def resume():
    same = dict(max_steps=4, lora_dropout=0.1, save_strategy=None, save_steps=2)
    seen = run(name="whole", **same)
    again = run(name="parts", resume_from_checkpoint=str(FOLDER / "whole/checkpoint-2"), **same)
    a, b = (
        load_file(FOLDER / x / "checkpoint-4/adapter_model.safetensors") for x in ("whole", "parts")
    )
    return dict(same_bits=all(torch.equal(a[k], b[k]) for k in a), rc=[seen["rc"], again["rc"]])


BEST = dict(
    val_set_size=0.2, eval_steps=1, save_strategy=None, save_steps=1, max_steps=6, learning_rate=0.5
)
POINTS = {f"rows: {n}": (lambda n=n: run(n, n)) for n in TYPES} | {
    "too_long": lambda: run(name="long", sequence_len=24),
    "packing": lambda: run(name="packed", sample_packing=True, pad_to_sequence_len=True),
    "unknown setting": lambda: run(name="unknown", learning_ratee=1.0),
    "neftune, LoRA+": lambda: run(name="extras", neftune_noise_alpha=5, loraplus_lr_ratio=16),
    "early, best": lambda: run(
        name="best", early_stopping_patience=1, load_best_model_at_end=True, **BEST
    ),
    "resume": resume,
    "bad_row": lambda: run(name="bad", rows=[*ROWS, {"messages": None}]),
    "schedules": lambda: run(name="sched", lr_scheduler="cosine_with_restarts"),
    "streaming": lambda: run(name="stream", streaming=True),
    "tensorboard": lambda: run(name="tb", use_tensorboard=True),
}

if __name__ == "__main__":
    print(json.dumps(dict(library="axolotl", point="versions", result=axolotl.__version__)))
    try_points("axolotl", POINTS)
