"""Private fine-tuning: held-out loss against epsilon, by DP-SGD over a small adapter.

    python scripts/examples/private_finetuning.py [--quick] [--out FILE]     about 80 s on one core

DP-SGD (Abadi et al. 2016, arXiv:1607.00133) clips the gradient of each row and adds noise to their
sum. Adding or removing a row then changes the probability of any adapter by a factor of at most
e^epsilon, up to delta. The noise has as many dimensions as the adapter has numbers, and the signal
grows with the rows of a step, so the adapter is small and the steps are large. Epsilon needs
dp-accounting: pip install -e '.[plots,privacy]'.
"""

import secrets
import warnings
from pathlib import Path
from typing import Any

import figures as fig

import fastlora
from fastlora.data.encoding import encode_rows

NOISES, STEPS, ROWS_IN_A_STEP, DELTA = (0.0, 0.7, 1.4), 20, 96, 1e-5
TARGETS = ["q_proj", "v_proj", "o_proj"]

Rows = list[dict[str, Any]]


def short_rows(name: str, quick: bool, tokenizer: fastlora.Tokenizer, longest: int = 36) -> Rows:
    """The demo's rows of at most `longest` tokens, as chats."""
    chats = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}]}
        for p, r in fig.pairs(name, quick)
    ]
    encoded = encode_rows(chats, tokenizer, max_seq_length=512)
    pairs = zip(chats, encoded, strict=True)
    return [row for row, example in pairs if len(example.input_ids) <= longest]


def train(
    model: fastlora.Model,
    tokenizer: fastlora.Tokenizer,
    data: Rows,
    held: Rows,
    noise: float,
    quick: bool,
) -> fastlora.History:
    """A private run, and its history. The seed is secret: the noise can be computed from it."""
    with warnings.catch_warnings():
        # Of the larger noise, and of quick's small steps, train says that they drown the signal.
        warnings.filterwarnings("ignore", "the noise drowns the signal")
        _, history = fastlora.train(
            fastlora.lora(model, r=1, lora_alpha=4, target_modules=TARGETS),
            tokenizer,
            data,
            eval_data=held,
            clip_per_example=1.0,
            noise_multiplier=noise,
            max_steps=2 if quick else STEPS,
            batch_size=8 if quick else 32,  # rows in memory
            gradient_accumulation_steps=1 if quick else ROWS_IN_A_STEP // 32,
            learning_rate=1e-2,
            lr_scheduler="constant",
            warmup_ratio=0.0,
            max_grad_norm=None,
            packing=False,
            eval_every=1 if quick else 4,
            seed=secrets.randbits(63),
            progress=False,
        )
    return history


def spent(history: fastlora.History, steps: int) -> float:
    """The epsilon of the first steps of a run."""
    record = dict(loss=0.0, learning_rate=0.0, tokens=0, seconds=0.0, grad_norm=0.0)
    record |= dict(sampling_rate=history.sampling_rates[0])
    record |= dict(noise_multiplier=history.noise_multipliers[0])
    return fastlora.History.of([{**record, "step": i + 1} for i in range(steps)]).epsilon(DELTA)


def draw(histories: dict[float, fastlora.History], before: float, out: Path) -> None:
    """Held-out loss by step, and by the epsilon that the steps have spent."""
    figure, (by_step, by_epsilon) = fig.new_figure(2, width=8.4, height=3.6)
    colors = (fig.GREY, fig.BLUE, fig.ORANGE)
    for (noise, history), color in zip(histories.items(), colors, strict=True):
        losses = [before, *history.eval_losses]
        label = f"noise {noise:g}, epsilon {history.epsilon(DELTA):.1f}" if noise else "no noise"
        by_step.plot([0, *history.eval_steps], losses, "o-", color=color, label=label)
        if noise:
            epsilons = [0.0, *(spent(history, steps) for steps in history.eval_steps)]
            by_epsilon.plot(epsilons, losses, "o-", color=color)
    by_step.set(xlabel="step", ylabel="held-out loss")
    by_epsilon.set(xlabel=f"epsilon at delta = {DELTA:g}")
    by_step.legend(frameon=False)
    fig.save(figure, out)


def main(quick: bool, out: Path) -> dict[str, Any]:
    """Draw the figure. Returns the held-out losses and epsilons by noise."""
    model, tokenizer = fig.demo()
    data = short_rows("train", quick, tokenizer)
    held = short_rows("heldout", quick, tokenizer)[:32]
    histories = {noise: train(model, tokenizer, data, held, noise, quick) for noise in NOISES}
    examples = encode_rows(held, tokenizer, max_seq_length=512)
    before = float(fig.evaluate([fastlora.lora(model, r=1)], examples))
    draw(histories, before, out)
    return {
        "rows": len(data),
        "before": before,
        "after": {noise: history.eval_losses[-1] for noise, history in histories.items()},
        "epsilon": {noise: history.epsilon(DELTA) for noise, history in histories.items()},
    }


if __name__ == "__main__":
    fig.run(main)
