"""Points with TRL's SFTTrainer, or the same with Unsloth: trl_side.py trl|unsloth FOLDER > ROWS."""

import sys

if sys.argv[1] == "unsloth":
    import unsloth  # before trl and transformers, which it patches

# isort: split
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer
from points import DEMO, FORMS, ROWS, try_points
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

LIBRARY, FOLDER = sys.argv[1], Path(sys.argv[2])
TARGETS = ["q_proj", "v_proj", "down_proj"]
TOKENIZER = transformers.AutoTokenizer.from_pretrained(DEMO)


def trainer(rows: Any, name: str = "run", dropout: float = 0.0, given: dict | None = None, **more):
    if LIBRARY == "unsloth":
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            str(DEMO), max_seq_length=512, dtype="float32", load_in_4bit=False
        )
        model = unsloth.FastLanguageModel.get_peft_model(
            model, r=4, lora_alpha=4, lora_dropout=dropout, target_modules=TARGETS
        )
        peft_config = None
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
        peft_config = LoraConfig(
            r=4, lora_alpha=4, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
    settings = dict(
        output_dir=str(FOLDER / name),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
    )
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings | more),
        train_dataset=data,
        processing_class=TOKENIZER,
        peft_config=peft_config,
        **given or {},
    )


def losses(made) -> list[float]:
    made.train()
    return [round(x["loss"], 4) for x in made.state.log_history if "loss" in x]


def form(rows):
    def point():
        made = trainer(rows)
        batch = next(iter(made.get_train_dataloader()))
        return dict(
            losses=losses(made),
            trained=int((batch["labels"] != -100).sum()),
            tokens=batch["labels"].numel(),
        )

    return point


def masks_without_generation_block():
    plain = TOKENIZER.chat_template.replace("{%- generation -%}", "").replace(
        "{%- endgeneration -%}", ""
    )
    kept, TOKENIZER.chat_template = TOKENIZER.chat_template, plain
    try:
        return losses(trainer(ROWS, assistant_only_loss=True))
    finally:
        TOKENIZER.chat_template = kept


def trained(made) -> list[int]:
    """Tokens of each row that are trained."""
    return [sum(label != -100 for label in row) for row in made.train_dataset["labels"]]


def masks():
    return dict(trained=sum(trained(trainer(ROWS, assistant_only_loss=True))))


def weight_zero():
    off = lambda row: [message | {"weight": 0} for message in row["messages"]]
    rows = [{"messages": [*row["messages"], *off(row)]} for row in ROWS[:4]]
    same = [{"messages": [*row["messages"], *row["messages"]]} for row in ROWS[:4]]
    count = lambda rows: sum(trained(trainer(rows, assistant_only_loss=True)))
    return dict(trained_with_weight_0=count(rows), without_the_key=count(same))


def too_long():
    made = trainer(ROWS, max_length=24, assistant_only_loss=True)
    return dict(rows_left=len(trained(made)), of=len(ROWS), trained=sum(trained(made)))


def packing():
    """Does a document of a packed row see the one before? Loss of a batch, packed and padded."""
    rows = ROWS[:4]
    padded = trainer(rows, per_device_train_batch_size=4, max_steps=1, learning_rate=0.0)
    packed = trainer(
        rows,
        per_device_train_batch_size=1,
        max_steps=1,
        packing=True,
        max_length=512,
        learning_rate=0.0,
    )
    return dict(padded=losses(padded), packed=losses(packed), packed_rows=len(packed.train_dataset))


def streaming():
    return losses(trainer(IterableDataset.from_generator(lambda: iter(FORMS["messages"]))))


def schedules():
    given = dict(
        cosine={},
        linear={},
        constant={},
        cosine_with_restarts=dict(num_cycles=2),
        warmup_stable_decay=dict(num_decay_steps=1),
    )
    return {
        n: len(losses(trainer(ROWS, lr_scheduler_type=n, lr_scheduler_kwargs=k)))
        for n, k in given.items()
    }


def loraplus():
    made = trainer(ROWS)
    made.optimizer = create_loraplus_optimizer(
        made.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16
    )
    return losses(made)


