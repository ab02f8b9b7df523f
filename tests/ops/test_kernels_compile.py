"""The Triton kernels compile for an H100 (sm_90) in bf16; the interpreter cannot show that.

Compilation runs in a subprocess, because this process has Triton's interpreter on. It needs no GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels' tests need triton: requirements-test.txt has it")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastlora.ops.attention import flash_kernel as flash
from fastlora.ops.linear import dora_kernel, masked_lora_kernel
from fastlora.ops.loss import softmax_kernel
from fastlora.ops.swiglu import swiglu_kernel

bm, bn, warps, stages = swiglu_kernel._BACKWARD
SWIGLU = dict(R=16, BM=bm, BN=bn, PRECISION="tf32")
of_forward, of_backward = masked_lora_kernel._FORWARD, masked_lora_kernel._BACKWARD
THREE = dict(RANKS=(16, 16, 8), SLOTS=(0, 2, -1), R=16, PRECISION="tf32")

FLASH = {
    "forward": flash._forward_kernel,
    "queries": flash._query_gradient_kernel,
    "keys": flash._key_value_gradient_kernel,
}


def attention(which, head_dim, t, kilobytes):
    # Even lengths without spans, as in most training steps; odd lengths with spans.
    _, _, how = flash.tile(which, head_dim, t, 1024 * kilobytes)
    how |= dict(GROUP=4, D=head_dim, SPANS=t % 2 > 0, ROPE=t % 2 == 0, PRECISION="tf32")
    options = {name: how.pop(name) for name in ("num_warps", "maxnreg") if name in how}
    static = {k: v for k, v in how.items() if k in FLASH[which].arg_names}
    return FLASH[which], static, options, kilobytes


KERNELS = [
    (dora_kernel._row_norms_kernel, dict(R=16, BM=16, BK=256, PRECISION="tf32"), 4),
    (softmax_kernel._logprob_kernel, dict(IGNORE=-100, BLOCK=32768), 32),
    *(
        (swiglu_kernel._swiglu_kernel, dict(tile, HAS_GAINS=gains), 4)
        for tile in [dict(R=16, BM=64, BN=64, PRECISION="tf32")]
        for gains in (True, False)
    ),
    *(
        (swiglu_kernel._swiglu_backward_kernel, dict(SWIGLU, **which), warps)
        for which in [
            dict(HAS_A=True, HAS_GAINS=False, STAGES=stages),
            dict(HAS_A=False, HAS_GAINS=False, STAGES=stages),
            dict(HAS_A=True, HAS_GAINS=True, STAGES=None),
        ]
    ),
    (
        masked_lora_kernel._masked_x_a_kernel,
        dict(THREE, BM=of_forward[0], BK=of_forward[1]),
        of_forward[2],
    ),
    *(
        (
            masked_lora_kernel._masked_x_a_backward_kernel,
            dict(THREE, NEEDS_X=needs_x, NEEDS_A=needs_a, BM=of_backward[0], BN=of_backward[1]),
            of_backward[2],
        )
        for needs_x, needs_a in ((True, True), (True, False), (False, True))
    ),
    *(
        attention(which, head_dim, t, shared)
        for which in FLASH
        for head_dim, shared in ((64, 99), (128, 99), (128, 160))
        for t in (2048, 2047)
    ),
]
WIDE = {name: "*fp32" for name in (
    "sums_ptr logp_ptr gains_ptr dgains_ptr gram_ptr norm_ptr lse_ptr delta_ptr".split()
)}
WIDE |= {"label_ptr": "*i64", "keys_ptr": "*i64", "first_ptr": "*i32", "last_ptr": "*i32"}


def kind(name, constants):
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        return WIDE.get(name, "*bf16")
    return "fp32" if name.startswith("scal") else "i32"


for kernel, constants, how, *kilobytes in KERNELS:
    names = kernel.arg_names
    signature = {name: kind(name, constants) for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values)
    target = GPUTarget("cuda", 90, 32)
    options = how if isinstance(how, dict) else {"num_warps": how}
    compiled = triton.compile(source, target=target, options=options)
    # Bytes of shared memory per block on an RTX 30 or 40, or on the given card.
    least = 1024 * (*kilobytes, 99)[0]
    print(kernel.__name__, len(compiled.asm["cubin"]), compiled.metadata.shared / least)
"""


def test_every_kernel_compiles_for_an_h100_and_fits_its_shared_memory():
    environ = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environ, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    _, sizes, shared = zip(*(line.split() for line in ran.stdout.splitlines()), strict=True)
    assert len(sizes) == 29 and min(map(int, sizes)) > 1000
    assert max(map(float, shared)) <= 1, ran.stdout
