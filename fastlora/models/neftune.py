"""NEFTune: noise on the embedded tokens, during training only.

    x + alpha / sqrt(length * d) * uniform(-1, 1)     (Jain et al. 2023, arXiv:2310.05914)

The length is that of the token's sequence without padding, as in the paper's code. transformers
takes the padded length of the batch, which is the same for rows without padding.
"""

from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.dropout import fold, uniform

# Folded into the seed. Dropout folds in the numbers of layers, which are smaller.
_NOISE = 2**30


def with_noise(
    x: Float[Tensor, "b t d"],
    alpha: float,
    seed: Int[Tensor, "*b"],
    lengths: Int[Tensor, "#b #t"],
    first_row: Int[Tensor, "*b"] | None = None,
) -> Float[Tensor, "b t d"]:
    """x with noise, in x's dtype; the noise is computed in float32.

    Args:
        x: the embedded tokens.
        alpha: neftune_alpha.
        seed: int64, for all rows or one for each; the same seed gives the same noise.
        lengths: of each token's row, or of its document if rows are packed.
        first_row: number of the first token's row in the noise of a larger batch, for the batch or
            for each row, as `seed`; None: 0.
    """
    b, t, d = x.shape
    rows = b * t if seed.dim() == 0 else t
    noise = uniform(fold(seed, _NOISE), rows, d, x.device, first_row).view(x.shape)
    scale = alpha / (lengths * d).float().sqrt()
    return (x + scale[..., None] * noise).to(x.dtype)
