"""dft and grpo: losses of token log-probabilities; group_advantages: rewards to advantages.

Argument names and defaults are those of TRL's SFTTrainer and GRPOTrainer (huggingface/trl, 1.16).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlora.arguments import (
    argument_problems,
    check_arguments,
    number,
    one_of,
    optional,
    whole_number,
)
from fastlora.errors import raise_problems

GRPO_KINDS = one_of("grpo", "bnpo", "dr_grpo", "dapo")
SCALE_REWARDS = one_of("group", "batch", "none")

# Added to the standard deviation of rewards, as in TRL. Groups whose rewards are all equal have 0.
_EPS = 1e-4


def dft(logps: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """-p log p of each token, with p as a constant (Wu et al. 2025, arXiv:2508.05629).

    Supervised fine-tuning whose tokens are weighted by their own probability. TRL's
    SFTConfig(loss_type="dft") divides the sum by the number of trained tokens.

    Args:
        logps: the result of `functional.token_logprobs`; zeros, for untrained tokens, stay zeros.
    """
    return -logps.detach().exp() * logps


def group_advantages(
    rewards: Float[Tensor, "groups g"], *, scale_rewards: str = "group"
) -> Float[Tensor, "groups g"]:
    """Rewards minus their mean over each group of samples of one prompt, scaled.

    Args:
        rewards: of g samples of each prompt.
        scale_rewards: divide by the standard deviation (plus 1e-4) of the "group", as GRPO does
            (Shao et al. 2024, arXiv:2402.03300), or of the "batch"; "none": as Dr. GRPO does (Liu
            et al. 2025, arXiv:2503.20783).

    Raises:
        ValueError: scale_rewards has another value, or a group has fewer than two samples.
    """
    check_arguments("losses.group_advantages", scale_rewards=(scale_rewards, SCALE_REWARDS))
    if rewards.shape[1] < 2:
        raise ValueError(
            f"losses.group_advantages: rewards is {list(rewards.shape)}; expected at least 2"
            " samples of each prompt, because a sample is compared with its group."
        )
    centred = rewards - rewards.mean(1, keepdim=True)
    match scale_rewards:
        case "group":
            return centred / (rewards.std(1, keepdim=True) + _EPS)
        case "batch":
            return centred / (rewards.std() + _EPS)
        case _:
            return centred


def grpo(
    logps: Float[Tensor, "b t"],
    old_logps: Float[Tensor, "b t"] | None,
    advantages: Float[Tensor, "b"],
    mask: Bool[Tensor, "b t"],
    *,
    loss_type: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    ref_logps: Float[Tensor, "b t"] | None = None,
    max_completion_length: int | None = None,
    num_items_in_batch: int | None = None,
) -> Float[Tensor, ""]:
    """The clipped policy loss: -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A).

    ratio is exp(logps - old_logps) of each token, A the advantage of its row. The kinds differ in
    what the sum over tokens is divided by:

    - "grpo": each row by its tokens, then the mean over rows (Shao et al. 2024, arXiv:2402.03300);
    - "bnpo": the tokens of this batch;
    - "dapo": the tokens of the whole step (Yu et al. 2025, arXiv:2503.14476; its epsilon_high is
      0.28);
    - "dr_grpo": rows times max_completion_length (Liu et al. 2025, arXiv:2503.20783).

    Args:
        logps: of the sampled tokens under the policy; `functional.token_logprobs`.
        old_logps: of the policy that sampled them. None: the policy itself, whose ratio is 1.
        advantages: of each row; `group_advantages`.
        mask: True for sampled tokens.
        loss_type: "grpo", "bnpo", "dr_grpo" or "dapo".
        epsilon: lower bound of clipping.
        epsilon_high: upper bound; None: epsilon.
        beta: weight of the divergence from the reference, exp(d) - d - 1 with d = ref_logps -
            logps.
        ref_logps: of the reference; needed if beta is not 0.
        max_completion_length: needed by "dr_grpo".
        num_items_in_batch: sampled tokens of the whole step, for "dapo"; None: of this batch.

    Raises:
        ValueError: an argument has another value, or one that the others need is missing.
    """
    rules = {
        "loss_type": (loss_type, GRPO_KINDS),
        "epsilon": (epsilon, number(low=0)),
        "epsilon_high": (epsilon_high, optional(number(low=0))),
        "beta": (beta, number(low=0)),
        "max_completion_length": (max_completion_length, optional(whole_number(1))),
        "num_items_in_batch": (num_items_in_batch, optional(whole_number(1))),
    }
    problems = argument_problems(rules)
    if beta and ref_logps is None:
        problems.append(f"ref_logps=None: beta={beta!r} needs those of the reference")
    if loss_type == "dr_grpo" and max_completion_length is None:
        problems.append('max_completion_length=None: loss_type="dr_grpo" divides by it')
    raise_problems(ValueError, "losses.grpo cannot use these arguments:", problems)
    divisor = _divisor(loss_type, mask, max_completion_length, num_items_in_batch)
    old_logps = logps.detach() if old_logps is None else old_logps
    high = epsilon if epsilon_high is None else epsilon_high
    # Masked tokens may have any values; 0 keeps exp() finite there, in value and gradient.
    ratio = torch.where(mask, logps - old_logps, 0.0).exp()
    weight = advantages[:, None]
    losses = -torch.minimum(ratio * weight, ratio.clamp(1 - epsilon, 1 + high) * weight)
    if beta and ref_logps is not None:
        d = torch.where(mask, ref_logps - logps, 0.0)
        losses = losses + beta * (d.exp() - d - 1)
    return (torch.where(mask, losses, 0.0) / divisor).sum()


def _divisor(
    loss_type: str,
    mask: Bool[Tensor, "b t"],
    max_completion_length: int | None,
    num_items_in_batch: int | None,
) -> Int[Tensor, "*b"] | int:
    """The divisor of each token's loss, before all are added up."""
    match loss_type:
        case "grpo":
            return len(mask) * mask.sum(1, keepdim=True).clamp(min=1)
        case "dr_grpo":
            assert max_completion_length is not None  # grpo has checked it
            return len(mask) * max_completion_length
        case "dapo" if num_items_in_batch is not None:
            return num_items_in_batch
        case _:
            return mask.sum().clamp(min=1)
