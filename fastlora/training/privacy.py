"""The privacy that a run has spent: epsilon by dp-accounting."""

from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from fastlora.errors import lacks_extra

# Every order gives an upper bound of epsilon; the result is the smallest one. These are Opacus's
# orders from 2 on. Below 2 dp-accounting's series often do not converge, of which it warns; such
# low orders give the smallest bound only if epsilon is large.
_ORDERS = [*(1 + i / 10 for i in range(10, 100)), *range(12, 64), 128, 256, 512]


def spent_epsilon(rates: Sequence[float], noises: Sequence[float], delta: float) -> float:
    """Epsilon of (epsilon, delta)-differential privacy of steps of DP-SGD, for a row that is added
    or removed, by Renyi differential privacy (Mironov 2017, arXiv:1702.07476, and for Poisson
    sampling Mironov, Talwar and Zhang 2019, arXiv:1908.10530).

    Args:
        rates: probability of a row in each step.
        noises: noise multiplier of each step.
        delta: in (0, 1).

    Raises:
        ModuleNotFoundError: dp-accounting is not installed (extra `privacy`).
    """
    if not all(noises):
        return float("inf")
    accounting, rdp = _module("dp_accounting"), _module("dp_accounting.rdp")
    accountant = rdp.RdpAccountant(_ORDERS)
    for (rate, noise), steps in Counter(zip(rates, noises, strict=True)).items():
        event = accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(noise))
        accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise lacks_extra("History.epsilon", "dp-accounting", "privacy", error) from error
