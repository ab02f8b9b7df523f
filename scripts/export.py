"""Write an adapter, or the model with it, in the format of another program.

python scripts/export.py runs/adapter out/peft --format peft            # PEFT, vLLM
python scripts/export.py runs/adapter out/merged --format merged        # transformers, vLLM
python scripts/export.py runs/adapter out/merged4 --format merged-4bit  # transformers
python scripts/export.py runs/adapter out/model.gguf --format gguf --dtype q8_0 --verify
python scripts/export.py runs/adapter out/adapter.gguf --format gguf-adapter --verify
python scripts/export.py runs/adapter out/ollama --format ollama        # then: ollama create
python scripts/export.py runs/adapter out/mlx --format mlx              # mlx_lm.generate

The model may also be a folder or Hub id without an adapter, or "demo". GGUF formats need
pip install -e '.[gguf]'. fastlora/formats/README.md says which program reads what.
"""

import argparse
from pathlib import Path
from typing import Any

from finetuning.ending import user_errors

import fastlora
from fastlora.formats.mlx import save_mlx_adapter

FORMATS = ("peft", "merged", "merged-4bit", "gguf", "gguf-adapter", "ollama", "mlx")

# Options that only some formats read.
OPTIONS = {
    "dtype": ("gguf", "ollama"),
    "verify": ("gguf", "gguf-adapter"),
    "pre": ("gguf", "ollama"),
    "base": ("merged", "merged-4bit"),
}


@user_errors()
def main() -> None:
    export(arguments())


def export(given: argparse.Namespace) -> None:
    """Load the model, write it, and tell what was written."""
    model, tokenizer = fastlora.load(
        given.model,
        device=given.device,
        dtype=given.load_dtype,
        load_in_4bit=given.load_in_4bit,
        base_precision=given.base_precision,
    )
    if tokenizer is None and given.format in ("gguf", "ollama"):
        raise ValueError(
            f"{given.model} has no tokenizer.json, which --format {given.format} needs."
        )
    report = write(model, tokenizer, given)
    print(f"wrote {getattr(report, 'path', given.output)} ({given.format})")
    for line in lines(report):
        print(line)


def write(model: fastlora.Model, tokenizer: Any, given: argparse.Namespace) -> Any:
    """Write the files; returns the report of the format, if it has one."""
    gguf = {} if given.dtype is None else {"dtype": given.dtype}
    match given.format:
        case "peft":
            model.save_pretrained(given.output)
            if tokenizer is not None:
                tokenizer.save_pretrained(given.output)
        case "merged" | "merged-4bit":
            method = "merged_16bit" if given.format == "merged" else "merged_4bit"
            return model.save_pretrained_merged(given.output, tokenizer, method, base=given.base)
        case "gguf":
            return model.save_gguf(
                given.output, tokenizer, **gguf, verify=given.verify, pre=given.pre
            )
        case "gguf-adapter":
            return model.save_gguf_adapter(given.output, verify=given.verify)
        case "ollama":
            return model.save_ollama(given.output, tokenizer, **gguf, pre=given.pre)
        case "mlx":
            save_mlx_adapter(model, given.output)
    return None


def lines(report: Any) -> list[str]:
    """The contents of a report, one line each."""
    if report is None:
        return []
    if hasattr(report, "logit_difference"):
        return [
            f"the adapter was added to the {report.base} weights; logits differ by at most"
            f" {report.logit_difference:.3g}"
        ]
    if hasattr(report, "adapter"):
        parts = [x for x in (report.model, report.adapter) if x is not None]
        return [f"{x.path}: {x.bytes:,} bytes" for x in parts] + [n for x in parts for n in x.notes]
    found = [f"{report.bytes:,} bytes", *report.notes]
    if report.command is not None:
        found.append(f"next: {report.command}")
    if (v := report.verification) is not None:
        texts = f", {v.equal_texts} of {v.texts} texts tokenised alike" if v.texts else ""
        found.append(
            f"in llama.cpp: {v.equal_ids} of {v.greedy_ids} greedy ids equal, log-probabilities"
            f" within {v.logprob_difference:.2g}{texts}"
        )
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="adapter folder or Hub id, which names its base; a model; or demo")
    add("output", type=Path, help="file (gguf, gguf-adapter) or folder to write")
    add("--format", required=True, choices=FORMATS)
    add("--dtype", help='gguf and ollama: "bf16", "f32", "q8_0", "q4_0", ..., "q4_k_m"')
    add(
        "--verify", action="store_true", help="gguf, gguf-adapter: compare with llama.cpp's results"
    )
    add("--pre", help="gguf and ollama: llama.cpp's pre-tokenizer, if it has none for this one")
    add("--base", default="auto", help='of a quantised base: "original", "dequantized", a folder')
    add("--load-in-4bit", action="store_true", help="the adapter was trained over a 4-bit base")
    add("--base-precision", default="checkpoint", help='"fp8": it was trained over a base in e4m3')
    add("--load-dtype", default="auto", help="dtype of the base in memory")
    add("--device", default="cpu", help="device that merges; the CPU usually has more memory")
    given = parser.parse_args()
    for option, formats in OPTIONS.items():
        if given.format not in formats and getattr(given, option) != parser.get_default(option):
            parser.error(
                f"--{option} has no effect with --format {given.format}; it is for"
                f" {' and '.join(formats)}"
            )
    return given


if __name__ == "__main__":
    main()
