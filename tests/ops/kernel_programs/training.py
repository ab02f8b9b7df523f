"""Compiles the kernels of a training step for an H100, with their tiles, in bf16."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from compiling import SMALL_CARD, compile_for, print_version

from fastlora.ops.attention import flash_kernel
from fastlora.ops.linear import dora_kernel, low_rank_gradients_kernel, masked_lora_kernel
from fastlora.ops.loss import softmax_kernel
from fastlora.ops.quant import dequantize_kernel, e4m3_kernel, levels_ptx
from fastlora.ops.swiglu import swiglu_kernel


class Case(NamedTuple):
    """A kernel, and how it is launched."""

    kernel: Any
    constants: dict[str, Any]
    options: dict[str, Any]
    types: dict[str, Any] = {}  # noqa: RUF012  of arguments, where `type_of` does not tell
    shared: int = SMALL_CARD


def warps(number: int) -> dict[str, Any]:
    return {"num_warps": number}


# ── loss, DoRA ────────────────────────────────────────────────────────────────────────────
def losses() -> Iterator[Case]:
    for vocabulary in (32000, 128256):
        block, number = softmax_kernel.block_and_warps(vocabulary)
        for capped in (True, False):
            constants = dict(IGNORE=-100, BLOCK=block, CAPPED=capped)
            yield Case(softmax_kernel._logprob_kernel, constants, warps(number))


def dora() -> Iterator[Case]:
    constants = dict(R=16, BM=16, BK=256, PRECISION="tf32")
    yield Case(dora_kernel._row_norms_kernel, constants, warps(4))


# ── SwiGLU ────────────────────────────────────────────────────────────────────────────────
def swiglu() -> Iterator[Case]:
    bm, bn, number = swiglu_kernel._FORWARD
    tile = dict(R=16, BM=bm, BN=bn, PRECISION="tf32")
    for gains in (True, False):
        constants = dict(tile, HAS_GAINS=gains, GELU=gains)
        yield Case(swiglu_kernel._swiglu_kernel, constants, warps(number))
    bm, bn, number, stages = swiglu_kernel._BACKWARD
    tile |= dict(BM=bm, BN=bn)
    for which in (
        dict(HAS_A=True, HAS_GAINS=False, GELU=False, STAGES=stages),
        dict(HAS_A=True, HAS_GAINS=False, GELU=True, STAGES=stages),
        dict(HAS_A=False, HAS_GAINS=False, GELU=False, STAGES=stages),
        dict(HAS_A=True, HAS_GAINS=True, GELU=False, STAGES=None),
    ):
        yield Case(swiglu_kernel._swiglu_backward_kernel, dict(tile, **which), warps(number))
    constants = dict(HAS_A=True, CHUNKS=swiglu_kernel._CHUNKS, R=16, ROWS=64)
    yield Case(swiglu_kernel._swiglu_sums_kernel, constants, warps(2))


# ── low-rank terms ────────────────────────────────────────────────────────────────────────
THREE = dict(RANKS=(16, 16, 8), SLOTS=(0, 2, -1), R=16, PRECISION="tf32")
ONE = dict(RANKS=(16,), SLOTS=(1,), R=16, PRECISION="tf32")


def masked() -> Iterator[Case]:
    bm, number = masked_lora_kernel._FORWARD
    constants = dict(THREE, BM=bm, HALF=64)
    yield Case(masked_lora_kernel._masked_x_a_kernel, constants, warps(number))
    for which, static in (("several", THREE), ("one", ONE)):
        bm, bn, pair, number = masked_lora_kernel._BACKWARD[which]
        for of_x, of_a in ((True, True), (True, False), (False, True)):
            sizes = dict(BM=bm, BN=bn, PAIR=pair, HALF=64, NEEDS_X=of_x, NEEDS_A=of_a)
            kernel = masked_lora_kernel._masked_x_a_backward_kernel
            yield Case(kernel, dict(static, **sizes), warps(number))


def low_rank_gradients() -> Iterator[Case]:
    bm, bn, number, stages = low_rank_gradients_kernel._TILE
    layers = dict(WIDTHS=(2048, 512, 512), RANKS=(16, 16, 8), R=16, BN=bn)
    parts = dict(layers, STARTS=(0, 2048, 2560), BM=bm, STAGES=stages, PRECISION="tf32")
    yield Case(low_rank_gradients_kernel._parts_kernel, parts, warps(number))
    # The second is that of one row: Triton makes a constant of an argument that is 1.
    for more in (dict(CHUNKS=11), dict(CHUNKS=1, n=1)):
        constants = dict(layers, ROWS=32, **more)
        yield Case(low_rank_gradients_kernel._sums_kernel, constants, warps(2))


# ── attention ─────────────────────────────────────────────────────────────────────────────
FLASH = {
    "forward": flash_kernel._forward_kernel,
    "queries": flash_kernel._query_gradient_kernel,
    "keys": flash_kernel._key_value_gradient_kernel,
}


def attention() -> Iterator[Case]:
    for which in FLASH:
        for head_dim, kilobytes in ((64, 99), (128, 99), (128, 160)):
            for t in (2048, 2047):
                yield flash(which, head_dim, t, kilobytes)
        for t, kilobytes in ((2047, 99), (2048, 227)):
            yield flash(which, 256, t, kilobytes)
        for head_dim, kilobytes in ((64, 160), (128, 160), (256, 227)):
            yield flash(which, head_dim, 2048, kilobytes, part=True)
    for which in ("queries", "keys"):
        yield flash(which, 128, 2048, 227, described=True)


def flash(
    which: str,
    head_dim: int,
    t: int,
    kilobytes: int,
    *,
    part: bool = False,
    described: bool = False,
) -> Case:
    """Even lengths are without spans, as in most training steps, and odd ones with spans. In
    context parallel (`part`) even lengths have spans."""
    shared = 1024 * kilobytes
    _, _, how = flash_kernel.tile(which, head_dim, t, shared)
    how |= dict(GROUP=4, D=head_dim, SPANS=part or t % 2 > 0, ROPE=not part and t % 2 == 0)
    how |= dict(PART=part, CAPPED=head_dim == 256, PRECISION="tf32", DESCRIBED=described)
    options = {name: how.pop(name) for name in ("num_warps", "maxnreg") if name in how}
    constants = {k: v for k, v in how.items() if k in FLASH[which].arg_names}
    types = {}
    if described:
        names, rows = (
            (("k_ptr", "v_ptr"), "BN") if which == "queries" else (("q_ptr", "dout_ptr"), "BM")
        )
        types = dict.fromkeys(names, f"tensordesc<bf16[{constants[rows]}, {head_dim}]>")
    return Case(FLASH[which], constants, options, types, shared)


# ── quantised bases ───────────────────────────────────────────────────────────────────────
def e4m3() -> Iterator[Case]:
    types: dict[str, Any] = {"x_ptr": "*u8", "out_ptr": "*u8", "ones_ptr": "*fp32"}
    yield Case(e4m3_kernel._transpose_kernel, dict(BM=128, BN=128), warps(8), types)
    rounding = dict(CARRY=0x1FFFFF, LEAST_POWER=27, INFINITE=0x7F800000, NOT_A_NUMBER=0x7FC00000)
    for widths, has_factors in (
        ((4096,), False),
        ((14336,), False),
        ((4096,), True),
        ((14336, 14336), True),
        ((4096, 1024, 1024), True),
    ):
        columns, number = e4m3_kernel._rows_tile(widths, has_factors)
        block = min(columns, triton.next_power_of_2(max(widths)))
        of_each = lambda kind, widths=widths: (kind,) * len(widths)
        types = {"out_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "ys": of_each("*bf16")}
        types |= {"strides": of_each("i32"), "widths": of_each("i32")}
        types |= {"factors": of_each("*bf16") if has_factors else ()}
        constants = dict(rounding, HAS_FACTORS=has_factors, BLOCK=block)
        yield Case(e4m3_kernel._quantize_rows_kernel, constants, warps(number), types)


def four_bits() -> Iterator[Case]:
    constants = dict(BLOCK=64, GROUP=256, ROUND=tl.bfloat16, BYTES=dequantize_kernel._BYTES)
    constants |= dict(SHUFFLE=levels_ptx.SHUFFLE, TABLE=levels_ptx.TABLE)
    types = {"packed_ptr": "*u8", "levels_ptr": "*fp32"}
    types |= dict.fromkeys(("scale_ptr", "code_ptr", "offset_ptr"), "*fp32")
    for nested in (True, False):
        of_absmax = {"absmax_ptr": "*u8" if nested else "*fp32"}
        options = warps(dequantize_kernel._WARPS) | dict(enable_fp_fusion=False)
        kernel = dequantize_kernel._dequantize_kernel
        yield Case(kernel, dict(constants, NESTED=nested), options, types | of_absmax)


# ── all of them ───────────────────────────────────────────────────────────────────────────
WIDE = (
    *("sums_ptr", "logp_ptr", "gains_ptr", "dgains_ptr", "gram_ptr", "norm_ptr", "lse_ptr"),
    *("delta_ptr", "dx_a_parts_ptr", "db_parts_ptr"),
)
TYPES = dict.fromkeys(WIDE, "*fp32")
TYPES |= dict.fromkeys(("label_ptr", "keys_ptr"), "*i64")
TYPES |= dict.fromkeys(("first_ptr", "last_ptr", "until_ptr", "since_ptr"), "*i32")


def type_of(name: str, case: Case) -> Any:
    """The type of a kernel's argument."""
    if name in case.types:
        return case.types[name]
    if name in case.constants:
        return "constexpr"
    if name.endswith("_ptr"):
        return TYPES.get(name, "*bf16")
    return "fp32" if name.startswith(("scal", "s_")) or name == "cap" else "i32"


if __name__ == "__main__":
    print_version()
    groups = losses, dora, swiglu, masked, low_rank_gradients, attention, e4m3, four_bits
    for case in (case for group in groups for case in group()):
        signature = {name: type_of(name, case) for name in case.kernel.arg_names}
        given = case.kernel, signature, case.constants, case.options
        compile_for(*given, shared=case.shared, aligned=True)
