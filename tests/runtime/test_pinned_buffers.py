"""Pinned memory of recorded functions: taken from buffers that were allocated before.

On the CPU the buffers are not pinned. tests/gpu/test_steps.py records steps with "offload".
"""

import pytest
import torch

from fastlora.runtime import host_offload
from fastlora.runtime.cuda_graph import CUDAGraphed
from fastlora.runtime.host_offload import Copies, HostStash
from fastlora.runtime.pinned_buffers import PinnedBuffers, fitting, pinned_from, pinned_like


def test_buffers_are_taken_in_order_and_requests_are_noted():
    buffers = PinnedBuffers([torch.empty(n, dtype=torch.uint8) for n in (64, 8, 64)])
    x = torch.arange(12.0).view(3, 4).t()  # 48 bytes, not contiguous
    with pinned_from(buffers):
        taken = [pinned_like(x) for _ in range(4)]
    owned = [any(y.data_ptr() == b.data_ptr() for b in buffers.buffers) for y in taken]
    assert owned == [True, False, True, False]  # the second is too small, and there is no fourth
    assert buffers.sizes == [48] * 4
    for y in (*taken, pinned_like(x)):
        assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), x.dtype)
        assert y.copy_(x).equal(x)
    assert buffers.sizes == [48] * 4  # not outside of the context


def test_buffers_that_are_large_enough_stay():
    old = fitting([], [16, 32])
    new = fitting(old, [8, 64, 4])
    assert new[0] is old[0] and [x.nbytes for x in new] == [16, 64, 4]
    assert fitting(new, [16]) == new


@pytest.fixture
def stashed(monkeypatch):
    """(a function whose layers wait on the host, the stashes that it has made)."""
    monkeypatch.setattr(host_offload, "_MIN_BYTES", 0)
    made = []

    def layer(x):
        return x.sin() * x

    def run(x):
        stash = HostStash(x.device)
        made.append(stash)
        x = x.detach().requires_grad_()
        y = x
        for _ in range(3):
            y = stash.run(layer, y * 1.0, [], Copies([], []))
        return {"grad": torch.autograd.grad(y.sum(), x)[0]}

    return run, made


def test_recordings_write_to_memory_that_outlives_them(stashed, captures):
    """The first call notes the sizes. Recordings of all shapes share the buffers."""
    run, made = stashed
    graphed, wide = CUDAGraphed(run), torch.linspace(0, 1, 40)
    plain = run(wide)["grad"]
    for _ in range(3):
        assert torch.equal(graphed(wide)["grad"], plain)
    assert len(captures) == 1
    buffers = [x.data_ptr() for x in graphed.buffers]
    assert len({*buffers}) == len(buffers) == sum(map(len, made[-1].host)) >= 3
    recorded = made[2]  # after the plain one and the first call's; replays run again here
    assert [x.data_ptr() for parcel in recorded.host for x in parcel] == buffers
    before, narrow = [*buffers], torch.linspace(0, 1, 20)
    for _ in range(2):
        graphed(narrow)
    assert len(captures) == 2 and [x.data_ptr() for x in graphed.buffers] == before
