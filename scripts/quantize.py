"""Quantise a merged folder with torchao, with the scheme that qat_scheme trained for.

python scripts/merge.py runs/adapter runs/merged
python scripts/quantize.py runs/merged runs/int8 --scheme int8

Needs torchao and transformers, which fastlora does not install. transformers' from_pretrained loads
the written folder. int4 and the fp8 schemes need a GPU that torchao has kernels for.
"""

import argparse
import importlib.util
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from finetuning.ending import user_errors

from fastlora.adapters.refusals import qat_shape_problem
from fastlora.checkpoints.atomic import nearest_existing
from fastlora.checkpoints.json_text import first_line
from fastlora.checkpoints.output_folders import writable_folder
from fastlora.checkpoints.reading import CheckedBase, check_base
from fastlora.checkpoints.tensors import read_json
from fastlora.errors import raise_problems
from fastlora.models.spec import Spec
from fastlora.ops.quant.fake_quantize import SCHEMES
from fastlora.runtime.devices import device_problem


@user_errors()
def main() -> None:
    given = arguments()
    quantise(given.merged, given.output, given.scheme, given.device)
    print(f"wrote {given.output} ({given.scheme})")


def quantise(merged: Path, output: Path, scheme: str, device: str) -> None:
    """Write `output` with quantised linear layers and head; int8-int4 adds the embedding.

    The files are written to a temporary folder and moved at the end, so an error leaves nothing.

    Raises:
        As `check`.
    """
    check(merged, output, scheme, device)
    # On the disk of `output`, where files can be moved.
    with TemporaryDirectory(dir=nearest_existing(output), prefix=".quantize-") as temporary:
        written = Path(temporary) / "quantised"
        write(merged, written, Path(temporary) / "untied", scheme, device)
        output.mkdir(parents=True, exist_ok=True)
        for file in written.iterdir():
            os.replace(file, output / file.name)


def write(merged: Path, output: Path, untied: Path, scheme: str, device: str) -> None:
    """Write the quantised folder. A tied model is first written to `untied`."""
    transformers = importlib.import_module("transformers")
    model, source = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype="auto"), merged
    if model.config.tie_word_embeddings:  # head and embedding are rounded in different ways
        model.config.tie_word_embeddings = False
        model.lm_head.weight = type(model.lm_head.weight)(model.lm_head.weight.detach().clone())
        model.save_pretrained(untied)
        source = untied
    how = transformers.TorchAoConfig(config(scheme), include_input_output_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", quantization_config=how, device_map=device
    )
    model.save_pretrained(output)
    for file in merged.iterdir():  # copy the tokenizer files
        if (output / file.name).exists() or ".safetensors" in file.name:
            continue
        (shutil.copytree if file.is_dir() else shutil.copy)(file, output / file.name)


def check(merged: Path, output: Path, scheme: str, device: str) -> None:
    """Check all arguments before any work.

    Raises:
        ModuleNotFoundError: torchao or transformers is not installed.
        FileNotFoundError: `merged` is not a folder, or has no weights.
        ValueError: `merged` is not a model in 16 bits, `output` holds files, or the scheme is not
            for this model or this device. CheckpointError: files have wrong contents.
        PermissionError: `output` cannot be written.
    """
    lacking = [n for n in ("torchao", "transformers") if importlib.util.find_spec(n) is None]
    if lacking:
        raise ModuleNotFoundError(
            f"scripts/quantize.py needs {' and '.join(lacking)}: pip install torchao transformers"
        )
    checked = check_merged(merged)
    problems = [check_output(merged, output, checked), qat_shape_problem(scheme, checked.config)]
    problems.append(device_problem(device, types=("cpu", "cuda")) or kernel_problem(scheme, device))
    problems = [problem for problem in problems if problem is not None]
    raise_problems(ValueError, "quantize.py cannot use these arguments:", problems)


def check_merged(merged: Path) -> CheckedBase:
    """The weights of the folder to quantise, checked. None is read yet."""
    how = f"python scripts/merge.py ADAPTER {merged}"
    if not merged.is_dir():
        raise FileNotFoundError(
            f"no such folder: {str(merged)!r} (working directory {Path.cwd()}). {how} writes one."
        )
    if (merged / "adapter_config.json").is_file():
        raise ValueError(
            f"{merged} is an adapter's folder; expected a merged one. Merge it first:"
            f" python scripts/merge.py {merged} MERGED"
        )
    config_file = merged / "config.json"
    if config_file.is_file() and read_json(config_file).get("quantization_config"):
        raise ValueError(
            f"{merged} is already quantised; expected a model in 16 bits, such as"
            " scripts/merge.py ADAPTER MERGED --save-method merged_16bit writes."
        )
    return check_base(merged)


def check_output(merged: Path, output: Path, checked: CheckedBase) -> str | None:
    """Why the quantised model must not be written to a folder, which need not exist."""
    if output.resolve().is_relative_to(merged.resolve()):
        return f"{output} is the folder to quantise, or in it; choose another to write to"
    # Written files would mix with those of another model.
    if output.is_dir() and any(output.iterdir()):
        return f"{output} is not empty; choose a new folder, or delete its files first"
    writable_folder(output, Spec(config=checked.config, name_or_path="", max_seq_length=1))
    return None


def kernel_problem(scheme: str, device: str) -> str | None:
    """Why torchao cannot quantise by a scheme on a device: tried with one small layer."""
    layer = torch.nn.Sequential(torch.nn.Linear(256, 256, device=device, dtype=torch.bfloat16))
    linear = next(iter(config(scheme).fqn_to_config.values()))
    try:
        importlib.import_module("torchao.quantization").quantize_(layer, linear)
    except (ImportError, AssertionError, NotImplementedError, RuntimeError) as error:
        return (
            f"torchao cannot quantise by --scheme {scheme} on --device {device}"
            f" ({first_line(error)}); int4 and the fp8 schemes need --device cuda and a GPU that"
            " torchao has kernels for"
        )
    return None


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
