"""Prints README.md's table of model families; --write puts it there.

    PYTHONPATH=tests python -m oracles.family_table [--write]

The rows are the registry's (fastlora/models/families). A mark means that the tests of that column
run for a checkpoint of the family: the script reads the parameters of the test functions.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from fastlora.models.families.family import Family
from fastlora.models.families.registry import FAMILIES
from oracles.checkpoints import FAMILIES as CHECKPOINTS
from oracles.gpu_models import FAMILIES as ON_A_GPU

ROOT = Path(__file__).resolve().parents[2]

# Column -> (file of tests, functions), all of which must run for the family.
CHECKS = {
    "logits": (
        "models/test_transformers_parity.py",
        (
            "test_logits_equal_transformers",
            "test_padded_batches_equal_transformers",
            "test_packed_documents_equal_the_documents_alone",
            "test_the_loss_equals_transformers",
            "test_bfloat16_errs_no_more_than_transformers",
        ),
    ),
    "generation": (
        "generation/test_generate.py",
        (
            "test_greedy_ids_equal_transformers",
            "test_a_batch_generates_what_its_rows_generate_alone",
        ),
    ),
    "adapters in": (
        "formats/test_peft_reading.py",
        ("test_adapters_of_peft_load_for_every_family",),
    ),
    "adapters out": (
        "formats/test_peft_writing.py",
        ("test_peft_reads_saved_adapters_of_every_family",),
    ),
    "merged": ("formats/test_merged.py", ("test_merged_folders_load_in_transformers",)),
    "NF4": (
        "checkpoints/test_bnb_format.py",
        ("test_every_dense_family_equals_transformers_in_4_bits",),
    ),
    "llama.cpp": (
        "formats/test_gguf_models.py",
        ("test_llama_cpp_computes_the_merged_model_and_the_adapter",),
    ),
}
HEAD = ("models", "`model_type`", *CHECKS, "GPU")
BEGIN, END = "<!-- oracles/family_table.py: begin -->", "<!-- oracles/family_table.py: end -->"


def covered(file: str, functions: tuple[str, ...]) -> set[str]:
    """The model_types for which all of these tests run."""
    module = _module(ROOT / "tests" / file)
    types = [{CHECKPOINTS[x]["model_type"] for x in _cases(module, name)} for name in functions]
    return set.intersection(*types)


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"checks_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cases(module: ModuleType, function: str) -> Iterator[str]:
    """The values of a test's parameter `family`."""
    test: Callable = getattr(module, function)
    marks = getattr(test, "pytestmark", [])
    for mark in marks:
        if mark.name == "parametrize" and mark.args[0] == "family":
            yield from mark.args[1]


def table() -> str:
    """The table, in Markdown, and the line below it."""
    by_column = {column: covered(*tests) for column, tests in CHECKS.items()}
    by_column["GPU"] = {CHECKPOINTS[name]["model_type"] for name in ON_A_GPU}
    rows = [_row(family, by_column) for family in FAMILIES.values()]
    lines = [HEAD, ("---",) * len(HEAD), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _row(family: Family, by_column: dict[str, set[str]]) -> tuple[str, ...]:
    marks = ["yes" if family.name in found else "-" for found in by_column.values()]
    return (family.models or family.name, f"`{family.name}`", *marks)


def in_text(text: str, new: str) -> str:
    """The text with the table between its two comments replaced."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Print the table, or write it into README.md."""
    parser = argparse.ArgumentParser(description="README.md's table of model families.")
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    if not parser.parse_args().write:
        print(table())
        return
    readme = ROOT / "README.md"
    readme.write_text(in_text(readme.read_text(), table()))


if __name__ == "__main__":
    main()
