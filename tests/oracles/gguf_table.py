"""Prints how far llama.cpp is from fastlora, for every family and dtype of GGUF files.

PYTHONPATH=tests python -m oracles.gguf_table

Tiny random models; 24 greedy tokens after each of three texts (two rows of ids for adapters).
"""

import tempfile
from pathlib import Path

from fastlora.formats.gguf.report import Verification
from oracles.checkpoints import FAMILIES
from oracles.gguf_models import adapted, model_of, tokenizer_of

DTYPES = ("f32", "bf16", "f16", "q8_0", "q4_0")
# Rows that fill blocks of 32, so that all matrices are quantised.
SIZES = dict(hidden_size=96, intermediate_size=96)
MIXTURE = dict(moe_intermediate_size=32)
# Families whose heads fill hidden_size, or whose lists of factors have the length for their heads,
# and one with another name for intermediate_size.
OWN = {name: dict(hidden_size=32) for name in ("helium", "phi4_mini")}
OWN["granite4"] = dict(shared_intermediate_size=96)


def main() -> None:
    print("| family | " + " | ".join((*DTYPES, "f32 + adapter file")) + " |")
    print("|---|" + "---|" * (len(DTYPES) + 1))
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            print(
                f"| {family} | " + " | ".join(row(family, Path(folder) / family)) + " |", flush=True
            )


def row(family: str, folder: Path) -> list[str]:
    """The cells of a family; one that says why, if llama.cpp does not compute it."""
    tokenizer = tokenizer_of(folder / "tokenizer")
    sizes = SIZES | (MIXTURE if family.startswith("qwen3_moe") else {})
    sizes |= OWN.get(family, {})
    model = adapted(model_of(family, folder / "base", len(tokenizer), **sizes))
    try:
        merged = [
            model.save_gguf(folder / "m.gguf", tokenizer, dtype, verify=True) for dtype in DTYPES
        ]
    except ValueError as error:
        return [f"refused: {str(error).splitlines()[1].strip()}", *[""] * len(DTYPES)]
    adapter = model.save_gguf_adapter(folder / "a.gguf", verify=True)
    return [cell(report.verification) for report in (*merged, adapter)]


def cell(found: Verification | None) -> str:
    assert found is not None
    return f"{found.logprob_difference:.1g}, {found.equal_ids}/{found.greedy_ids}"


if __name__ == "__main__":
    main()
