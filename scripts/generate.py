"""Print a model's reply while it is generated.

python scripts/generate.py --model runs/adapter "# shutil
def copytree(src, dst):"
python scripts/generate.py --plain --temperature 0.8 "def binary_search("
"""

import argparse

import torch
from finetuning.ending import user_errors

import fastlora
from fastlora.arguments import number, option, whole_number
from fastlora.generation.sampling import SEED


@user_errors()
def main() -> None:
    generate(arguments())


def generate(given: argparse.Namespace) -> None:
    """Load the model, and print its reply piece by piece."""
    dtype = "auto" if torch.cuda.is_available() else "float32"  # bfloat16 is slow on most CPUs
    how = {"load_in_4bit": given.load_in_4bit, "base_precision": given.base_precision}
    model, tokenizer = fastlora.load(given.model, dtype=dtype, **how)
    if tokenizer is None:
        raise ValueError(f"{given.model} has no tokenizer.json; generating text needs one.")
    messages = [{"role": "user", "content": given.prompt}]
    if given.system:
        messages.insert(0, {"role": "system", "content": given.system})
    if given.plain:
        print(given.prompt, end="")
    model.generate_text(
        tokenizer,
        given.prompt if given.plain else messages,
        max_new_tokens=given.max_new_tokens,
        temperature=given.temperature,
        top_p=given.top_p,
        seed=given.seed,
        stream=lambda piece: print(piece, end="", flush=True),
    )
    print()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("prompt")
    add("--model", default="demo", help='"demo", a model or adapter folder, or a Hub id')
    add("--load-in-4bit", action="store_true", help="quantise the base to NF4")
    add("--base-precision", default="checkpoint", help='"fp8": quantise the base to e4m3')
    add("--system", help="system message")
    add("--plain", action="store_true", help="continue the prompt, without chat template")
    add("--max-new-tokens", type=option(int, whole_number(1)), default=128)
    add("--temperature", type=option(float, number(low=0)), default=0.0, help="0 is greedy")
    add("--top-p", type=option(float, number(above=0, high=1)))
    add("--seed", type=option(int, SEED), help="seed of the sampling")
    return parser.parse_args()


if __name__ == "__main__":
    main()
