"""dpo, orpo, kto, simpo: the loss of each preference row, from log-probabilities of replies.

Argument names and defaults are those of TRL's trainers (huggingface/trl, 1.16). TRL's loss is the
mean of these values.

"logps" of a reply is a sum over its tokens for dpo and kto, and a mean over them for orpo and
simpo; `row_logprobs` gives the sums and the numbers of tokens.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlora.arguments import Rule, argument_problems, check_arguments, number, one_of
from fastlora.errors import raise_problems

# Shared by the records in objectives.py, so that a rule is written once.
POSITIVE = number(above=0)
NOT_NEGATIVE = number(low=0)
LABEL_SMOOTHING = Rule(
    lambda x: number(low=0, high=0.5).accepts(x) and x < 0.5, "a number in [0, 0.5)"
)
DPO_KINDS = one_of("sigmoid", "hinge", "ipo")

# orpo needs log(1 - p), which is -inf for a reply with p = 1. In float32 1 - 1e-7 is not 1.
_LARGEST_LOGP = -1e-7


def dpo(
    chosen_logps: Float[Tensor, "b"],
    rejected_logps: Float[Tensor, "b"],
    ref_chosen_logps: Float[Tensor, "b"],
    ref_rejected_logps: Float[Tensor, "b"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
) -> Float[Tensor, "b"]:
    """-log sigmoid(beta (log-ratio of the chosen reply - log-ratio of the rejected reply)).

    A log-ratio is log p of the policy minus log p of the reference.

    Args:
        chosen_logps: of the policy; sums over tokens, means for "ipo".
        rejected_logps: the same of the rejected replies.
        ref_chosen_logps: of the reference; no gradient is needed.
        ref_rejected_logps: the same of the rejected replies.
        beta: a larger one keeps the policy closer to the reference.
        label_smoothing: the probability, in [0, 0.5), that a label is wrong; with "sigmoid" only
            (conservative DPO of Rafailov et al.'s code, which TRL 1.16 no longer has).
        loss_type: "sigmoid" (Rafailov et al. 2023, arXiv:2305.18290), "hinge" (SLiC, Zhao et al.
            2023, arXiv:2305.10425) or "ipo" (Azar et al. 2023, arXiv:2310.12036).

    Raises:
        ValueError: beta, label_smoothing or loss_type has another value.
    """
    rules = {
        "beta": (beta, POSITIVE),
        "label_smoothing": (label_smoothing, LABEL_SMOOTHING),
        "loss_type": (loss_type, DPO_KINDS),
    }
    problems = argument_problems(rules) + smoothing_problems(loss_type, label_smoothing)
    raise_problems(ValueError, "losses.dpo cannot use these arguments:", problems)
    margin = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    match loss_type:
        case "sigmoid":
            return _smoothed(beta * margin, label_smoothing)
        case "hinge":
            return (1 - beta * margin).relu()
        case _:
            return (margin - 1 / (2 * beta)).square()


def smoothing_problems(loss_type: str, label_smoothing: float) -> list[str]:
    """One line if a kind of `dpo` would ignore label_smoothing."""
    if loss_type == "sigmoid" or not label_smoothing:
        return []
    return [f"label_smoothing={label_smoothing!r}: loss_type={loss_type!r} has none; expected 0"]


def _smoothed(logits: Float[Tensor, "b"], label_smoothing: float) -> Float[Tensor, "b"]:
    """Binary cross-entropy of sigmoid(logits) with the target 1 - label_smoothing."""
    wrong = label_smoothing
    return -(1 - wrong) * F.logsigmoid(logits) - wrong * F.logsigmoid(-logits)


def orpo(
    chosen_logps: Float[Tensor, "b"],
    rejected_logps: Float[Tensor, "b"],
    *,
    beta: float = 0.1,
    nll_loss: Float[Tensor, "*b"] | None = None,
) -> Float[Tensor, "b"]:
    """Supervised loss of the chosen reply - beta log sigmoid(difference of log-odds).

    The log-odds of a reply are log(p / (1 - p)) with p = exp(mean log-probability of its tokens)
    (Hong et al. 2024, arXiv:2403.07691). Needs no reference.

    Args:
        chosen_logps: means over tokens. Values above -1e-7 count as -1e-7, so that the loss is
            finite.
        rejected_logps: the same of the rejected replies.
        beta: weight of the odds; lambda in the paper.
        nll_loss: the supervised loss; None: -chosen_logps, as in the paper. TRL's is a mean over
            all tokens of prompts and chosen replies.

    Raises:
        ValueError: beta has another value.
    """
    check_arguments("losses.orpo", beta=(beta, NOT_NEGATIVE))
    supervised = -chosen_logps if nll_loss is None else nll_loss
    log_odds = _log_odds(chosen_logps) - _log_odds(rejected_logps)
    return supervised - beta * F.logsigmoid(log_odds)


def _log_odds(logps: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
    logps = logps.clamp(max=_LARGEST_LOGP)
    # expm1, because 1 - exp(x) loses all digits for x near 0.
    return logps - torch.log(-torch.expm1(logps))


def simpo(
    chosen_logps: Float[Tensor, "b"],
    rejected_logps: Float[Tensor, "b"],
    *,
    beta: float = 0.1,
    simpo_gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "b"]:
    """-log sigmoid(beta (chosen_logps - rejected_logps) - simpo_gamma).

    Needs no reference (Meng et al. 2024, arXiv:2405.14734). The paper uses beta from 2 to 10; 0.1
    is TRL's default. Equals TRL's CPOTrainer with loss_type="simpo" and cpo_alpha=0.

    Args:
        chosen_logps: means over tokens.
        rejected_logps: the same of the rejected replies.
        beta: scale of the rewards.
        simpo_gamma: the margin that the chosen reply should win by.
        label_smoothing: the probability, in [0, 0.5), that a label is wrong.

    Raises:
        ValueError: beta, simpo_gamma or label_smoothing has another value.
    """
    check_arguments(
        "losses.simpo",
        beta=(beta, POSITIVE),
        simpo_gamma=(simpo_gamma, NOT_NEGATIVE),
        label_smoothing=(label_smoothing, LABEL_SMOOTHING),
    )
    return _smoothed(beta * (chosen_logps - rejected_logps) - simpo_gamma, label_smoothing)


def kto(
    logps: Float[Tensor, "b"],
    ref_logps: Float[Tensor, "b"],
    label: Bool[Tensor, "b"] | Int[Tensor, "b"],
    *,
    KL_logps: Float[Tensor, "n"] | None = None,
    ref_KL_logps: Float[Tensor, "n"] | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, "b"]:
    """weight (1 - sigmoid(±beta (log-ratio - z))): + for good replies, - for bad ones.

    The baseline z is the mean of KL_logps - ref_KL_logps, at least 0 and without gradient
    (Ethayarajh et al. 2024, arXiv:2402.01306).

    Args:
        logps: sums over tokens, of the policy.
        ref_logps: the same of the reference.
        label: True for a good reply.
        KL_logps: sums over tokens of replies to other prompts, which estimate the divergence of
            the policy from the reference. None: z = 0, as TRL's loss_type="apo_zero_unpaired".
        ref_KL_logps: the same of the reference.
        beta: a larger one keeps the policy closer to the reference.
        desirable_weight: of good replies.
        undesirable_weight: of bad replies.

    Raises:
        ValueError: a number has another value, or only one of KL_logps and ref_KL_logps is given.
    """
    check_arguments(
        "losses.kto",
        beta=(beta, POSITIVE),
        desirable_weight=(desirable_weight, NOT_NEGATIVE),
        undesirable_weight=(undesirable_weight, NOT_NEGATIVE),
    )
    if (KL_logps is None) != (ref_KL_logps is None):
        missing = "KL_logps" if KL_logps is None else "ref_KL_logps"
        raise ValueError(
            f"losses.kto: {missing} is missing; expected both of KL_logps and"
            " ref_KL_logps, or none of them."
        )
    log_ratio, good = logps - ref_logps, label.bool()
    if KL_logps is not None and ref_KL_logps is not None:
        log_ratio = log_ratio - (KL_logps - ref_KL_logps).mean().clamp(min=0).detach()
    reward = beta * torch.where(good, log_ratio, -log_ratio)
    weight = torch.where(good, desirable_weight, undesirable_weight).to(reward)
    return weight * (1 - reward.sigmoid())
