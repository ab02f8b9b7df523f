"""The losses as their papers print them, in plain float64 and without any care for overflow.

Every function takes the arguments of the function of the same name in fastlora.losses.
"""

from typing import Any

import torch
from torch import Tensor


def dpo(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, **s: Any
) -> Tensor:
    """arXiv:2305.18290, eq. 7, with label smoothing; SLiC; arXiv:2310.12036, eq. 17."""
    beta, wrong = s["beta"], s.get("label_smoothing", 0.0)
    ratio = (chosen.exp() / ref_chosen.exp()) / (rejected.exp() / ref_rejected.exp())
    win = ratio**beta / (1 + ratio**beta)
    return {
        "sigmoid": -(1 - wrong) * win.log() - wrong * (1 - win).log(),
        "hinge": torch.maximum(torch.zeros_like(ratio), 1 - beta * ratio.log()),
        "ipo": (ratio.log() - 0.5 / beta) ** 2,
    }[s.get("loss_type", "sigmoid")]


def orpo(chosen: Tensor, rejected: Tensor, **s: Any) -> Tensor:
    """arXiv:2403.07691, eq. 4 to 7."""
    odds = lambda logp: logp.exp() / (1 - logp.exp())
    ratio = odds(chosen) / odds(rejected)
    return -chosen - s["beta"] * (1 / (1 + 1 / ratio)).log()


def simpo(chosen: Tensor, rejected: Tensor, **s: Any) -> Tensor:
    """arXiv:2405.14734, eq. 6."""
    reward = s["beta"] * chosen - s["beta"] * rejected - s["simpo_gamma"]
    win, wrong = 1 / (1 + (-reward).exp()), s.get("label_smoothing", 0.0)
    return -(1 - wrong) * win.log() - wrong * (1 - win).log()


def kto(logps: Tensor, ref_logps: Tensor, label: Tensor, **s: Any) -> Tensor:
    """arXiv:2402.01306, eq. 8, with lambda - v of each row."""
    z = max((s["KL_logps"] - s["ref_KL_logps"]).mean().item(), 0)
    rows = []
    for logp, ref, good in zip(logps, ref_logps, label.tolist(), strict=True):
        reward = s["beta"] * (logp - ref - z)
        sigmoid = lambda x: 1 / (1 + torch.exp(-x))
        weight = s["desirable_weight"] if good else s["undesirable_weight"]
        rows.append(weight - weight * sigmoid(reward if good else -reward))
    return torch.stack(rows)


def dft(logps: Tensor) -> Tensor:
    """arXiv:2508.05629, eq. 9."""
    return -logps.exp().detach() * logps


def grpo(logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, **s: Any) -> Tensor:
    """arXiv:2402.03300, eq. 3; arXiv:2503.14476, eq. 8; arXiv:2503.20783; token by token."""
    low, high = 1 - s["epsilon"], 1 + s["epsilon_high"]
    rows, total = [], logps.new_zeros(())
    for i, row in enumerate(mask.tolist()):
        terms = []
        for j, sampled in enumerate(row):
            if sampled:
                ratio = (logps[i, j] - old[i, j]).exp()
                term = torch.min(ratio * advantages[i], ratio.clip(low, high) * advantages[i])
                inverse = (s["ref_logps"][i, j] - logps[i, j]).exp()
                terms.append(term - s["beta"] * (inverse - inverse.log() - 1))
        rows.append(torch.stack(terms).mean())
        total = total + torch.stack(terms).sum()
    return -{
        "grpo": torch.stack(rows).mean(),
        "bnpo": total / mask.sum(),
        "dapo": total / s["num_items_in_batch"],
        "dr_grpo": total / (len(mask) * s["max_completion_length"]),
    }[s["loss_type"]]


def divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """arXiv:2306.13649, eq. 1, and its two limits as TRL defines them."""
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    kl = lambda a, b: (a * (a / b).log()).sum(-1)
    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)
