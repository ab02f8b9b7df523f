"""Merge an adapter into its base and write a Hugging Face folder without an adapter.

python scripts/merge.py runs/adapter runs/merged
python scripts/merge.py runs/adapter runs/merged --load-in-4bit    # an adapter trained over 4 bits
"""

import argparse
from pathlib import Path

from finetuning.ending import user_errors

import fastlora


@user_errors()
def main() -> None:
    merge(arguments())


def merge(given: argparse.Namespace) -> None:
    """Load the adapter with its base, and write the merged folder."""
    model, tokenizer = fastlora.load(
        given.adapter,
        device=given.device,
        load_in_4bit=given.load_in_4bit,
        base_precision=given.base_precision,
    )
    report = model.save_pretrained_merged(
        given.output, tokenizer, save_method=given.save_method, base=given.base
    )
    print(f"wrote {given.output} ({given.save_method})")
    if report:
        print(
            f"the adapter was added to the {report.base} weights; the logits of the folder differ"
            f" by at most {report.logit_difference:.3g} from the model's"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("adapter", help="adapter folder or Hub id; it names its base")
    add("output", type=Path, help="folder to write")
    add("--save-method", default="merged_16bit", choices=("merged_16bit", "merged_4bit", "lora"))
    add("--load-in-4bit", action="store_true", help="the adapter was trained over a 4-bit base")
    add("--base-precision", default="checkpoint", help='"fp8": it was trained over a base in e4m3')
    add("--base", default="auto", help='of a quantised base: "original", "dequantized", a folder')
    add("--device", default="cpu", help="device that merges; the CPU usually has more memory")
    return parser.parse_args()


if __name__ == "__main__":
    main()
