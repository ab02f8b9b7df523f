"""Fine-tune a Llama with LoRA, and show what changed.

    python scripts/finetune.py                                     # the demo: minutes on two cores
    python scripts/finetune.py --model meta-llama/Llama-3.2-1B-Instruct --data rows.jsonl

Copy this file and change it: `main` shows the steps of a run in order.
"""

import argparse
from pathlib import Path

import torch

import fastlora
from fastlora.checkpoints.hub import DEMO
from fastlora.data.batches import batches, count_trained_tokens
from fastlora.data.encoding import encode_rows
from fastlora.data.packing import pack
from fastlora.data.rows import read_rows


def main() -> None:
    args = parse_arguments()
    rows, heldout = read_data(args.data, args.eval_data)
    # Most CPUs compute bfloat16 slower than float32.
    dtype = "auto" if torch.cuda.is_available() else "float32"
    base, tokenizer = fastlora.load(
        args.model,
        dtype=dtype,
        max_seq_length=args.max_seq_length,
        load_in_4bit=args.load_in_4bit,
    )
    if tokenizer is None:
        raise SystemExit(f"{args.model} has no tokenizer.json; training on text needs one.")
    model = fastlora.lora(base, r=args.r, lora_alpha=args.r, random_state=args.seed)
    model.print_trainable_parameters()
    print(f"{len(rows):,} rows to train on, {len(heldout):,} held out")

    before = heldout_loss(model, tokenizer, heldout)
    print(f"\nbefore: held-out loss {before:.3f} nats per token")
    show_samples(model, tokenizer, heldout)

    # 2e-4 suits models of hidden size 2048; narrower models need a higher learning rate.
    scaled_rate = 2e-4 * 2048 / model.spec.config.hidden_size
    model, history = fastlora.train(
        model,
        tokenizer,
        rows,
        num_epochs=args.epochs,
        max_steps=args.max_steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate or scaled_rate,
        seed=args.seed,
    )

    after = heldout_loss(model, tokenizer, heldout)
    print(f"\nafter {len(history.steps)} steps: held-out loss {after:.3f}, it was {before:.3f}")
    show_samples(model, tokenizer, heldout)

    model.save_pretrained(args.output)
    reloaded = fastlora.load_adapter(base, args.output)
    ids = torch.tensor([tokenizer.encode("def reload(adapter):")]).to(base.base["norm"].device)
    difference = (model(ids) - reloaded(ids)).abs().max().item()
    verdict = f"largest difference of two logits: {difference:g}"
    if difference:
        raise SystemExit(f"the model reloaded from {args.output} differs; {verdict}")
    print(f"\nsaved to {args.output}; the reloaded model agrees; {verdict}")


def read_data(data: Path, eval_data: Path | None) -> tuple[list[dict], list[dict]]:
    """Rows to train on, and held-out rows: those of `eval_data`, or one row in twenty of `data`."""
    rows = read_rows(data)
    if eval_data is None and data != DEMO / "train.jsonl":
        return [row for i, row in enumerate(rows) if i % 20], rows[::20]
    return rows, read_rows(eval_data or DEMO / "heldout.jsonl")


@torch.no_grad()
def heldout_loss(model, tokenizer, rows: list[dict]) -> float:
    """Mean of -log p over the tokens of the replies, in nats."""
    length = model.spec.max_seq_length
    examples = encode_rows(rows, tokenizer, max_seq_length=length)
    device, total, count = model.base["norm"].device, 0.0, 0
    for batch in batches(pack(examples, length), 8, seed=None):
        trained = count_trained_tokens(batch)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        total, count = total + trained * model.loss(batch).item(), count + trained
    return total / count


def show_samples(model, tokenizer, rows: list[dict], number: int = 3) -> None:
    """Print greedy replies to held-out prompts beside the replies of the rows."""
    prompts = [
        (row["messages"][:-1], row["messages"][-1]["content"]) for row in rows if "messages" in row
    ]
    for prompt, expected in prompts[:: max(1, len(prompts) // number)][:number]:
        reply = model.generate_text(tokenizer, prompt, max_new_tokens=32)
        shown = prompt[-1]["content"].replace("\n", "\n  ")
        print(f"  {shown}\n    model: {reply!r}\n    row:   {expected!r}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="demo", help='"demo", a folder, or a Hub id')
    add("--data", type=Path, default=DEMO / "train.jsonl", help="JSONL: chat, prompt, Alpaca, text")
    add("--eval-data", type=Path, help="JSONL; default: hold out one row in twenty")
    add("--output", type=Path, default=Path("runs/adapter"), help="PEFT folder to write")
    add("--load-in-4bit", action="store_true", help="QLoRA: the base in NF4")
    add("--max-seq-length", type=int)
    add("--r", type=int, default=16)
    add("--epochs", type=float, default=2)
    add("--max-steps", type=int)
    add("--batch-size", type=int, default=4, help="packed sequences per step")
    add("--learning-rate", type=float, help="default: 2e-4 * 2048 / hidden_size")
    add("--seed", type=int, default=3407)
    return parser.parse_args()


if __name__ == "__main__":
    main()
