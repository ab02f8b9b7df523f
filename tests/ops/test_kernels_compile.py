"""The Triton kernels compile for an H100 (sm_90) in bf16; the interpreter cannot show that.

They compile with the environment's Triton, and with that of the oldest torch that fastlora
supports. The kernels that find a step's next tokens also compile for an A100 (sm_80), without PDL.

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
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastlora.ops.attention import flash_kernel as flash
from fastlora.ops.linear import dora_kernel, low_rank_gradients_kernel, masked_lora_kernel
from fastlora.ops.loss import softmax_kernel
from fastlora.ops.quant import dequantize_kernel, e4m3_kernel, levels_ptx
from fastlora.ops.swiglu import swiglu_kernel

bm, bn, warps, stages = swiglu_kernel._BACKWARD
rows, columns, of_warps = swiglu_kernel._FORWARD
SWIGLU = dict(R=16, BM=bm, BN=bn, PRECISION="tf32")
of_forward, of_backward = masked_lora_kernel._FORWARD, masked_lora_kernel._BACKWARD
THREE = dict(RANKS=(16, 16, 8), SLOTS=(0, 2, -1), R=16, PRECISION="tf32")
ONE = dict(RANKS=(16,), SLOTS=(1,), R=16, PRECISION="tf32")
low_rows, low_columns, low_warps, low_stages = low_rank_gradients_kernel._TILE
LAYERS = dict(WIDTHS=(2048, 512, 512), RANKS=(16, 16, 8), R=16, BN=low_columns)
PARTS = dict(LAYERS, STARTS=(0, 2048, 2560), BM=low_rows, STAGES=low_stages, PRECISION="tf32")


def masked_backward(which, static, needs_x, needs_a):
    bm, bn, pair, warps = of_backward[which]
    sizes = dict(BM=bm, BN=bn, PAIR=pair, HALF=64, NEEDS_X=needs_x, NEEDS_A=needs_a)
    return masked_lora_kernel._masked_x_a_backward_kernel, dict(static, **sizes), warps


def logprobs(vocabulary, capped):
    block, warps = softmax_kernel.block_and_warps(vocabulary)
    return softmax_kernel._logprob_kernel, dict(IGNORE=-100, BLOCK=block, CAPPED=capped), warps


def quantised(widths, has_factors):
    columns, warps = e4m3_kernel._rows_tile(widths, has_factors)
    block = min(columns, triton.next_power_of_2(max(widths)))
    return (
        e4m3_kernel._quantize_rows_kernel,
        dict(ROWS, PIECES=len(widths), HAS_FACTORS=has_factors, BLOCK=block),
        warps,
    )


def dequantised(nested):
    types = {} if nested else {"TYPES": {"absmax_ptr": "*fp32"}}
    warps = dequantize_kernel._WARPS
    return dequantize_kernel._dequantize_kernel, dict(PACKED, NESTED=nested, **types), warps


ROWS = dict(CARRY=0x1FFFFF, LEAST_POWER=27)
ROWS |= dict(INFINITE=0x7F800000, NOT_A_NUMBER=0x7FC00000)
PACKED = dict(BLOCK=64, GROUP=256, ROUND=tl.bfloat16, BYTES=dequantize_kernel._BYTES)
PACKED |= dict(SHUFFLE=levels_ptx.SHUFFLE, TABLE=levels_ptx.TABLE)
# Tuples of PIECES elements.
TUPLES = {"ys": "*bf16", "strides": "i32", "widths": "i32", "factors": "*bf16"}
OTHER = {
    "_quantize_rows_kernel": {"out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"},
    "_dequantize_kernel": {"packed_ptr": "*u8", "absmax_ptr": "*u8", "levels_ptr": "*fp32"}
    | dict.fromkeys(("scale_ptr", "code_ptr", "offset_ptr"), "*fp32"),
    "_transpose_kernel": {"x_ptr": "*u8", "out_ptr": "*u8", "ones_ptr": "*fp32"},
}

FLASH = {
    "forward": flash._forward_kernel,
    "queries": flash._query_gradient_kernel,
    "keys": flash._key_value_gradient_kernel,
}


def attention(which, head_dim, t, kilobytes, part=False, described=False):
    # Even lengths without spans, as in most training steps; odd lengths with spans. In context
    # parallel even lengths with spans.
    _, _, how = flash.tile(which, head_dim, t, 1024 * kilobytes)
    how |= dict(GROUP=4, D=head_dim, SPANS=part or t % 2 > 0, ROPE=not part and t % 2 == 0)
    how |= dict(PART=part, CAPPED=head_dim == 256, PRECISION="tf32")
    options = {name: how.pop(name) for name in ("num_warps", "maxnreg") if name in how}
    how |= dict(DESCRIBED=described)
    static = {k: v for k, v in how.items() if k in FLASH[which].arg_names}
    if described:
        names, rows = ("k_ptr v_ptr", "BN") if which == "queries" else ("q_ptr dout_ptr", "BM")
        kind = f"tensordesc<bf16[{static[rows]}, {head_dim}]>"
        static |= dict(TYPES=dict.fromkeys(names.split(), kind))
    return FLASH[which], static, options, kilobytes


KERNELS = [
    (dora_kernel._row_norms_kernel, dict(R=16, BM=16, BK=256, PRECISION="tf32"), 4),
    *(logprobs(vocabulary, capped) for vocabulary in (32000, 128256) for capped in (True, False)),
    *(
        (swiglu_kernel._swiglu_kernel, dict(tile, HAS_GAINS=gains, GELU=gains), of_warps)
        for tile in [dict(R=16, BM=rows, BN=columns, PRECISION="tf32")]
        for gains in (True, False)
    ),
    *(
        (swiglu_kernel._swiglu_backward_kernel, dict(SWIGLU, **which), warps)
        for which in [
            dict(HAS_A=True, HAS_GAINS=False, GELU=False, STAGES=stages),
            dict(HAS_A=True, HAS_GAINS=False, GELU=True, STAGES=stages),
            dict(HAS_A=False, HAS_GAINS=False, GELU=False, STAGES=stages),
            dict(HAS_A=True, HAS_GAINS=True, GELU=False, STAGES=None),
        ]
    ),
    (
        masked_lora_kernel._masked_x_a_kernel,
        dict(THREE, BM=of_forward[0], HALF=64),
        of_forward[1],
    ),
    *(
        masked_backward(which, static, *needs)
        for which, static in (("several", THREE), ("one", ONE))
        for needs in ((True, True), (True, False), (False, True))
    ),
    (low_rank_gradients_kernel._parts_kernel, PARTS, low_warps),
    (low_rank_gradients_kernel._sums_kernel, dict(LAYERS, CHUNKS=11, ROWS=32), 2),
    # Of one row: Triton makes a constant of an argument that is 1.
    (low_rank_gradients_kernel._sums_kernel, dict(LAYERS, CHUNKS=1, ROWS=32, n=1), 2),
    (
        swiglu_kernel._swiglu_sums_kernel,
        dict(HAS_A=True, CHUNKS=swiglu_kernel._CHUNKS, R=16, ROWS=64),
        2,
    ),
    *(
        attention(which, head_dim, t, shared)
        for which in FLASH
        for head_dim, shared in ((64, 99), (128, 99), (128, 160))
        for t in (2048, 2047)
    ),
    *(
        attention(which, 256, t, shared)
        for which in FLASH
        for t, shared in ((2047, 99), (2048, 227))
    ),
    *(
        attention(which, head_dim, 2048, shared, part=True)
        for which in FLASH
        for head_dim, shared in ((64, 160), (128, 160), (256, 227))
    ),
    *(attention(which, 128, 2048, 227, described=True) for which in ("queries", "keys")),
    (e4m3_kernel._transpose_kernel, dict(BM=128, BN=128), 8),
    quantised((4096,), False),
    quantised((14336,), False),
    quantised((4096,), True),
    quantised((14336, 14336), True),
    quantised((4096, 1024, 1024), True),
    *(dequantised(nested) for nested in (True, False)),
]
WIDE = {name: "*fp32" for name in (
    "sums_ptr logp_ptr gains_ptr dgains_ptr gram_ptr norm_ptr lse_ptr delta_ptr".split()
    + "dx_a_parts_ptr db_parts_ptr".split()
)}
WIDE |= {"label_ptr": "*i64", "keys_ptr": "*i64", "first_ptr": "*i32", "last_ptr": "*i32"}
WIDE |= {"until_ptr": "*i32", "since_ptr": "*i32"}


def kind(name, constants):
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        return WIDE.get(name, "*bf16")
    return "fp32" if name.startswith(("scal", "s_")) or name == "cap" else "i32"


for kernel, constants, how, *kilobytes in KERNELS:
    names, pieces, types = kernel.arg_names, constants.pop("PIECES", 0), constants.pop("TYPES", {})
    signature = {name: kind(name, constants) for name in names} | OTHER.get(kernel.__name__, {})
    signature |= types
    for name in TUPLES.keys() & {*names}:
        absent = name == "factors" and not constants["HAS_FACTORS"]
        signature[name] = () if absent else (TUPLES[name],) * pieces
    values = {(names.index(name),): value for name, value in constants.items()}
    # Tensors begin at multiples of 16 bytes, if they are not views.
    tensors = [i for i, n in enumerate(names) if str(signature[n]).startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in tensors}
    source = ASTSource(kernel, signature, constexprs=values, attrs=aligned)
    target = GPUTarget("cuda", 90, 32)
    options = how if isinstance(how, dict) else {"num_warps": how}
    compiled = triton.compile(source, target=target, options=options)
    # Bytes of shared memory per block on an RTX 30 or 40, or on the given card.
    least = 1024 * (*kilobytes, 99)[0]
    print(kernel.__name__, len(compiled.asm["cubin"]), compiled.metadata.shared / least)
"""

