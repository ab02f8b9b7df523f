"""Curvature, posteriors and influence over an adapter: functions of functions, for research.

    from fastlora import functional as FL, research
    loss = lambda a: FL.loss(a, model.base, model.spec, batch)
    product = research.hvp(loss, model.adapter)          # v -> H v, a tree like the adapter
    H = research.as_linear_operator(product, model.adapter)
    values, vectors = scipy.sparse.linalg.eigsh(H, k=3)

In reading order: trees.py turns trees into vectors and back. curvature.py has hvp and ggnvp,
operators.py makes SciPy operators of them, sharpness.py has SAM. fisher.py sums squared gradients
of examples, and posterior.py makes a Gaussian of them. attribution.py measures the influence of
examples at the checkpoints of a run, which run_points.py reads. README.md has measurements.
"""

from fastlora.research.attribution import influence
from fastlora.research.curvature import ggnvp, hvp
from fastlora.research.fisher import fisher_diagonal
from fastlora.research.operators import as_linear_operator
from fastlora.research.posterior import Laplace, laplace
from fastlora.research.run_points import TrainingPoint, training_points
from fastlora.research.sharpness import sam_value_and_grad
from fastlora.research.trees import ravel, unravel

__all__ = [
    "Laplace",
    "TrainingPoint",
    "as_linear_operator",
    "fisher_diagonal",
    "ggnvp",
    "hvp",
    "influence",
    "laplace",
    "ravel",
    "sam_value_and_grad",
    "training_points",
    "unravel",
]
