"""save_gguf_adapter(): a LoRA adapter as a GGUF file, for --lora of llama.cpp and Ollama's ADAPTER.

A file holds A [r, d_in] and B [d_out, r] of each matrix and one alpha. llama.cpp computes
W x + alpha / r * B (A x), with r of each pair. Pairs whose scaling is another get it folded into B.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fastlora.adapters.edits.merging import merge_problem
from fastlora.arguments import FLAG, check_arguments
from fastlora.errors import raise_problems
from fastlora.formats.gguf.metadata import Metadata, architecture
from fastlora.formats.gguf.model_file import model_tensors
from fastlora.formats.gguf.output import check_adapter_tensors, output_file, write_checked
from fastlora.formats.gguf.packages import engine_package, gguf_package
from fastlora.formats.gguf.report import GGUFReport, Verification
from fastlora.formats.gguf.sentencepiece import GGML_MODEL
from fastlora.formats.gguf.tensors import (
    FileTensor,
    expert_parts,
    file_names,
    file_rows,
    row_parts,
)
from fastlora.formats.gguf.verify import verify_adapter
from fastlora.formats.gguf.write import write_gguf
from fastlora.models.config import LlamaConfig
from fastlora.models.families.family import GGUF
from fastlora.models.names import LM_HEAD, projection_path
from fastlora.models.params import Adapter, ExpertLoRA, LoRA, is_quantized
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import LoraConfig, Target
from fastlora.models.stacks import check_one_adapter
from fastlora.models.state import ModelState, require_adapter

_CURE = "Merge first: save_gguf writes the merged model, which holds all of it."


def save_gguf_adapter(
    model: ModelState, path: str | os.PathLike[str], verify: bool = False
) -> GGUFReport:
    """Write the adapter as a GGUF LoRA file, in float32.

    An initial offset (PiSSA and others) is folded in, which doubles the rank.

    Args:
        model: with an adapter.
        path: of the file, in a folder that is created if it does not exist.
        verify: run the file in llama.cpp, over a temporary file of the base beside it, and compare.
            That file is in float32, because llama.cpp rounds activations to the base's 16 bits: it
            takes 4 bytes for each weight, on the disk and in memory.

    Raises:
        ValueError: before anything is written, if the model has no adapter, llama.cpp cannot run
            the model, the format cannot hold the adapter, the base is not the checkpoint's, the
            adapter holds NaN or infinity, or the path is that of a file that is not GGUF.
        ModuleNotFoundError: the extra `gguf` is not installed.
        PermissionError: the folder cannot be written to.
        RuntimeError: with `verify`, llama.cpp cannot load the file. The path is unchanged.
    """
    check_arguments("save_gguf_adapter", verify=(verify, FLAG))
    if model.spec.changed:
        raise ValueError(
            "The base is not the checkpoint's (after merge or add_tokens), so the adapter alone"
            f" would give another model. {merge_problem(model.spec) or _CURE}"
        )
    if verify:
        engine_package()
    return write_adapter(model, Path(path), adapter_contents(model), verify)


class AdapterContents(NamedTuple):
    """A checked adapter's file before it is written."""

    metadata: Metadata
    tensors: list[FileTensor]


def adapter_contents(model: ModelState) -> AdapterContents:
    """What `write_adapter` writes, also over a base that is not the checkpoint's.

    Raises:
        ValueError: as `save_gguf_adapter`, except for its path.
        ModuleNotFoundError: the extra `gguf` is not installed.
    """
    gguf_package()
    model = self_contained(model)
    lora, adapter = require_adapter(model)
    check_one_adapter(model)
    gguf = architecture(model.spec.config)
    cure = merge_problem(model.spec) or _CURE
    raise_problems(ValueError, "A GGUF LoRA file cannot hold:", adapter_problems(model), cure)
    tensors = list(_tensors(model.spec.config, gguf, lora, adapter))
    check_adapter_tensors((x.name, x.compute()) for x in tensors)
    return AdapterContents(_metadata(gguf, lora), tensors)


def write_adapter(
    model: ModelState, path: Path, contents: AdapterContents, verify: bool
) -> GGUFReport:
    """Write what `adapter_contents` returned for this model."""
    model = self_contained(model)
    path = output_file(path, model.spec)
    write = lambda file: write_gguf(file, contents.metadata, contents.tensors, "f32")
    verification = write_checked(path, write, partial(_verified, model) if verify else None)
    quantized = is_quantized(model.base)
    notes = [_QUANTIZED_NOTE] if quantized else []
    return GGUFReport(
        path=path,
        bytes=path.stat().st_size,
        notes=tuple(notes),
        verification=verification,
    )


