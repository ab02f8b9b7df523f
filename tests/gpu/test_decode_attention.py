"""decode_attention in a CUDA graph, and over caches of more than 2**31 numbers (11 GB)."""

import math
from typing import Any

import pytest
import torch

from fastlora.ops.decode.attention import decode_attention, decode_attention_reference
from oracles.decode_attention import DEVICE, LENGTHS, by_sdpa, copied, drawn

pytestmark = [pytest.mark.gpu, pytest.mark.part("kernels")]
attend: Any = decode_attention  # its arguments come as lists
reference: Any = decode_attention_reference


def test_one_graph_serves_all_lengths():
    given = drawn((8, 2, 64), torch.bfloat16)
    run = lambda: attend(*given, 300)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for shift in range(0, len(LENGTHS)):
        fresh = drawn((8, 2, 64), torch.bfloat16, LENGTHS[shift:] + LENGTHS[:shift])
        for old, new in zip(given, fresh, strict=True):
            old.copy_(new)
        wanted = attend(*fresh, 300)
        for _ in range(3):
            found.fill_(math.nan)
            graph.replay()
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("heads", [(8, 4, 256), (8, 2, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_capped_scores_err_no_more_than_plain_torch(dtype, heads):
    given = drawn(heads, dtype)
    whole = [x if x is None or not x.is_floating_point() else x.nan_to_num() for x in given]
    how = 300, 0.1, 5.0
    exact = reference(*copied(whole, torch.float64), *how)
    plain, found = reference(*copied(whole), *how), attend(*copied(given), *how)
    error = lambda y: (y.double() - exact).norm() / exact.norm()
    assert error(found) <= max(1.2 * error(plain), 1e-6)


def test_caches_may_hold_more_than_2_to_the_31_numbers():
    b, kv, s, hd = 17, 8, 131072, 128
    gen = torch.Generator(DEVICE).manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=gen, device=DEVICE, dtype=torch.bfloat16)
    caches = [torch.full((b, kv, s, hd), math.nan, device=DEVICE, dtype=torch.bfloat16)
              for _ in range(2)]  # fmt: skip
    assert caches[0].numel() > 2**31
    q, k, v = new(b, 32, hd), new(b, kv, hd), new(b, kv, hd)
    lengths = torch.full((b,), 100, device=DEVICE)
    lengths[-1] = s - 1
    for cache in caches:
        cache[:, :, :100] = new(b, kv, 100, hd)
        cache[-1, :, : s - 1] = new(kv, s - 1, hd)
    given = [q, k, v, None, None, *caches, lengths]
    found, wanted = attend(*given, None), by_sdpa(given, None)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-3)
    assert torch.equal(caches[0][-1, :, -1], k[-1])
