"""Unsloth's job of compare.py: unsloth_job.py MODEL ROWS OUTPUT --steps N [--packing]."""

# isort: off
from unsloth import FastLanguageModel  # before trl and transformers, which it patches

# isort: on
import argparse
import json
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class Stamps(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.time())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "rows", "output"):
        parser.add_argument(name)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--started", type=float, default=time.time(), help="time.time()")
    parser.add_argument("--packing", action="store_true")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    model, tokenizer = FastLanguageModel.from_pretrained(
        args.model,
        max_seq_length=args.length,
        load_in_4bit=False,
        dtype=torch.bfloat16 if cuda else None,
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, use_gradient_checkpointing=False
    )
    ready, stamps = time.time(), Stamps()
    chats = [json.loads(line)["messages"] for line in open(args.rows)]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    settings = SFTConfig(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,  # Unsloth's own default is 2
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.03 * args.steps),
        packing=args.packing,
        max_length=args.length,
        dataset_text_field="text",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=cuda,
        optim="adamw_torch_fused",
        include_num_input_tokens_seen="all",
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts}),
        args=settings,
        callbacks=[stamps],
    )
    trainer.train()
    model.save_pretrained(args.output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures = dict(
        ready_s=ready - args.started,
        first_step_s=stamps.times[0] - ready,
        other_steps_s=stamps.times[-1] - stamps.times[0],
        tokens=int(trainer.state.num_input_tokens_seen or 0),
        first_loss=losses[0],
        last_loss=losses[-1],
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
    )
    print("RESULT", json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
