"""Print how far fastlora is from other programs, as Markdown tables: every family on the CPU.

    python scripts/compare_with.py transformers    # logits, losses, greedy ids, NF4: two minutes
    python scripts/compare_with.py peft            # adapters in both directions, every argument
    python scripts/compare_with.py llama.cpp       # GGUF files of every type, and adapter files

Each measures on tiny random models what the tests hold to tolerances. It needs the packages of
scripts/requirements-test.txt. Files tests/oracles/*_table.py explain the columns.
"""

import argparse
import runpy
import sys
from pathlib import Path

TABLES = {"transformers": "transformers_table", "peft": "peft_table", "llama.cpp": "gguf_table"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", choices=[*TABLES])
    table = TABLES[parser.parse_args().program]
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    runpy.run_module(f"oracles.{table}", run_name="__main__")


if __name__ == "__main__":
    main()