DECODE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastlora.ops.decode import (
    attention_kernel,
    linear_launch,
    next_token_kernel,
    norm_kernel,
    packed_ptx,
)
from fastlora.ops.decode.product import Part, prepare_product
from fastlora.ops.decode.token_rows import TokenRows
from fastlora.ops.quant import levels_ptx
from fastlora.ops.quant.weights import NestedAbsmax, Weight4bit, empty_form

SHARED = 99 * 1024  # bytes per block on an RTX 30 or 40
COLUMNS, RANK = 1024, 16
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32",
         torch.uint8: "*u8", torch.float64: "*fp64", torch.bool: "*i1"}
calls = []


class Recorded:
    # Notes the arguments with which the launcher calls a kernel.
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *given, **fixed: calls.append((self.kernel, given, fixed))


for module, names in (
    (linear_launch, ("vector_kernel", "matrix_kernel")),
    (linear_launch, ("packed_vector_kernel", "packed_matrix_kernel", "packed_mma_kernel")),
    (linear_launch, ("split_kernel",)),
    (attention_kernel, ("_part_kernel", "_join_kernel")),
    (next_token_kernel, ("inputs_kernel", "likeliest_kernel", "take_kernel")),
    (norm_kernel, ("norm_kernel",)),
):
    for name in names:
        setattr(module, name, Recorded(getattr(module, name)))