EVAL = dict(
    eval_strategy="steps",
    eval_steps=1,
    save_strategy="steps",
    save_steps=1,
    load_best_model_at_end=True,
    metric_for_best_model="eval_loss",
)


def best():
    made = trainer(
        ROWS,
        "best",
        given=dict(eval_dataset=Dataset.from_list(ROWS[:4])),
        max_steps=3,
        learning_rate=0.5,
        **EVAL,
    )
    made.train()
    return dict(
        best=made.state.best_model_checkpoint,
        evals=[x["eval_loss"] for x in made.state.log_history if "eval_loss" in x],
    )


def early():
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=1)
    made = trainer(
        ROWS,
        "early",
        given=dict(eval_dataset=Dataset.from_list(ROWS[:4]), callbacks=[stop]),
        max_steps=9,
        learning_rate=0.5,
        **EVAL,
    )
    made.train()
    return dict(stopped_after=made.state.global_step, of=9)


def resume():
    """Adapter bits of six steps with dropout, and of three, reseeded generators, three more."""
    settings = dict(dropout=0.1, max_steps=6, save_strategy="steps", save_steps=3)
    trainer(ROWS, "whole", **settings).train()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    trainer(ROWS, "parts", **settings).train(
        resume_from_checkpoint=str(FOLDER / "whole/checkpoint-3")
    )
    a, b = (
        load_file(FOLDER / x / "checkpoint-6/adapter_model.safetensors") for x in ("whole", "parts")
    )
    return dict(
        same_bits=all(torch.equal(a[k], b[k]) for k in a),
        largest_difference=max(float((a[k] - b[k]).abs().max()) for k in a),
    )


def resume_with_other_settings():
    made = trainer(
        ROWS[:12], "other", max_steps=6, learning_rate=5e-2, per_device_train_batch_size=2
    )
    made.train(resume_from_checkpoint=str(FOLDER / "whole/checkpoint-3"))
    return "accepted"


def nan():
    made = trainer(ROWS, max_steps=3)
    with torch.no_grad():
        next(p for p in made.model.parameters() if p.requires_grad).fill_(float("nan"))
    return dict(losses=losses(made), went_on=made.state.global_step)


def files():
    made = trainer(ROWS, "files")
    made.train(), made.save_model()
    return sorted(p.name for p in (FOLDER / "files").iterdir())


def card():
    text = (FOLDER / "files/README.md").read_text() if (FOLDER / "files/README.md").exists() else ""
    return dict(
        words=len(text.split()),
        has_loss="loss" in text.lower(),
        has_learning_rate="learning" in text.lower(),
    )


def tensorboard():
    return losses(trainer(ROWS, report_to="tensorboard"))


def bad_row():
    return losses(trainer([*ROWS, {"messages": None}]))


def overwrites():
    for _ in range(2):
        made = trainer(ROWS, "files")
        made.train(), made.save_model()
    return "the second run wrote over the first"


def objectives():
    return [
        n
        for n in (
            "DPOTrainer",
            "ORPOTrainer",
            "KTOTrainer",
            "GRPOTrainer",
            "CPOTrainer",
            "RewardTrainer",
            "GKDTrainer",
        )
        if hasattr(trl, n)
    ] + [losses(trainer(ROWS, loss_type="dft"))]


POINTS = (
    {f"rows: {n}": form(rows) for n, rows in FORMS.items()}
    | {
        f.__name__: f
        for f in (
            masks,
            masks_without_generation_block,
            weight_zero,
            too_long,
            packing,
            streaming,
            schedules,
            loraplus,
            best,
            early,
            resume,
            resume_with_other_settings,
            nan,
            files,
            card,
            tensorboard,
            bad_row,
            overwrites,
            objectives,
        )
    }
    | {"neftune": lambda: losses(trainer(ROWS, neftune_noise_alpha=5.0))}
)

if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    print(
        json.dumps(
            dict(
                library=LIBRARY,
                point="versions",
                result={m.__name__: m.__version__ for m in (trl, transformers, torch)},
            )
        )
    )
    try_points(LIBRARY, POINTS)
