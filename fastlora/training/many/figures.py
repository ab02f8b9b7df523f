"""The progress bar's figures of several runs."""

from collections.abc import Sequence

from fastlora.training.many.prepare import RunState
from fastlora.training.progress import bar_figures


def pass_figures(taken: Sequence[RunState], count: int) -> dict[str, str]:
    """The mean loss and the lowest one, and sums over the runs, for the bar: name -> text.

    Args:
        taken: the runs that took a step in this pass.
        count: of all runs, also those that have ended.
    """
    records = [state.records[-1] for state in taken]
    if not records:
        return {"runs": f"0 of {count}"}
    losses = [record["loss"] for record in records]
    whole = dict(records[0]) | {"loss": sum(losses) / len(losses)}
    for name in ("read_tokens", "peak_share"):
        if name in whole:
            whole[name] = sum(record[name] for record in records)
    if evaluated := [record["eval_loss"] for record in records if "eval_loss" in record]:
        whole["eval_loss"] = min(evaluated)
    shown = bar_figures(whole)
    return {"runs": f"{len(records)} of {count}", "best": f"{min(losses):.4f}"} | shown
