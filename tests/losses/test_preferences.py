"""dpo, orpo, simpo, kto, dft, grpo: values and gradients against the papers' formulas."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora import losses
from oracles import losses as papers

BETAS = (0.1, 0.5, 2.5)


def random_logps(*shape: int, seed: int, scale: float = 4.0) -> Tensor:
    """Negative, in float32, between 0 and -scale."""
    generator = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(*shape, generator=generator) - 1e-3


def assert_same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: list[Tensor]):
    """Values and gradients of the mean, float32 against float64, at 1e-5."""
    results = []
    for function, dtype in ((ours, torch.float32), (theirs, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        value = function(*leaves)
        results.append((value, *torch.autograd.grad(value.mean(), leaves, allow_unused=True)))
    assert results[0][0].dtype == torch.float32
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert expected.isfinite().all()
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", ["sigmoid", "smoothed", "hinge", "ipo"])
def test_dpo_is_the_papers(beta, kind):
    smoothed = kind == "smoothed"
    settings = dict(beta=beta, loss_type="sigmoid" if smoothed else kind)
    settings |= dict(label_smoothing=0.2 if smoothed else 0.0)
    inputs = [random_logps(9, seed=seed) for seed in range(4)]
    bind = lambda fn: lambda *x: fn(*x, **settings)
    assert_same(bind(losses.dpo), bind(papers.dpo), inputs)


@pytest.mark.parametrize("beta", BETAS)
def test_orpo_is_the_papers(beta):
    inputs = [random_logps(9, seed=seed) for seed in range(2)]
    bind = lambda fn: lambda *x: fn(*x, beta=beta)
    assert_same(bind(losses.orpo), bind(papers.orpo), inputs)


def test_orpo_with_another_supervised_loss_replaces_the_papers():
    chosen, rejected, nll = (random_logps(5, seed=seed) for seed in range(3))
    plain = losses.orpo(chosen, rejected)
    torch.testing.assert_close(losses.orpo(chosen, rejected, nll_loss=nll), plain + chosen + nll)


def test_orpo_of_a_certain_reply_is_finite():
    chosen = torch.zeros(1, requires_grad=True)
    loss = losses.orpo(chosen, torch.tensor([-1.0]))
    (grad,) = torch.autograd.grad(loss.sum(), chosen)
    assert loss.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_simpo_is_the_papers(beta, label_smoothing):
    settings = dict(beta=beta, simpo_gamma=0.7, label_smoothing=label_smoothing)
    inputs = [random_logps(9, seed=seed) for seed in range(2)]
    bind = lambda fn: lambda *x: fn(*x, **settings)
    assert_same(bind(losses.simpo), bind(papers.simpo), inputs)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["baseline 0", "baseline above 0"])
def test_kto_is_the_papers(beta, shift):
    label = torch.tensor([1, 0, 0, 1, 1, 0, 1]).bool()
    logps, ref, other, ref_other = (random_logps(7, seed=seed) for seed in range(4))
    settings = dict(beta=beta, desirable_weight=1.3, undesirable_weight=0.6)
    settings |= dict(KL_logps=other + shift - 1, ref_KL_logps=ref_other)
    bind = lambda fn: lambda *x: fn(*x, label, **settings)
    assert_same(bind(losses.kto), bind(papers.kto), [logps, ref])


def test_kto_has_no_gradient_through_its_baseline():
    logps, ref, other = (random_logps(4, seed=seed) for seed in range(3))
    other = (other + 9).requires_grad_()
    kl = dict(KL_logps=other, ref_KL_logps=torch.zeros(4))
    loss = losses.kto(logps.requires_grad_(), ref, torch.ones(4).bool(), **kl)
    assert torch.autograd.grad(loss.sum(), other, allow_unused=True)[0] is None


def test_dft_is_the_papers_and_zero_for_untrained_tokens():
    assert_same(losses.dft, papers.dft, [random_logps(3, 5, seed=0)])
    assert not losses.dft(torch.zeros(3)).any()


GRPO = dict(epsilon=0.2, epsilon_high=0.28, beta=0.04, max_completion_length=8)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_grpo_is_the_papers(loss_type):
    mask = torch.arange(6)[None] < torch.tensor([6, 2, 4, 1])[:, None]
    logps, old, ref = (random_logps(4, 6, seed=seed, scale=1.0) for seed in range(3))
    advantages = torch.tensor([1.0, -0.5, -1.5, 0.7])
    settings: dict[str, Any] = GRPO | dict(loss_type=loss_type, num_items_in_batch=31)
    bind = lambda fn: lambda x: fn(x, old, advantages, mask, ref_logps=ref, **settings)
    assert_same(bind(losses.grpo), bind(papers.grpo), [logps])


def test_grpo_of_the_sampling_policy_is_the_policy_gradient():
    mask, advantages = torch.ones(2, 3).bool(), torch.tensor([1.0, -2.0])
    logps = random_logps(2, 3, seed=0).requires_grad_()
    (grad,) = torch.autograd.grad(losses.grpo(logps, None, advantages, mask), logps)
    torch.testing.assert_close(grad, -advantages[:, None].expand(2, 3) / 6)


def test_grpo_ignores_values_of_masked_tokens():
    mask, advantages = torch.tensor([[True, False]]), torch.ones(1)
    logps = torch.tensor([[-1.0, math.inf]], requires_grad=True)
    loss = losses.grpo(logps, None, advantages, mask, beta=0.1, ref_logps=torch.zeros(1, 2))
    (grad,) = torch.autograd.grad(loss, logps)
    assert loss.isfinite() and grad.isfinite().all() and grad[0, 1] == 0


def test_advantages_are_rewards_compared_with_their_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    ours = losses.group_advantages(rewards)
    torch.testing.assert_close(ours[0], (rewards[0] - 0.5) / (rewards[0].std() + 1e-4))
    assert not ours[1].any(), "equal rewards teach nothing"
    plain = losses.group_advantages(rewards, scale_rewards="none")
    torch.testing.assert_close(plain[0], rewards[0] - 0.5)
    batch = losses.group_advantages(rewards, scale_rewards="batch")
    torch.testing.assert_close(batch, plain / (rewards.std() + 1e-4))


ROWS = torch.full((2,), -1.0)
MASK = torch.ones(2, 3).bool()
CALLS: dict[str, Callable[..., Any]] = {
    "dpo": lambda **s: losses.dpo(ROWS, ROWS, ROWS, ROWS, **s),
    "orpo": lambda **s: losses.orpo(ROWS, ROWS, **s),
    "simpo": lambda **s: losses.simpo(ROWS, ROWS, **s),
    "kto": lambda **s: losses.kto(ROWS, ROWS, ROWS < 0, **s),
    "grpo": lambda **s: losses.grpo(MASK.float(), None, ROWS, MASK, **s),
    "group_advantages": lambda **s: losses.group_advantages(MASK.float(), **s),
}


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("dpo", dict(beta=0.0), "beta"),
        ("dpo", dict(beta=math.nan), "beta"),
        ("dpo", dict(label_smoothing=0.5), "label_smoothing"),
        ("dpo", dict(loss_type="kto_pair"), "loss_type"),
        ("orpo", dict(beta=-1.0), "beta"),
        ("simpo", dict(simpo_gamma=-0.1), "simpo_gamma"),
        ("kto", dict(undesirable_weight=-1.0), "undesirable_weight"),
        ("kto", dict(KL_logps=ROWS), "ref_KL_logps is missing"),
        ("grpo", dict(loss_type="ppo"), "loss_type"),
        ("grpo", dict(loss_type="dr_grpo"), "max_completion_length"),
        ("grpo", dict(beta=0.1), "ref_logps"),
        ("grpo", dict(beta=0.1, loss_type="dr_grpo"), "ref_logps(.|\n)*max_completion_length"),
        ("group_advantages", dict(scale_rewards="std"), "scale_rewards"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(name, wrong, message):
    CALLS[name]()
    with pytest.raises(ValueError, match=message):
        CALLS[name](**wrong)


def test_a_group_of_one_sample_is_refused():
    with pytest.raises(ValueError, match="at least 2 samples"):
        losses.group_advantages(torch.zeros(3, 1))
