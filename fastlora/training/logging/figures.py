"""draw(): the curves of one run or several as a picture, through matplotlib (extra `plots`)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlora.arguments import PATH, check_arguments
from fastlora.checkpoints.atomic import atomic_write
from fastlora.training.logging.extras import extra_module

# The fields of a History by name.
Columns = Mapping[str, Sequence[float]]

_SMOOTHED = 50  # a loss is smoothed over a fiftieth of the run's steps

# Column, title of its panel, whether the axis is logarithmic.
_PANELS = (
    ("losses", "loss (line: smoothed, dots: eval_data)", False),
    ("learning_rates", "learning rate", False),
    ("throughput", "trained tokens per second", False),
    ("grad_norms", "gradient norm", True),
)


def draw(path: str | os.PathLike[str], runs: Mapping[str, Columns]) -> None:
    """Write a picture of loss and evaluation, learning rate, throughput and gradient norm.

    Figure objects are used directly, so that pyplot's global state stays as it is.

    Args:
        path: the file; its ending gives the format: .png, .svg, .pdf, ... An existing one is
            replaced.
        runs: name -> the columns of its history.

    Raises:
        ValueError: `path` is not a path, its ending no format, or there is nothing to draw.
        ModuleNotFoundError: matplotlib is not installed.
    """
    check_arguments("plot", path=(path, PATH))
    figure, ending = _new_figure(path, (11, 7))
    if not any(len(columns["steps"]) for columns in runs.values()):
        raise ValueError("plot: there is no step to draw; the history is empty")
    for axes, (column, title, logarithmic) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for number, (name, columns) in enumerate(runs.items()):
            _curve(axes, column, columns, name, f"C{number % 10}")
        axes.set(title=title, xlabel="step", yscale="log" if logarithmic else "linear")
        low, high = axes.get_ylim()
        if logarithmic and high < 10 * low:  # few powers of ten: plain numbers at the ticks between
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3)
    if len(runs) > 1:
        figure.axes[0].legend()
    atomic_write(Path(path), lambda file: figure.savefig(file, format=ending, dpi=120))


def _new_figure(path: str | os.PathLike[str], inches: tuple[float, float]) -> tuple[Any, str]:
    """(an empty figure, the format that the path's ending names)."""
    figure = extra_module("matplotlib.figure", "plots", "plot").Figure(
        figsize=inches, layout="constrained"
    )
    formats = figure.canvas.get_supported_filetypes()
    ending = Path(path).suffix.removeprefix(".").lower()
    if ending not in formats:
        raise ValueError(
            f"path={os.fspath(path)!r}: expected an ending of {', '.join(sorted(formats))}"
        )
    return figure, ending


def _curve(axes: Any, column: str, columns: Columns, name: str, color: str) -> None:
    """One run's curve in one panel."""
    steps = columns["steps"]
    if column == "throughput":
        rates = [n / s for n, s in zip(columns["tokens"], columns["seconds"], strict=True) if s]
        # A step of 0 seconds exists only in histories that were made by hand.
        axes.plot(steps[: len(rates)], rates, color=color)
        return
    values = columns[column]
    if column != "losses":
        axes.plot(steps, values, color=color)
        return
    axes.plot(steps, values, color=color, alpha=0.25)
    axes.plot(steps, smoothed(values), color=color, label=name)
    axes.plot(columns["eval_steps"], columns["eval_losses"], "o", color=color, markersize=4)


def smoothed(values: Sequence[float]) -> list[float]:
    """Moving averages over about a fiftieth of the values."""
    return smooth(values, 1 - 1 / max(1, len(values) // _SMOOTHED))


def smooth(values: Sequence[float], keep: float) -> list[float]:
    """Exponential moving averages without a bias to 0; `keep` is the weight of the values before,
    in [0, 1)."""
    total, weight, averages = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight)
    return averages


def draw_rates(
    path: str | os.PathLike[str],
    rates: Sequence[float],
    losses: Sequence[float],
    averages: Sequence[float],
    suggestion: float,
) -> None:
    """Write a picture of a learning-rate range test: the loss over the rate.

    Raises:
        ValueError, ModuleNotFoundError: as `draw`.
    """
    check_arguments("plot", path=(path, PATH))
    figure, ending = _new_figure(path, (7, 4.5))
    axes = figure.subplots()
    axes.plot(rates, losses, color="C0", alpha=0.25)
    axes.plot(rates, averages, color="C0")
    axes.axvline(suggestion, color="C3", linestyle="--", label=f"suggestion: {suggestion:.2g}")
    axes.set(xscale="log", xlabel="learning rate", title="loss (line: smoothed)")
    # A loss that has diverged would press the rest of the curve flat.
    low, high = min(losses), max(averages[: max(2, len(averages) // 2)])
    axes.set_ylim(low - 0.1 * (high - low), high + 0.6 * (high - low))
    axes.legend()
    axes.grid(alpha=0.3)
    atomic_write(Path(path), lambda file: figure.savefig(file, format=ending, dpi=120))
