"""Count sketch of many vectors: k numbers each, whose inner products estimate those of the vectors.

Charikar, Chen and Farach-Colton 2002, "Finding frequent items in data streams". Element e has a
sign from a hash of e, and its bucket is (e + h) mod k, where h is a hash of e // k. Two elements
are in one bucket with probability 1 / k if they are in different blocks of k elements, and never if
they are in the same one. So the estimate is without bias, and its variance is at most that of
buckets from a hash of e. Adding up blocks needs no atomics, so equal inputs give equal bits.

Nothing is stored: signs and buckets come from a key (dropout.py).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.dropout import fold, keep_mask


def count_sketch(x: Float[Tensor, "n p"], key: Int[Tensor, ""], k: int) -> Float[Tensor, "n k"]:
    """The sketches of n vectors of p elements.

    Args:
        x: the vectors.
        key: a result of `dropout.fold`. Vectors with different keys have independent sketches.
        k: number of buckets.
    """
    n, p = x.shape
    blocks = (p + k - 1) // k
    signs = torch.where(keep_mask(key, blocks, k, 0.5, x.device), 1.0, -1.0).to(x.dtype)
    signed = F.pad(x, (0, blocks * k - p)).view(n, blocks, k) * signs
    shift = fold(key, torch.arange(blocks, device=x.device)) % k
    source = (torch.arange(k, device=x.device) - shift[:, None]) % k
    return signed.gather(2, source.expand(n, blocks, k)).sum(1)