def weight(rows, packed):
    if not packed:
        return torch.zeros(rows, COLUMNS, dtype=torch.bfloat16)
    form, blocks = empty_form((rows, COLUMNS), torch.bfloat16, "cpu"), rows * COLUMNS // 64
    new = lambda n, dtype: torch.zeros(n, dtype=dtype)
    absmax = NestedAbsmax(new(blocks, torch.uint8), torch.zeros(blocks // 256), torch.zeros(256),
                          torch.tensor(0.0))
    return Weight4bit(new(rows * COLUMNS // 2, torch.uint8), torch.zeros(16), form, absmax)


def product(rows, b, packed, gated, tile=None):
    new = lambda *shape: torch.zeros(*shape, dtype=torch.bfloat16)
    parts = [
        Part(weight(n, packed), new(RANK, COLUMNS), new(n, RANK), gain=new(n), bias=new(n))
        for n in rows
    ]
    norm = torch.zeros(COLUMNS) if gated and b > 1 and not packed else new(COLUMNS)
    made = prepare_product(parts, b, norm=norm, eps=1e-5, gated=gated, gelu=gated and b > 1)
    x, residual, clear = new(b, COLUMNS), new(b, rows[0]), torch.zeros(64, dtype=torch.int32)
    residual = residual if gated or len(rows) == 1 else None
    linear_launch.launch_product(x, made, residual, clear, tile, pdl=True)
    fixed = calls[-1][2]
    if b > 1:
        tile = tile or linear_launch.choose_tile(made, x)
        fixed["STAGES"] = linear_launch.stages_within(SHARED, x, made, tile)
    # On the CPU the launcher leaves out the instructions of a GPU.
    for name, code in (("DOT8", packed_ptx.DOT8), ("SHUFFLE", levels_ptx.SHUFFLE)):
        if name in fixed:
            fixed[name] = code


def attention(head_dim, pairs):
    new = lambda *shape: torch.zeros(*shape, dtype=torch.bfloat16)
    b, kv, s = pairs // 8, 8, 1024
    card = attention_kernel.Card(132, SHARED, pdl=True)
    how = attention_kernel.tile(pairs, s, head_dim, 2, card)
    cache, new_key, angle = new(b, kv, s, head_dim), new(b, kv, head_dim), new(b, head_dim)
    attention_kernel.decode_forward(
        new(b, 4 * kv, head_dim), new_key, new_key, angle, angle, cache, cache,
        torch.zeros(b, dtype=torch.int64), None, how, cap=50.0 if head_dim > 128 else None,
    )


def ends(b, v, dtype, pdl, given):
    whole = lambda *shape: torch.zeros(*shape, dtype=torch.int64)
    table, report = torch.zeros(8, 64, dtype=dtype), torch.zeros(16, 3, b, dtype=torch.float64)
    next_token_kernel.launch_inputs(whole(b), whole(b), torch.zeros(8, 2048), table, table, pdl)
    rows = TokenRows(whole(b), whole(b), whole(b), whole(b), torch.zeros(b, dtype=torch.bool),
                     whole(b, 4), report, whole(b))
    logits = torch.zeros(b, v, dtype=dtype)
    next_token_kernel.launch_tokens(logits, rows, whole(b) if given else None, given, pdl)


def kind(value):
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


for packed in (False, True):
    for b in (1, 32):
        product((1024, 512, 512), b, packed, False)
        product((1024, 1024), b, packed, True)
product((1024,), 32, False, False, linear_launch.Tile(64, 64, 4, 6))  # as of a head
for gated in (False, True):  # the launcher takes this kernel on a GPU only
    product((1024, 1024), 1, True, gated, linear_launch.Tile(16, 1024, 4, 2, mma=True))
attention(64, 8)  # several parts of the keys for each row, which a second kernel joins
attention(128, 256)  # one part
attention(256, 256)
rows = torch.zeros(4, 2304, dtype=torch.bfloat16)
norm_kernel.launch_norm(rows, torch.zeros(2304), 1e-6, rows, narrow=False, pdl=True)
for pdl in (True, False):
    ends(1, 128256, torch.bfloat16, pdl, given=False)
    ends(32, 128256, torch.float32, pdl, given=True)
for kernel, given, fixed in calls:
    names = kernel.arg_names
    options = {name: value for name, value in fixed.items() if name not in names}
    options.pop("launch_pdl", None)  # how the kernel is launched, not how it is compiled
    constants = {name: value for name, value in fixed.items() if name in names}
    signature = {name: kind(value) for name, value in zip(names, given)}
    signature |= dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: signature[name] for name in names}, constexprs=values)
    target = GPUTarget("cuda", 90 if fixed["PDL"] else 80, 32)
    compiled = triton.compile(source, target=target, options=options)
    print(kernel.__name__, len(compiled.asm["cubin"]), compiled.metadata.shared / SHARED)
"""


# scripts/test.sh installs it here.
OLDEST = Path(sys.prefix) / "triton" / "site-packages"


def compiled(program: str, oldest: bool) -> list[tuple[str, int, float]]:
    """Name, bytes, and share of a small card's shared memory of each kernel."""
    paths = [str(Path(__file__).parents[2])]
    if oldest:
        assert OLDEST.exists(), "scripts/test.sh installs scripts/requirements-triton.txt"
        paths.insert(0, str(OLDEST))
    environ = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(paths)}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    version, *lines = ran.stdout.splitlines()
    assert version.startswith("3.6.") or not oldest, version
    found = [line.split() for line in lines]
    return [(name, int(size), float(shared)) for name, size, shared in found]


@pytest.mark.parametrize("oldest", [False, True], ids=["installed", "oldest"])
@pytest.mark.parametrize(
    ("program", "count"), [(COMPILE, 65), (DECODE, 28)], ids=["training", "decoding"]
)
def test_every_kernel_compiles_for_an_h100_and_fits_its_shared_memory(program, count, oldest):
    kernels = compiled("import triton; print(triton.__version__)" + program, oldest)
    assert len(kernels) == count and min(size for _, size, _ in kernels) > 1000
    assert max(shared for *_, shared in kernels) <= 1, kernels
