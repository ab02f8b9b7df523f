"""Fine-tune a Llama with LoRA, and show what changed.

    python scripts/finetune.py                                     # the demo: minutes on two cores
    python scripts/finetune.py --model meta-llama/Llama-3.2-1B-Instruct --data rows.jsonl
    python scripts/finetune.py --config run.toml --seed 1          # options from a file
    python scripts/finetune.py --repeat runs/adapter/run.json      # the same bits, or what differs
    torchrun --nproc-per-node 8 scripts/finetune.py --model ...    # on 8 GPUs

The arguments of fastlora.lora and fastlora.train are options, except loftq_config and functions;
regular expressions, chats and nested values need --config. Exit codes are in --help. Needs tyro:
pip install -e '.[cli]'. Copy this file and change it: `run` shows the steps of a run in order.
"""

import dataclasses
import gc
import sys
from pathlib import Path
from typing import Any

from finetuning.bytecode import keep_bytecode

if __name__ == "__main__":  # before torch is imported
    keep_bytecode()
    # Importing torch makes a million objects that stay. Looking at them again and again takes
    # Python's collector a tenth of the time to the first step, and a step leaves it no tensors.
    gc.set_threshold(100_000)

import torch
from finetuning.ending import OTHER_BITS, user_errors
from finetuning.forecast import forecast
from finetuning.held_out import data_of, described, heldout_loss, prompts_of
from finetuning.options import arguments_for, parse
from finetuning.ranks import on_first_rank, resumes, silent_unless_first, step_size
from finetuning.repeat import differences, note_options
from finetuning.toml import to_toml

import fastlora
from fastlora.adapters.lora_arguments import LoraArguments
from fastlora.training.settings import Settings, check_train_arguments


@user_errors()
def main() -> None:
    with silent_unless_first():
        code = run(parse(sys.argv[1:]))
    raise SystemExit(code)


def run(args: Any) -> int:
    """Train, save and reload; returns the exit code."""
    data, heldout = data_of(args)
    base, tokenizer = load_base(args)
    # Packed sequences have the model's length, and long ones need much memory.
    length = min(2048, base.spec.max_seq_length) if args.max_seq_length is None else None
    settings = arguments_for(LoraArguments, args)
    model = fastlora.lora(base, **settings, max_seq_length=length, random_state=args.seed)
    args = resolved(args, model)
    print(to_toml(args))
    print(f"{step_size(args)}\n{forecast(model, args)}")
    model.print_trainable_parameters()
    print(f"rows to train on: {described(data)}; held out: {described(heldout)}")
    given = dict(
        eval_data=heldout,
        output_dir=args.output,
        resume="auto" if resumes(args) else False,
        log=args.log if isinstance(args.log, str) else list(args.log),
        progress=args.progress,
    )
    settings = arguments_for(Settings, args)
    # train checks them too, but after the first samples.
    check_train_arguments(
        Settings(**settings), model=model, tokenizer=tokenizer, data=data, **given
    )
    if args.dry_run:
        return 0

    before = None
    # A row that several ranks have together may not fit one of them.
    if heldout and args.loss == "sft" and args.context_parallel == 1:
        before = heldout_loss(model, tokenizer, heldout, args)
        print(f"\nbefore: held-out loss {before:.3f} nats per token")
    show_samples(model, tokenizer, heldout, args)

    if not resumes(args):
        on_first_rank(make_room, args.output)
    model, history = fastlora.train(model, tokenizer, data, **given, **settings)
    on_first_rank(note_options, args.output, dataclasses.asdict(args))

    print(f"\nafter {len(history.steps)} steps", end="")
    if heldout:
        after = min(history.eval_losses) if args.keep_best else history.eval_losses[-1]
        print(f": held-out loss {after:.3f}", end="")
        print("" if before is None else f", it was {before:.3f}")
    show_samples(model, tokenizer, heldout, args)

    reloaded = fastlora.load_adapter(base, args.output)
    ids = torch.tensor([tokenizer.encode("def reload(adapter):")]).to(base.base["norm"].device)
    difference = (model(ids) - reloaded(ids)).abs().max().item()
    verdict = f"largest difference of two logits: {difference:g}"
    if difference:
        raise SystemExit(f"the model reloaded from {args.output} differs; {verdict}")
    print(f"\nsaved to {args.output}; the reloaded model agrees; {verdict}")
    return 0 if args.repeat is None else report_repeat(args.repeat, args.output)


def load_base(args: Any) -> tuple[fastlora.Model, fastlora.Tokenizer]:
    """The base model and its tokenizer."""
    base, tokenizer = fastlora.load(
        args.model,
        revision=args.revision,
        dtype=args.dtype,
        max_seq_length=args.max_seq_length,
        load_in_4bit=args.load_in_4bit,
        base_precision=args.base_precision,
    )
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer.json; training on text needs one.")
    return base, tokenizer


def resolved(args: Any, model: fastlora.Model) -> Any:
    """The options with the values that depend on the model."""
    # 2e-4 suits models of hidden size 2048; narrower models need a higher learning rate.
    scaled_rate = 2e-4 * 2048 / model.spec.config.hidden_size
    rate = scaled_rate if args.learning_rate is None else args.learning_rate
    length = model.spec.max_seq_length
    return dataclasses.replace(args, learning_rate=rate, max_seq_length=length)


def show_samples(model, tokenizer, heldout, args: Any) -> None:
    """Print greedy replies to held-out prompts beside the replies of the rows."""
    tokenizer = tokenizer.with_template_kwargs(args.template_kwargs or {})
    for prompt, expected in prompts_of(heldout or [], args):
        reply = model.generate_text(tokenizer, prompt, max_new_tokens=32)
        shown = str(prompt[-1]["content"]).replace("\n", "\n  ")
        print(f"  {shown}\n    model: {reply!r}\n    row:   {expected!r}")


def make_room(folder: Path) -> None:
    """Rename the output folder of an earlier run: runs/adapter to runs/adapter.1, or .2, ..."""
    is_run = (folder / "adapter_config.json").is_file() or any(folder.glob("checkpoint-*"))
    if not is_run:
        return
    number = 1
    while (moved := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(moved)
    print(f"{folder} was the folder of an earlier run; it is {moved} now")


def report_repeat(before: Path, after: Path) -> int:
    """Say what a repeated run has in common with the first; returns the exit code."""
    if not (lines := differences(before, after)):
        print(f"{after} has the same bits as {before.parent}")
        return 0
    print(f"{after} differs from {before.parent} in:\n  " + "\n  ".join(lines))
    return OTHER_BITS


if __name__ == "__main__":
    main()
