"""save_gguf(): a model as a GGUF file, with its adapter merged."""

import os
import shlex
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from fastlora.adapters.edits.merging import merged_tensors
from fastlora.arguments import Rule, check_arguments
from fastlora.formats.gguf.metadata import (
    Metadata,
    architecture,
    context_notes,
    model_metadata,
    rope_factors,
)
from fastlora.formats.gguf.output import check_replaceable, output_file, write_checked
from fastlora.formats.gguf.packages import engine_package, gguf_package
from fastlora.formats.gguf.pre_tokenizers import pre_rule
from fastlora.formats.gguf.report import GGUFReport
from fastlora.formats.gguf.tensors import FileTensor, file_tensors
from fastlora.formats.gguf.verify import verify_model
from fastlora.formats.gguf.vocabulary import Vocabulary, vocabulary_metadata
from fastlora.formats.gguf.write import DTYPES, K_QUANTS, not_in_blocks, write_gguf
from fastlora.models.params import is_quantized
from fastlora.models.self_contained import self_contained
from fastlora.models.stacks import check_one_adapter
from fastlora.models.state import ModelState, require_adapter
from fastlora.ops.quant.dequantize import dense
from fastlora.text.tokenizer import Tokenizer

_KNOWN = (*DTYPES, *K_QUANTS)
DTYPE = Rule(
    lambda x: type(x) is str and x.lower() in _KNOWN,
    " or ".join(map(repr, DTYPES)) + ", or a K-quant such as 'q4_k_m'",
)


def save_gguf(
    model: ModelState,
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    dtype: str = "bf16",
    verify: bool = False,
    pre: str | None = None,
) -> GGUFReport:
    """Write a GGUF file that llama.cpp, Ollama and LM Studio load, with the adapter merged.

    Sums of base and adapter are in float32 and rounded once, to the file's dtype. A base in 4 or 8
    bits is dequantised: the file holds the model that was trained, and notes say so. One tensor is
    in memory at a time.

    Args:
        model: without an adapter, its base is written.
        path: of the file, in a folder that is created if it does not exist.
        tokenizer: the model's.
        dtype: of matrices: a key of `write.DTYPES`; vectors are in float32, and embedding and head
            in 8 bits if other matrices have fewer. For a K-quant such as "q4_k_m" the file holds
            bfloat16, its name gets "-bf16", and the report has llama-quantize's command.
        verify: run the file in llama.cpp, and compare.
        pre: llama.cpp's name of a pre-tokenizer, for byte-level BPE; None finds the tokenizer's,
            and refuses those that llama.cpp has no name for.

    Raises:
        ValueError: before anything is written: an argument is wrong, the path is that of a file
            that is not GGUF, or llama.cpp cannot run this model; while writing, leaving an older
            file unchanged: a tensor would be NaN or infinite.
        CheckpointError: llama.cpp cannot tokenise as the tokenizer does.
        ModuleNotFoundError: the extra `gguf` is not installed.
        PermissionError: the folder cannot be written to.
        RuntimeError: with `verify`, llama.cpp cannot load the file. The path is unchanged.
    """
    check_arguments("save_gguf", dtype=(dtype, DTYPE), pre=(pre, pre_rule(pre)))
    gguf_package()
    if verify:
        engine_package()
    dtype = dtype.lower()
    model = self_contained(model)
    if model.spec.lora is not None:
        require_adapter(model)
    check_one_adapter(model)
    written, command = _file_and_command(Path(path), dtype)
    check_replaceable(Path(path))  # the command for a K-quant replaces it
    dtype = "bf16" if command else dtype
    # All that may be refused comes before the first byte.
    tensors, metadata = model_tensors(model)
    vocabulary = vocabulary_metadata(tokenizer, model.spec.config, pre)
    written = output_file(written, model.spec)
    metadata |= _general(model, dtype) | vocabulary.metadata
    write = lambda file: write_gguf(file, metadata, tensors, dtype)
    check = lambda file: verify_model(model, file, tokenizer)
    verification = write_checked(written, write, check if verify else None)
    return GGUFReport(
        path=written,
        bytes=written.stat().st_size,
        notes=tuple(_notes(model, vocabulary, tensors, dtype)),
        command=command,
        verification=verification,
    )


def _file_and_command(path: Path, dtype: str) -> tuple[Path, str | None]:
    if dtype in DTYPES:
        return path, None
    written = path.with_name(f"{path.stem}-bf16{path.suffix}")
    return written, shlex.join(["llama-quantize", str(written), str(path), dtype.upper()])


def model_tensors(model: ModelState) -> tuple[list[FileTensor], Metadata]:
    """The tensors of the file, computed when they are written, and the model's settings."""
    wide = lambda name, weight: dense(weight, model.base["norm"].dtype).float()
    config, tensors, merged = merged_tensors(model, wide)
    gguf = architecture(config)

    # Gates and ups, of experts and of some MLPs, come from one tensor, one after the other.
    @lru_cache(maxsize=1)
    def compute(name: str) -> Tensor:
        return merged[name]() if name in merged else tensors[name]

    listed = list(file_tensors(config, gguf, compute))
    for name, factors in rope_factors(config).items():
        listed.append(FileTensor(name, tuple(factors.shape), lambda factors=factors: factors))
    return listed, model_metadata(config)


def _general(model: ModelState, dtype: str) -> Metadata:
    name = Path(model.spec.name_or_path).name
    return {
        "general.type": "model",
        **({"general.name": name} if name else {}),
        "general.file_type": int(gguf_package().LlamaFileType[DTYPES[dtype][1]]),
        "general.quantization_version": int(gguf_package().GGML_QUANT_VERSION),
    }


def _notes(
    model: ModelState, vocabulary: Vocabulary, tensors: list[FileTensor], dtype: str
) -> list[str]:
    notes = [*context_notes(model.spec.config), *vocabulary.notes]
    if is_quantized(model.base):
        notes.append("The base's 4-bit or 8-bit weights were dequantised.")
    if scheme := model.spec.qat_scheme:
        notes.append(f"The model was trained for {scheme}; {dtype} rounds otherwise.")
    if narrow := not_in_blocks(tensors, dtype):
        notes.append(
            f"{len(narrow)} matrices are in float16, because their rows are no multiple of"
            f" {dtype}'s block: {', '.join(narrow[:3])}, ..."
        )
    return notes