_QUANTIZED_NOTE = (
    "The adapter was trained over a base in 4 or 8 bits; over another file of the base the results"
    " will differ a little from the trained model's."
)


def adapter_problems(model: ModelState) -> list[str]:
    """The parts of a model's adapter that a GGUF LoRA file cannot hold.

    Raises:
        ValueError: the model has no adapter.
    """
    lora, _ = require_adapter(model)
    extras, problems = lora.extras, []
    if lora.use_dora:
        problems.append("use_dora: lengths of rows")
    if lora.lora_bias:
        problems.append("lora_bias: biases of B")
    if extras.replaced:
        named = "modules_to_save" if lora.modules_to_save else f"bias={lora.bias!r}"
        problems.append(f"{named}: trained copies of {', '.join(extras.replaced)!r:.300}")
    if extras.tokens:
        problems.append("trainable_token_indices: trained rows of embedding or head")
    if extras.embed_tokens is not None:
        problems.append("LoRA on embed_tokens")
    # The file of a tied model has one tensor for embedding and head.
    elif extras.lm_head is not None and "lm_head" not in model.base:
        problems.append("LoRA on lm_head, which is tied to the embedding")
    return problems


def _alpha(lora: LoraConfig) -> float:
    return float(lora.lora_alpha) or 1.0  # to llama.cpp, 0 means a scaling of 1


def _metadata(gguf: GGUF, lora: LoraConfig) -> Metadata:
    return {
        "general.architecture": gguf.arch,
        "general.type": "adapter",
        "general.file_type": int(gguf_package().LlamaFileType.ALL_F32),
        "adapter.type": "lora",
        "adapter.lora.alpha": _alpha(lora),
    }


def _tensors(
    config: LlamaConfig, gguf: GGUF, lora: LoraConfig, adapter: Adapter
) -> Iterator[FileTensor]:
    """A and B of every adapted matrix."""
    in_file = file_names(config, gguf)
    for i, targets in enumerate(lora.targets):
        for target in targets:
            record, folded = adapter["layers"][i][target.name], _folded(lora, target)
            if isinstance(record, ExpertLoRA):
                for name, rows in expert_parts(config, i, target.name):
                    yield from _pair(in_file(name), record.a, record.b[:, rows] * folded)
                continue
            name = f"{projection_path(i, target.name)}.weight"
            b = file_rows(config, gguf, name, record.b * folded)
            for part, rows in row_parts(gguf, name, len(b)):
                yield from _pair(in_file(part), record.a, b[rows])
    if (head := lora.extras.lm_head) is not None:
        record = adapter.get("lm_head")
        assert isinstance(record, LoRA), record
        yield from _pair(in_file(LM_HEAD), record.a, record.b * _folded(lora, head))


def _folded(lora: LoraConfig, target: Target) -> float:
    """What B is multiplied by, so that alpha / r gives the target's scaling."""
    return target.scaling * target.r / _alpha(lora)


def _pair(name: str, a: Tensor, b: Tensor) -> Iterator[FileTensor]:
    for suffix, x in (("lora_a", a), ("lora_b", b)):
        yield FileTensor(f"{name}.{suffix}", tuple(x.shape), lambda x=x: x)


def _verified(model: ModelState, path: Path) -> Verification:
    base = replace(model, spec=replace(model.spec, lora=None), adapter=None)
    with tempfile.TemporaryDirectory(prefix=".verifying-", dir=path.parent) as folder:
        file = Path(folder) / "base.gguf"
        tensors, metadata = model_tensors(base)
        write_gguf(file, metadata | _placeholders(model.spec.config), tensors, "f32")
        return verify_adapter(model, file, path)


def _placeholders(config: LlamaConfig) -> Metadata:
    """A vocabulary of invented tokens: llama.cpp needs one, although prompts are ids."""
    return {
        "general.type": "model",
        "tokenizer.ggml.model": GGML_MODEL,
        "tokenizer.ggml.tokens": [f"<{i}>" for i in range(config.vocab_size)],
        "tokenizer.ggml.scores": [0.0] * config.vocab_size,
        "tokenizer.ggml.token_type": [1] * config.vocab_size,
        "tokenizer.ggml.add_bos_token": False,
    }
