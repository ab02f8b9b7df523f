"""How far fastlora's adapters are from PEFT's: one row per argument and case, on the CPU.

    python scripts/compare_peft.py          # some two minutes

Every argument of fastlora.lora, in most of the ways it can be given, all seven projections over
every dense family, every way of naming the experts and the router of a mixture, and every method of
fastlora.combine. A and B are random, and each adapter moves the logits by at least 1000 tolerances,
or the row fails.

    import   logits of an adapter that PEFT saved, here against there    max|Δ| / max(1, absmax)
    export   logits of an adapter saved here, in PEFT against here       the same
    step     tensors after one SGD step from that adapter, dropout off   max|Δ| / max(1, max step)
    other    a combination's logits, here and in PEFT                    as import
             a fake quantised model's logits, here and in torchao        mean|Δ| / mean

A dash: PEFT cannot do this, or (eva, loftq, ...) refuses to save it in a form that it reads again.
Ends non-zero if a figure exceeds its tolerance. The cases are those of the tests, whose names the
table of the README gives.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import pytest
import test_arguments  # pyright: ignore[reportMissingImports]
import test_combine  # pyright: ignore[reportMissingImports]
import test_experts_export  # pyright: ignore[reportMissingImports]
import test_export  # pyright: ignore[reportMissingImports]
import test_initialize  # pyright: ignore[reportMissingImports]
import test_outside  # pyright: ignore[reportMissingImports]
import test_qat  # pyright: ignore[reportMissingImports]
from conftest import read_pair  # pyright: ignore[reportMissingImports]
from models import FAMILIES  # pyright: ignore[reportMissingImports]
from transformers.utils import logging

from fastlora.ops.quant.fake_quantize import SCHEMES

TOLERANCES = {"import": 1e-5, "export": 1e-5, "step": 1e-6, "other": 1e-5, "torchao": 1e-3}
COLUMNS = ("import", "export", "step", "other")
DENSE = [family for family in FAMILIES if not family.startswith(("mixtral", "qwen3_moe"))]
Measure = Callable[[Path], float]


class Row(NamedTuple):
    family: str
    case: str
    measures: dict[str, Measure]  # tolerance's name -> figure, given an empty folder


FORWARD = test_export.FORWARD


def arguments() -> Iterator[Row]:
    """Arguments that both sides know, and those that only fastlora does."""
    for case, settings in test_export.CASES.items():
        yield Row(FORWARD, case, adapter(FORWARD, settings))
    for family in DENSE:
        yield Row(family, "seven names", adapter(family, test_export.CASES["seven names"]))
    for case, (family, settings) in test_experts_export.CASES.items():
        yield Row(family, f"{case} (experts)", adapter(family, settings))
    for case, (family, settings) in test_outside.CASES.items():
        yield Row(family, case, adapter(family, settings))
    for case, (family, settings) in test_arguments.CASES.items():
        measures = adapter(family, settings)
        yield Row(family, case, {name: measures[name] for name in ("export", "step")})


def other() -> Iterator[Row]:
    """Initialisations that PEFT cannot read back, combinations, fake quantisation."""
    for case, start in test_export.OWN_STARTS.items():
        settings = dict(r=4, target_modules=test_export.SEVEN) | start
        yield Row(FORWARD, case, {"export": adapter(FORWARD, settings)["export"]})
    for method in test_initialize.METHODS:
        measure = partial(test_initialize.export_difference, method)
        yield Row(FORWARD, f"initialize {method}", {"export": measure})
    for case in test_combine.CASES:
        yield Row(FORWARD, f"combine {case}", {"other": partial(combination, case)})
    for scheme in SCHEMES:
        yield Row("llama_bias", f"qat_scheme={scheme}", {"torchao": partial(quantised, scheme)})


def adapter(family: str, settings: dict[str, Any]) -> dict[str, Measure]:
    """The three figures of one set of arguments."""
    of = lambda measure: lambda folder: measure(family, folder, **settings)
    return {
        "import": of(test_export.import_difference),
        "export": of(test_export.export_difference),
        "step": of(test_export.step_difference),
    }


def combination(case: str, folder: Path) -> float:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return max(test_combine.combine_difference(case, folder, monkeypatch))


def quantised(scheme: str, folder: Path) -> float:
    sizes: dict[str, Any] = test_qat.WIDE
    model = read_pair("llama_bias", folder, **sizes).model
    return test_qat.torchao_difference(model, scheme)


def figure(row: Row, measure: Measure, name: str) -> float:
    """NaN, which exceeds every tolerance, where a side refuses or shows no effect."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return measure(Path(folder))
        except (AssertionError, ValueError, RuntimeError, UserWarning) as error:
            print(f"{row.family}, {row.case}, {name}: {error}")
            return float("nan")


def main() -> int:
    warnings.simplefilter("ignore")  # transformers' deprecations; PEFT's stay errors
    logging.disable_progress_bar()
    print(f"{'family':16}{'arguments':44}" + "".join(f"{name:>10}" for name in COLUMNS))
    failures, n = 0, 0
    for row in (*arguments(), *other()):
        figures = {name: figure(row, measure, name) for name, measure in row.measures.items()}
        wrong = [name for name, value in figures.items() if not value <= TOLERANCES[name]]
        failures, n = failures + bool(wrong), n + 1
        found = [figures.get(column) for column in COLUMNS[:-1]]
        found.append(figures.get("other", figures.get("torchao")))
        shown = [f"{'-':>10}" if value is None else f"{value:10.1e}" for value in found]
        verdict = "FAILS " + ", ".join(wrong) if wrong else "ok"
        print(f"{row.family:16}{row.case:44}{''.join(shown)}  {verdict}", flush=True)
    limits = ", ".join(f"{name} {limit:.0e}" for name, limit in TOLERANCES.items())
    print(f"{failures} of {n} rows exceed a tolerance ({limits})")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
