"""Every Triton kernel is launched by ops/launch.py, with options that Triton does not change."""

import re
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlora
from fastlora.ops.launch import launch, pdl_options


class Recorded:
    """Takes the place of a kernel."""

    def __getitem__(self, grid):
        return lambda *args, **options: setattr(self, "launched", (grid, args, options))


def test_products_and_sums_are_fused_unless_the_launch_says_otherwise():
    """Triton 3.9 warns of a launch that leaves it open, and 3.10 changes the default."""
    kernel, x = Recorded(), torch.zeros(1)
    launch(kernel, (3,), x, 1, BLOCK=8)
    assert kernel.launched == ((3,), (x, 1), {"enable_fp_fusion": True, "BLOCK": 8})
    launch(kernel, (3,), x, enable_fp_fusion=False)
    assert kernel.launched == ((3,), (x,), {"enable_fp_fusion": False})


def test_a_kernel_is_launched_on_the_gpu_of_its_tensors(monkeypatch):
    """`load(device="cuda:1")` leaves cuda:0 the current device, on which Triton would launch."""
    current = [0]

    def exchange(device: int) -> int:
        before = current[0]
        current[0] = device if device >= 0 else before
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    with FakeTensorMode():
        x, y = torch.empty(2, device="cuda:3"), torch.empty(2)
    seen = []
    kernel = {(1,): lambda *args, **options: seen.append(current[0])}
    launch(kernel, (1,), (x, x), "number", x)
    launch(kernel, (1,), y)
    assert seen == [3, 0] and current == [0]


def test_no_other_module_launches_a_kernel():
    folder = Path(fastlora.__file__).parent
    found = [p for p in folder.rglob("*.py") if re.search(r"kernel\w*\[[^\]]*\]\(", p.read_text())]
    assert [path.relative_to(folder).as_posix() for path in found] == ["ops/launch.py"]


def test_programmatic_dependent_launch_needs_a_gpu_unless_it_is_asked_for():
    x = torch.zeros(1)
    assert pdl_options(x) == {"PDL": False, "launch_pdl": False}
    assert pdl_options(x, pdl=True) == {"PDL": True, "launch_pdl": True}
