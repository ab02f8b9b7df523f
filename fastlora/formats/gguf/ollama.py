"""save_ollama(): a folder from which `ollama create` makes a model."""

import os
from dataclasses import replace
from pathlib import Path

from fastlora.arguments import check_arguments
from fastlora.checkpoints.output_folders import writable_folder
from fastlora.checkpoints.tensors import write_text
from fastlora.formats.gguf.adapter_file import (
    adapter_contents,
    adapter_problems,
    write_adapter,
)
from fastlora.formats.gguf.go_template import go_template
from fastlora.formats.gguf.model_file import DTYPE, save_gguf
from fastlora.formats.gguf.output import check_replaceable
from fastlora.formats.gguf.report import GGUFReport, OllamaReport
from fastlora.formats.gguf.vocabulary import stop_ids
from fastlora.models.config import LlamaConfig
from fastlora.models.self_contained import self_contained
from fastlora.models.stacks import check_one_adapter
from fastlora.models.state import ModelState
from fastlora.text.tokenizer import Tokenizer

MODEL_FILE, ADAPTER_FILE, MODELFILE = "model.gguf", "adapter.gguf", "Modelfile"


def save_ollama(
    model: ModelState,
    folder: str | os.PathLike[str],
    tokenizer: Tokenizer,
    dtype: str = "q8_0",
    pre: str | None = None,
) -> OllamaReport:
    """Write model.gguf, adapter.gguf and a Modelfile; `ollama create NAME -f Modelfile` reads them.

    The base and the adapter are two files, so that one base serves several adapters. An adapter
    that a GGUF LoRA file cannot hold is merged into model.gguf instead. The Modelfile has every
    stop id as a PARAMETER stop. Its TEMPLATE is the chat template in Go if that only puts text
    around each message; otherwise Ollama takes the most similar one of its built-in templates
    (server/model.go, detectChatTemplate), and a note says so.

    Args:
        model: with or without an adapter.
        folder: created if it does not exist.
        tokenizer: the model's.
        dtype: as for save_gguf. For a K-quant the file holds bfloat16, and a note has the command
            with which Ollama makes it.
        pre: as for save_gguf.

    Raises:
        ValueError, CheckpointError, ModuleNotFoundError, PermissionError: as save_gguf.
    """
    check_arguments("save_ollama", dtype=(dtype, DTYPE))
    check_one_adapter(model)
    folder = writable_folder(folder, model.spec)
    model = self_contained(model)
    separate = model.spec.lora is not None and not adapter_problems(model)
    # Every check comes before the base is written, those of the adapter too.
    _check_files(folder)
    contents = adapter_contents(model) if separate else None
    template = go_template(tokenizer)
    base = model
    if separate:
        base = replace(model, spec=replace(model.spec, lora=None), adapter=None)
    written = save_gguf(base, folder / MODEL_FILE, tokenizer, dtype, pre=pre)
    if contents is None:
        adapter = None
        (folder / ADAPTER_FILE).unlink(missing_ok=True)  # of an earlier model
    else:
        adapter = write_adapter(model, folder / ADAPTER_FILE, contents, verify=False)
    if written.command is not None:
        note = _K_QUANT.format(file=written.path.name, dtype=dtype.lower())
        written = replace(written, notes=(*written.notes, note))
    if template is None and "default" in tokenizer.chat_templates:
        written = replace(written, notes=(*written.notes, _NO_TEMPLATE))
    text = modelfile(tokenizer, model.spec.config, written, adapter, template)
    write_text(path := folder / MODELFILE, text)
    files = [path, written.path, *([adapter.path] if adapter else [])]
    total = sum(file.stat().st_size for file in files)
    return OllamaReport(path=path, bytes=total, model=written, adapter=adapter)


def _check_files(folder: Path) -> None:
    """Refuse a folder in which the adapter or the Modelfile cannot be replaced."""
    check_replaceable(folder / ADAPTER_FILE)
    if (path := folder / MODELFILE).is_dir():
        raise ValueError(f"{path} is a folder; choose another folder, or delete this one.")


_K_QUANT = (
    "{file} holds bfloat16, not {dtype}. Ollama quantises it: `ollama create NAME -f Modelfile -q"
    " q4_K_M` (or q4_K_S). For other K-quants, run llama-quantize and change FROM in the Modelfile."
)

_NO_TEMPLATE = (
    "The chat template does more than put text around messages, so the Modelfile has no TEMPLATE;"
    " Ollama takes the most similar built-in template. Compare: `ollama show --template`."
)


def modelfile(
    tokenizer: Tokenizer,
    config: LlamaConfig,
    model: GGUFReport,
    adapter: GGUFReport | None,
    template: str | None,
) -> str:
    """The text of a Modelfile."""
    lines = [f"FROM ./{model.path.name}"]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter.path.name}")
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    for i in stop_ids(tokenizer, config):
        text = tokenizer.decode([i], skip_special_tokens=False)
        lines.append(
            f'PARAMETER stop "{text}"' if '"' not in text else f'PARAMETER stop """{text}"""'
        )
    return "\n".join(lines) + "\n"
