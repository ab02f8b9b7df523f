"""A run of the demo on several ranks; with --kill, a rank ends in the middle of its first attempt.

torchrun --nproc-per-node N --max-restarts 1 kill.py OUT [--kill STEP]
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import fastlora
from fastlora.checkpoints.hub import DEMO
from fastlora.training.logging.open import on_all_ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kill", type=int)
    args = parser.parse_args()
    model, tokenizer = fastlora.load("demo", max_seq_length=256)
    # The law is about restarts; compiling a tiny model three times would take most of the time.
    model = fastlora.lora(model, r=8, lora_dropout=0.1).with_spec(compile=False)
    last = int(os.environ["WORLD_SIZE"]) - 1

    def log(record: dict[str, Any]) -> None:
        if record["step"] == args.kill and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            if int(os.environ["RANK"]) == last:
                os.kill(os.getpid(), signal.SIGKILL)

    given: dict[str, Any] = dict(max_steps=8, save_every=3, resume="auto", progress=False)
    given |= dict(batch_size=2, log=on_all_ranks(log), output_dir=args.out)
    fastlora.train(model, tokenizer, DEMO / "train.jsonl", **given)


if __name__ == "__main__":
    main()
