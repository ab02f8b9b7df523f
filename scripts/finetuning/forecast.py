"""forecast(): what fastlora.plan predicts for a run, as text."""

from typing import Any

import fastlora


def forecast(model: fastlora.Model, options: Any) -> str:
    """Memory and time of a step under the chosen recompute policy, and the best policy."""
    if model.base["norm"].device.type != "cuda":
        return "plan: predictions are for CUDA; this run is on the CPU"
    if options.context_parallel > 1:
        return "plan: rows that several ranks have together are not covered"
    length = model.spec.max_seq_length
    try:
        plan = fastlora.plan(model, options.batch_size, length, optimizer=options.optimizer)
    except ValueError as error:  # it does not fit, or such models were not measured
        return f"plan: {error}"
    chosen = next((x for x in plan.options if x.recompute == model.spec.recompute), plan.chosen)
    lines = [f"plan: {_line(chosen)}, of a card of {plan.memory / 2**30:.0f} GiB"]
    if chosen.recompute != plan.recompute:
        lines.append(f"plan: the fastest policy that fits is {_line(plan.chosen)}")
    return "\n".join(lines)


def _line(option: Any) -> str:
    time = option.step_seconds
    shown = "" if time is None else f", {1000 * time:.0f} ms a micro-batch"
    return f"recompute={option.recompute!r}: peak {option.peak_bytes / 2**30:.1f} GiB{shown}"
