"""The gradient noise scale (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1).

The gradient of a batch of T tokens has the expected squared norm |G|^2 + S / T, where G is the true
gradient and S the trace of the covariance of one token's gradient. S / |G|^2 is the "simple" noise
scale: the batch size, in tokens, above which more tokens hardly improve a step. A step of several
micro-batches has gradients over two numbers of tokens: those of the micro-batches, and their mean.
Their squared norms give both unknowns, and computing these is the only extra work.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def noise_figures(
    squares: Sequence[Float[Tensor, ""]], whole: Float[Tensor, ""], counts: Sequence[int]
) -> dict[str, Tensor]:
    """Estimates of |G|^2 and S, without bias; nothing if there are not two squares.

    Args:
        squares: squared norms of the gradients of each micro-batch's mean loss.
        whole: squared norm of the gradient of the step's mean loss.
        counts: tokens, or items of another loss, of each micro-batch.

    Returns:
        "gradient_signal", |G|^2, and "gradient_noise", S.
    """
    if len(squares) < 2 or min(counts) == 0:
        return {}
    inverse = sum(1 / n for n in counts) / len(counts)
    small = torch.stack([*squares]).mean()
    noise = (small - whole) / (inverse - 1 / sum(counts))
    return {"gradient_signal": whole - noise / sum(counts), "gradient_noise": noise}


def noise_scale(signals: Sequence[float], noises: Sequence[float]) -> float:
    """S / |G|^2 from the means of both over steps; infinite if the mean of |G|^2 is not positive.

    The means are taken first, because the quotient of one step's estimates has a large bias.
    """
    total = sum(signals)
    return max(sum(noises), 0.0) / total if total > 0 else float("inf")
