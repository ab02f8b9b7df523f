"""How far fastlora's adapters are from PEFT's: one row per argument and case, on the CPU.

    PYTHONPATH=tests python -m oracles.peft_table      # about two minutes

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
Exits with 1 if a figure exceeds its tolerance. The cases are those of the tests.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers.utils import logging

from fastlora.ops.quant.fake_quantize import SCHEMES
from oracles import init_from_data
from oracles.checkpoints import FAMILIES
from oracles.combining import COMBINE_CASES, combine_difference
from oracles.expert_cases import EXPERT_CASES
from oracles.extras_cases import EXTRAS_CASES
from oracles.pairs import read_pair
from oracles.peft_cases import (
    ADAPTER_CASES,
    FASTLORA_ONLY_INITS,
    FORWARD,
    FUSED_CASES,
    SEVEN,
    every_projection,
)
from oracles.peft_side import export_difference, import_difference, step_difference
from oracles.qat import WIDE, torchao_difference
from oracles.unknown_to_peft import UNKNOWN_TO_PEFT

TOLERANCES = {"import": 1e-5, "export": 1e-5, "step": 1e-6, "other": 1e-5, "torchao": 1e-3}
COLUMNS = ("import", "export", "step", "other")
DENSE = [family for family in FAMILIES if not family.startswith(("mixtral", "qwen3_moe"))]
Measure = Callable[[Path], float]


class Row(NamedTuple):
    family: str
    case: str
    measures: dict[str, Measure]  # tolerance's name -> figure, given an empty folder


def arguments() -> Iterator[Row]:
    """Arguments of both libraries, then those of fastlora alone."""
    for case, settings in ADAPTER_CASES.items():
        yield Row(FORWARD, case, adapter(FORWARD, settings))
    for family in DENSE:
        yield Row(family, "every projection", adapter(family, every_projection(family)))
    for case, (family, settings) in FUSED_CASES.items():
        yield Row(family, case, adapter(family, settings))
    for case, (family, settings) in EXPERT_CASES.items():
        yield Row(family, f"{case} (experts)", adapter(family, settings))
    for case, (family, settings) in EXTRAS_CASES.items():
        yield Row(family, case, adapter(family, settings))
    for case, (family, settings) in UNKNOWN_TO_PEFT.items():
        measures = adapter(family, settings)
        yield Row(family, case, {name: measures[name] for name in ("export", "step")})


def other() -> Iterator[Row]:
    """Initialisations that PEFT cannot read back, combinations, fake quantisation."""
    for case, start in FASTLORA_ONLY_INITS.items():
        settings = dict(r=4, target_modules=SEVEN) | start
        yield Row(FORWARD, case, {"export": adapter(FORWARD, settings)["export"]})
    for method in init_from_data.METHODS:
        measure = partial(init_from_data.export_difference, method)
        yield Row(FORWARD, f"initialize {method}", {"export": measure})
    for case in COMBINE_CASES:
        yield Row(FORWARD, f"combine {case}", {"other": partial(combination, case)})
    for scheme in SCHEMES:
        yield Row("llama_bias", f"qat_scheme={scheme}", {"torchao": partial(quantised, scheme)})


def adapter(family: str, settings: dict[str, Any]) -> dict[str, Measure]:
    """The three figures of one set of arguments."""
    of = lambda measure: lambda folder: measure(family, folder, **settings)
    return {
        "import": of(import_difference),
        "export": of(export_difference),
        "step": of(step_difference),
    }


def combination(case: str, folder: Path) -> float:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return max(combine_difference(case, folder, monkeypatch))


def quantised(scheme: str, folder: Path) -> float:
    sizes: dict[str, Any] = WIDE
    model = read_pair("llama_bias", folder, **sizes).model
    return torchao_difference(model, scheme)


def figure(row: Row, measure: Measure, name: str) -> float:
    """The figure, or NaN if a library refuses or the adapter has no effect. NaN fails."""
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
