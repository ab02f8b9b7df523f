"""Private fine-tuning: what differential privacy costs, and how little a small adapter needs.

    python scripts/examples/private_finetuning.py [--quick] [--out FILE]    about 100 s on two cores

DP-SGD (Abadi et al. 2016, arXiv:1607.00133) clips the gradient of each row and adds noise to their
sum, so that nobody can tell from the adapter whether a row was trained on: epsilon bounds how much
a row changes the probability of any outcome, by the factor e^epsilon. The noise has as many
dimensions as the adapter has numbers, and the clipped sum grows with the rows of a step. So a
private adapter is small and its batches are large. Needs matplotlib and dp-accounting:
pip install "fastlora[plots,privacy]".
"""

import argparse
import json
import secrets
import time
import warnings
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import fastlora
from fastlora.checkpoints.hub import DEMO

NOISES, STEPS, ROWS_IN_A_STEP, DELTA = (0.0, 0.7, 1.4), 12, 96, 1e-5
COLORS = ("#888888", "#0072B2", "#D55E00")  # of Okabe and Ito (2008)


def short_rows(name: str, tokenizer: fastlora.Tokenizer, longest: int) -> list[dict[str, Any]]:
    """The demo's rows of at most `longest` tokens."""
    rows = [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text().splitlines()]
    length = lambda row: len(tokenizer.apply_chat_template(row["messages"]))
    return [row for row in rows if length(row) <= longest]


def train(
    model: fastlora.Model,
    tokenizer: fastlora.Tokenizer,
    data: list[dict[str, Any]],
    held: list[dict[str, Any]],
    noise: float,
    quick: bool,
) -> fastlora.History:
    """A private run. The seed is a secret: who knows it can compute the noise."""
    with warnings.catch_warnings():
        if quick:  # its steps are so small that noise drowns the signal
            warnings.simplefilter("ignore")
        _, history = fastlora.train(
            fastlora.lora(model, r=1, lora_alpha=4, target_modules=["q_proj", "v_proj", "o_proj"]),
            tokenizer,
            data,
            eval_data=held,
            clip_per_example=1.0,
            noise_multiplier=noise,
            max_steps=2 if quick else STEPS,
            batch_size=8 if quick else 32,
            gradient_accumulation_steps=1 if quick else ROWS_IN_A_STEP // 32,
            learning_rate=2e-2,
            lr_scheduler="constant",
            warmup_ratio=0.0,
            max_grad_norm=None,
            packing=False,
            eval_every=1 if quick else 3,
            seed=secrets.randbits(63),
            progress=False,
        )
    return history


def draw(histories: dict[float, fastlora.History], before: float, out: Path) -> None:
    """Held-out loss by step, and by the epsilon that the steps have spent."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    by_step, by_epsilon = figure.subplots(1, 2, sharey=True)
    for (noise, history), color in zip(histories.items(), COLORS, strict=True):
        steps, losses = [0, *history.eval_steps], [before, *history.eval_losses]
        label = f"noise {noise:g}, epsilon {history.epsilon(DELTA):.1f}" if noise else "no noise"
        by_step.plot(steps, losses, "o-", color=color, label=label)
        if noise:
            spent = [0.0, *(epsilon_after(history, step) for step in history.eval_steps)]
            by_epsilon.plot(spent, losses, "o-", color=color)
    by_step.set(xlabel="step", ylabel="held-out loss")
    by_epsilon.set(xlabel=f"epsilon at delta = {DELTA:g}")
    by_step.legend(frameon=False)
    for axis in (by_step, by_epsilon):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=100)


def epsilon_after(history: fastlora.History, step: int) -> float:
    """What the first steps of a run have spent: the number of rows in a step is a binomial one."""
    rate, noise = history.sampling_rates[0], history.noise_multipliers[0]
    record = dict(loss=0.0, learning_rate=0.0, tokens=0, seconds=0.0, grad_norm=0.0)
    record |= dict(sampling_rate=rate, noise_multiplier=noise)
    return fastlora.History.of([record | {"step": i + 1} for i in range(step)]).epsilon(DELTA)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw held-out losses of private runs.")
    parser.add_argument("--quick", action="store_true", help="a few steps, for CI")
    parser.add_argument("--out", type=Path, default=Path("runs/private_finetuning.png"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    model, tokenizer = fastlora.load("demo", dtype="float32", device="cpu", max_seq_length=64)
    assert tokenizer is not None
    data, held = (short_rows(name, tokenizer, 28) for name in ("train", "heldout"))
    data, held = (data[:200], held[:8]) if args.quick else (data, held[:32])
    histories = {noise: train(model, tokenizer, data, held, noise, args.quick) for noise in NOISES}
    before = histories[0.0].losses[0]  # of the first step's rows, before its update
    draw(histories, before, args.out)
    found = {
        "rows": len(data),
        "before": before,
        "held_out_loss": {str(noise): h.eval_losses[-1] for noise, h in histories.items()},
        "epsilon": {str(noise): h.epsilon(DELTA) for noise, h in histories.items() if noise},
    }
    print(json.dumps({**found, "seconds": round(time.perf_counter() - start)}))


if __name__ == "__main__":
    main()
