"""Fold an adapter into its base, and write a Hugging Face folder that needs no adapter.

python scripts/merge.py runs/adapter runs/merged
"""

import argparse
from pathlib import Path

import fastlora


def main() -> None:
    given = arguments()
    model, tokenizer = fastlora.load(given.adapter, device=given.device)
    model.save_pretrained_merged(given.output, tokenizer, save_method=given.save_method)
    print(f"wrote {given.output} ({given.save_method})")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("adapter", help="adapter folder or Hub id; it names its base")
    add("output", type=Path, help="folder to write")
    add("--save-method", default="merged_16bit", choices=("merged_16bit", "merged_4bit", "lora"))
    add("--device", default="cpu", help="where to multiply; the CPU has the memory")
    return parser.parse_args()


if __name__ == "__main__":
    main()
