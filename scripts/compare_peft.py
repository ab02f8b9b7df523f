"""How far fastlora's adapters are from PEFT's: one row per case, on the CPU, in under a minute.

    python scripts/compare_peft.py

Every argument that both know over one family, all seven projections over every dense family, and
every way of naming the experts and the router of a mixture. A and B are random, and each adapter
moves the logits by at least 1000 tolerances, or the row fails.

    import   logits of an adapter that PEFT saved, here against there    max|Δ| / max(1, absmax)
    export   logits of an adapter saved here, in PEFT against here       the same
    step     tensors after one SGD step from that adapter, dropout off   max|Δ| / max(1, max step)

Ends non-zero if a figure exceeds its tolerance. The cases are those of
tests/test_export.py and tests/test_experts_export.py.
"""

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from models import FAMILIES  # pyright: ignore[reportMissingImports]
from test_experts_export import CASES as EXPERT_CASES  # pyright: ignore[reportMissingImports]
from test_export import (  # pyright: ignore[reportMissingImports]
    CASES,
    FORWARD,
    export_difference,
    import_difference,
    step_difference,
)
from transformers.utils import logging

TOLERANCES = {"import": 1e-5, "export": 1e-5, "step": 1e-6}
DENSE = [family for family in FAMILIES if not family.startswith(("mixtral", "qwen3_moe"))]
MEASURES = {"import": import_difference, "export": export_difference, "step": step_difference}


def main() -> int:
    warnings.simplefilter("ignore")  # transformers' deprecations; PEFT's stay errors
    logging.disable_progress_bar()
    rows: dict[tuple[str, str], Any] = {(FORWARD, case): CASES[case] for case in CASES}
    rows |= {(family, "seven names"): CASES["seven names"] for family in DENSE}
    for case, (family, settings) in EXPERT_CASES.items():
        rows[family, f"{case} (experts)"] = settings
    print(f"{'family':16}{'arguments':34}" + "".join(f"{name:>10}" for name in MEASURES))
    failures = 0
    for (family, case), settings in rows.items():
        figures = {name: measure(family, case, settings, name) for name in MEASURES}
        wrong = [name for name, value in figures.items() if not value <= TOLERANCES[name]]
        failures += bool(wrong)
        shown = "".join(f"{value:10.1e}" for value in figures.values())
        print(f"{family:16}{case:34}{shown}  {'FAILS ' + ', '.join(wrong) if wrong else 'ok'}")
    limits = ", ".join(f"{name} {limit:.0e}" for name, limit in TOLERANCES.items())
    print(f"{failures} of {len(rows)} rows exceed a tolerance ({limits})")
    return min(failures, 1)


def measure(family: str, case: str, settings: dict[str, Any], name: str) -> float:
    """One figure; NaN, which exceeds every tolerance, where a side refuses or shows no effect."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return MEASURES[name](family, Path(folder), **settings)
        except (AssertionError, ValueError, RuntimeError, UserWarning) as error:
            print(f"{family}, {case}, {name}: {error}")
            return float("nan")


if __name__ == "__main__":
    sys.exit(main())
