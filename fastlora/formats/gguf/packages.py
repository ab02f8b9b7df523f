"""The packages of the extra `gguf`: imported at their first use."""

from importlib import import_module
from typing import Any

from fastlora.errors import lacks_extra


def gguf_package() -> Any:
    """llama.cpp's package for GGUF files.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    return _import("gguf", "Writing a GGUF file")


def engine_package() -> Any:
    """llama.cpp itself, as xllamacpp's wheel has it.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    return _import("xllamacpp", "Verifying a GGUF file")


def _import(name: str, purpose: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise lacks_extra(purpose, name, "gguf", error) from error
