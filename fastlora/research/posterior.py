"""Laplace-LoRA: a Gaussian posterior over the adapter, and calibrated predictions from it.

Laplace-LoRA (Yang et al. 2024, arXiv:2308.13111) fits a Gaussian around the trained adapter a:

    posterior  N(a, S),  S = diag(1 / (F + prior_precision)),
    F = sum over the examples of the squared gradient of the log-likelihood (diagonal, empirical)

The prior is N(0, 1 / prior_precision) on every number of the adapter. Its precision is chosen by
the Laplace evidence (their equation 12), here by MacKay's fixed point (1992, Neural Computation
4(3)). Their Hessian is Kronecker-factored, with factors d x d for LoRA's outer sides; this one is
diagonal.

Predictions are linearised (Immer et al. 2021, arXiv:2008.08400): the logits are f(a) + J e with
e ~ N(0, S), and their softmax is averaged over samples of e.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fastlora.arguments import (
    FUNCTION,
    RANDOM_SEED,
    Rule,
    check_arguments,
    number,
    whole_number,
)
from fastlora.ops.dispatch import refuse_transforms
from fastlora.research.curvature import linear_map
from fastlora.research.fisher import check_example_arguments, sum_of_squares

_PRECISION = number(above=0.0)
_PRIOR = Rule(
    lambda x: (type(x) is str and x == "evidence") or _PRECISION.accepts(x),
    '"evidence" or a number > 0',
)
_ROUNDS = 200  # at most; about ten are needed if the data determine most of the adapter
_RELATIVE_CHANGE = 1e-6


@dataclass(frozen=True, eq=False, kw_only=True)
class Laplace:
    """A Gaussian over the adapter with a diagonal covariance; `laplace` makes one."""

    mean: Any  # the trained adapter
    fisher: Any  # sums over the examples, leaf by leaf
    examples: int
    prior_precision: float

    def variance(self) -> Any:
        """The posterior variance of every number, a tree like the adapter."""
        return tree_map(lambda f: 1.0 / (f + self.prior_precision), self.fisher)

    def with_prior(self, prior_precision: float) -> "Laplace":
        """The posterior under another prior; no gradient is computed again.

        Raises:
            ValueError: prior_precision is not a number > 0.
        """
        check_arguments("Laplace.with_prior", prior_precision=(prior_precision, _PRECISION))
        return replace(self, prior_precision=float(prior_precision))

    def log_evidence(self) -> float:
        """The logarithm of the Laplace evidence, without the log-likelihood at the mean.

        -precision |a|^2 / 2 + p log(precision) / 2 - sum(log(F + precision)) / 2
        """
        p = sum(f.numel() for f in tree_leaves(self.fisher))
        prior = torch.tensor(self.prior_precision, dtype=torch.float64, device="cpu")
        determinant = sum(
            (f.double() + self.prior_precision).log().sum().item() for f in tree_leaves(self.fisher)
        )
        return 0.5 * float(p * prior.log() - prior * _squared_norm(self.mean) - determinant)

    def samples(self, n: int, seed: int) -> Any:
        """n adapters drawn from the posterior, as a stack: every leaf [n, ...].

        One pass runs them all: `FL.forward(stack, base, spec, input_ids.repeat(n, 1))` gives the
        first b rows to sample 0, the next b to sample 1, and so on. Sample i is the same for every
        n > i, and samples of different seeds are independent.

        Raises:
            ValueError: n < 1, or seed is not one that torch.Generator accepts.
        """
        check_arguments("Laplace.samples", n=(n, whole_number(1)), seed=(seed, RANDOM_SEED))
        return tree_map(lambda x, e: x + e, self.mean, self._deviations(range(n), seed))

    def _deviations(self, numbers: Sequence[int], seed: int) -> Any:
        """The draws of N(0, S) with these numbers, every leaf [n, ...]. Each has a generator of its
        number and the seed, so draws of different seeds are independent."""
        # Not torch.randn: torch.func.linearize traces it, and would draw again in every product.
        generators = [np.random.default_rng([i, seed]) for i in numbers]
        leaves, structure = tree_flatten(self.mean)
        drawn = []
        for x, f in zip(leaves, tree_leaves(self.fisher), strict=True):
            noise = np.stack([g.standard_normal(tuple(x.shape)) for g in generators])
            scale = (f + self.prior_precision).rsqrt()
            drawn.append((torch.from_numpy(noise).to(x.device, f.dtype) * scale).to(x.dtype))
        return tree_unflatten(drawn, structure)

    def predict(
        self,
        logits_fn: Callable[[Any], Float[Tensor, "*m c"]],
        *,
        samples: int = 32,
        seed: int = 0,
    ) -> Float[Tensor, "*m c"]:
        """Probabilities: the mean softmax of the linearised logits over posterior samples.

        Costs one linearisation (about two gradients) and a third of a gradient for each sample. It
        draws with NumPy, so it cannot be compiled; compile `logits_fn`.

        Args:
            logits_fn: adapter -> logits [..., c], such as those of the answer's choices,
                `FL.forward(a, base, spec, ids)[:, -1, choices]`.
            samples: number of samples.
            seed: of the samples, which are those of `samples(n, seed)`.

        Raises:
            ValueError: an argument is wrong, or `logits_fn` does not return one tensor of logits.
        """
        rules = {
            "logits_fn": (logits_fn, FUNCTION), "samples": (samples, whole_number(1)),
            "seed": (seed, RANDOM_SEED),
        }  # fmt: skip
        check_arguments("Laplace.predict", **rules)
        logits, push, _ = linear_map(logits_fn, self.mean, "Laplace.predict")
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = torch.zeros_like(wide)
        for i in range(samples):
            deviation = tree_map(lambda e: e[0], self._deviations([i], seed))
            total += (wide + push(deviation)).softmax(-1)
        return total / samples


def laplace(
    fn: Callable[[Any, Any], Float[Tensor, "b"]],
    adapter: Any,
    batches: Iterable[Any],
    *,
    prior_precision: float | str = "evidence",
) -> Laplace:
    """The Laplace posterior around a trained adapter.

    Args:
        fn: (adapter, batch) -> [b], the negative log-likelihood of each example, summed and not
            averaged over its tokens: `FL.row_losses(adapter, base, spec, batch)[0]`.
        adapter: trained, the posterior's mean.
        batches: of the training data. The gradients of one batch are held together.
        prior_precision: of every number of the adapter; "evidence" maximises the Laplace evidence.

    Raises:
        ValueError: an argument is wrong, there is no example, or no finite precision maximises the
            evidence.
    """
    refuse_transforms("research.laplace")
    prior = (prior_precision, _PRIOR)
    check_example_arguments("research.laplace", fn, adapter, batches, prior_precision=prior)
    mean = tree_map(torch.Tensor.detach, adapter)
    fisher, examples = sum_of_squares(fn, mean, batches, "research.laplace")
    precision = _by_evidence(mean, fisher) if isinstance(prior_precision, str) else prior_precision
    return Laplace(mean=mean, fisher=fisher, examples=examples, prior_precision=float(precision))


def _by_evidence(mean: Any, fisher: Any) -> float:
    """precision = gamma / |a|^2, gamma = sum(F / (F + precision)): the directions that the data
    determine."""
    size = _squared_norm(mean)
    wide = [f.double() for f in tree_leaves(fisher)]
    p = sum(f.numel() for f in wide)
    if not size or not any(f.any() for f in wide):
        raise ValueError(
            "research.laplace: an adapter or a gradient of zero has no evidence for a prior;"
            " pass prior_precision."
        )
    precision = p / size
    for _ in range(_ROUNDS):
        before = precision
        gamma = sum(float((f / (f + precision)).sum()) for f in wide)
        precision = gamma / size
        if abs(precision - before) <= _RELATIVE_CHANGE * before:
            break
    return precision


def _squared_norm(tree: Any) -> float:
    return sum(float(x.double().square().sum()) for x in tree_leaves(tree))
