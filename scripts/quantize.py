"""Quantise a merged folder with torchao, with the scheme that qat_scheme trained for.

python scripts/merge.py runs/adapter runs/merged
python scripts/quantize.py runs/merged runs/int8 --scheme int8

Needs torchao and transformers, which fastlora does not install. transformers' from_pretrained loads
the written folder. int4 and the fp8 schemes need a GPU that torchao has kernels for.
"""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SCHEMES = ("int4", "int8", "fp8-int4", "fp8-fp8", "int8-int4")


def main() -> None:
    given = arguments()
    lacking = [n for n in ("torchao", "transformers") if importlib.util.find_spec(n) is None]
    if lacking:
        sys.exit(
            f"scripts/quantize.py needs {' and '.join(lacking)}: pip install torchao transformers"
        )
    quantise(given.merged, given.output, given.scheme, given.device)
    print(f"wrote {given.output} ({given.scheme})")


def quantise(merged: Path, output: Path, scheme: str, device: str) -> None:
    """Write `output` with quantised linear layers and head; int8-int4 adds the embedding."""
    transformers = importlib.import_module("transformers")
    model, source = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype="auto"), merged
    with TemporaryDirectory(dir=output.parent, prefix=".quantize-") as folder:
        if model.config.tie_word_embeddings:  # head and embedding are rounded in different ways
            model.config.tie_word_embeddings = False
            model.lm_head.weight = type(model.lm_head.weight)(model.lm_head.weight.detach().clone())
            model.save_pretrained(folder)
            source = folder
        how = transformers.TorchAoConfig(config(scheme), include_input_output_embeddings=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype="auto", quantization_config=how, device_map=device
        )
        model.save_pretrained(output)
    for file in merged.iterdir():  # copy the tokenizer files
        if not (output / file.name).exists() and ".safetensors" not in file.name:
            shutil.copy(file, output)


def config(scheme: str) -> Any:
    """torchao's config for all weights of a model; see fastlora/ops/quant/fake_quantize.py."""
    ao = importlib.import_module("torchao.quantization")
    granularity = importlib.import_module("torchao.quantization.granularity")
    torch = importlib.import_module("torch")
    int8 = ao.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=granularity.PerAxis(0))
    linear = {
        "int4": lambda: ao.Int4WeightOnlyConfig(group_size=128),
        "int8": lambda: int8,
        "fp8-int4": lambda: ao.Float8DynamicActivationInt4WeightConfig(),
        "fp8-fp8": lambda: ao.Float8DynamicActivationFloat8WeightConfig(
            granularity=granularity.PerRow()
        ),
        "int8-int4": lambda: ao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=granularity.PerGroup(32)
        ),
    }[scheme]()
    # Name the weights: with "_default", transformers 5.23 would quantise the biases too.
    weights = {r"re:.*_proj\.weight": linear, "lm_head.weight": linear}
    if scheme == "int8-int4":
        weights["model.embed_tokens.weight"] = int8
    return ao.FqnToConfig(weights)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("merged", type=Path, help="folder of scripts/merge.py or save_pretrained_merged")
    add("output", type=Path, help="folder to write")
    add("--scheme", required=True, choices=SCHEMES, help="the adapter's qat_scheme")
    add("--device", default="cpu", help="device that quantises")
    return parser.parse_args()


if __name__ == "__main__":
    main()
