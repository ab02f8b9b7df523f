"""fastlora's job of compare.py: fastlora_job.py MODEL ROWS OUTPUT --steps N."""

import argparse
import json
import shutil
import time

import torch

import fastlora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "rows", "output"):
        parser.add_argument(name)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--started", type=float, default=time.time(), help="time.time()")
    args = parser.parse_args()
    shutil.rmtree(args.output, ignore_errors=True)  # train does not write over another run
    model, tokenizer = fastlora.load(args.model, max_seq_length=args.length)
    model = fastlora.lora(model, r=16, lora_alpha=16)
    ready, stamps = time.time(), []
    _, history = fastlora.train(
        model,
        tokenizer,
        args.rows,
        max_steps=args.steps,
        batch_size=4,
        train_on="all",
        too_long="truncate",
        output_dir=args.output,
        log=lambda record: stamps.append(time.time()),
        progress=False,
    )
    cuda = torch.cuda.is_available()
    figures = dict(
        ready_s=ready - args.started,
        first_step_s=stamps[0] - ready,
        other_steps_s=stamps[-1] - stamps[0],
        tokens=sum(history.tokens),
        first_loss=history.losses[0],
        last_loss=history.losses[-1],
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
    )
    print("RESULT", json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
