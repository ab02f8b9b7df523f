"""Compiles the kernels of a decode step as their launchers call them.

The launchers run over tensors on the CPU. `Recorded` takes the place of each kernel and notes the
arguments. A call with PDL is compiled for an H100, another one for an A100.
"""

from typing import Any

import torch
from compiling import SMALL_CARD, compile_for, print_version
from torch import Tensor

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
from fastlora.ops.quant.weights import NestedAbsmax, Weight, Weight4bit, empty_form

COLUMNS, RANK = 1024, 16
KERNELS = (
    (linear_launch, ("vector_kernel", "matrix_kernel", "split_kernel")),
    (linear_launch, ("packed_vector_kernel", "packed_matrix_kernel", "packed_mma_kernel")),
    (attention_kernel, ("_part_kernel", "_join_kernel")),
    (next_token_kernel, ("inputs_kernel", "likeliest_kernel", "take_kernel")),
    (norm_kernel, ("norm_kernel",)),
)
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []


class Recorded:
    """A kernel that notes the arguments of each launch and does not run."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *given, **fixed: calls.append((self.kernel, given, fixed))


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


# ── products ──────────────────────────────────────────────────────────────────────────────
def weight(rows: int, packed: bool) -> Weight:
    if not packed:
        return zeros(rows, COLUMNS)
    form, blocks = empty_form((rows, COLUMNS), torch.bfloat16, "cpu"), rows * COLUMNS // 64
    scales = zeros(blocks, dtype=torch.uint8), torch.zeros(blocks // 256), torch.zeros(256)
    absmax = NestedAbsmax(*scales, torch.tensor(0.0))
    return Weight4bit(zeros(rows * COLUMNS // 2, dtype=torch.uint8), torch.zeros(16), form, absmax)


def product(
    rows: tuple[int, ...],
    b: int,
    *,
    packed: bool,
    gated: bool,
    tile: linear_launch.Tile | None = None,
) -> None:
    """Launch the product of b rows with matrices of `rows` rows each."""
    parts = [
        Part(weight(n, packed), zeros(RANK, COLUMNS), zeros(n, RANK), gain=zeros(n), bias=zeros(n))
        for n in rows
    ]
    norm = torch.zeros(COLUMNS) if gated and b > 1 and not packed else zeros(COLUMNS)
    made = prepare_product(parts, b, norm=norm, eps=1e-5, gated=gated, gelu=gated and b > 1)
    x, residual, clear = zeros(b, COLUMNS), zeros(b, rows[0]), zeros(64, dtype=torch.int32)
    residual = residual if gated or len(rows) == 1 else None
    linear_launch.launch_product(x, made, residual, clear, tile, pdl=True)
    fixed = calls[-1][2]
    if b > 1:
        tile = tile or linear_launch.choose_tile(made, x)
        fixed["STAGES"] = linear_launch.stages_within(SMALL_CARD, x, made, tile)
    # On the CPU the launcher leaves out the instructions of a GPU.
    for name, code in (("DOT8", packed_ptx.DOT8), ("SHUFFLE", levels_ptx.SHUFFLE)):
        if name in fixed:
            fixed[name] = code


def products() -> None:
    for packed in (False, True):
        for b in (1, 32):
            product((1024, 512, 512), b, packed=packed, gated=False)
            product((1024, 1024), b, packed=packed, gated=True)
    of_head = linear_launch.Tile(64, 64, 4, 6)
    product((1024,), 32, packed=False, gated=False, tile=of_head)
    for gated in (False, True):  # the launcher takes this kernel on a GPU only
        tile = linear_launch.Tile(16, 1024, 4, 2, mma=True)
        product((1024, 1024), 1, packed=True, gated=gated, tile=tile)


# ── attention, norm, the next token ───────────────────────────────────────────────────────
def attention(head_dim: int, pairs: int) -> None:
    b, kv, s = pairs // 8, 8, 1024
    card = attention_kernel.Card(132, SMALL_CARD, pdl=True)
    how = attention_kernel.tile(pairs, s, head_dim, 2, card)
    cache, new_key, angle = zeros(b, kv, s, head_dim), zeros(b, kv, head_dim), zeros(b, head_dim)
    query, lengths = zeros(b, 4 * kv, head_dim), zeros(b, dtype=torch.int64)
    given = query, new_key, new_key, angle, angle, cache, cache, lengths
    cap = 50.0 if head_dim > 128 else None
    attention_kernel.decode_forward(*given, None, how, cap=cap)


def next_tokens(b: int, vocabulary: int, dtype: torch.dtype, *, pdl: bool, given: bool) -> None:
    """Launch the kernels that embed a step's tokens and that find the next ones."""
    whole = lambda *shape: zeros(*shape, dtype=torch.int64)
    table, report = zeros(8, 64, dtype=dtype), zeros(16, 3, b, dtype=torch.float64)
    next_token_kernel.launch_inputs(whole(b), whole(b), torch.zeros(8, 2048), table, table, pdl)
    stopped = zeros(b, dtype=torch.bool)
    state = whole(b), whole(b), whole(b), whole(b), stopped, whole(b, 4), report, whole(b)
    logits, chosen = zeros(b, vocabulary, dtype=dtype), whole(b) if given else None
    next_token_kernel.launch_tokens(logits, TokenRows(*state), chosen, given, pdl)


def launch_all() -> None:
    products()
    attention(64, 8)  # several parts of the keys for each row, which a second kernel joins
    attention(128, 256)  # one part
    attention(256, 256)
    rows = zeros(4, 2304)
    norm_kernel.launch_norm(rows, torch.zeros(2304), 1e-6, rows, narrow=False, pdl=True)
    for pdl in (True, False):
        next_tokens(1, 128256, torch.bfloat16, pdl=pdl, given=False)
        next_tokens(32, 128256, torch.float32, pdl=pdl, given=True)


# ── compilation ───────────────────────────────────────────────────────────────────────────
def type_of(value: Any) -> str:
    """The type of a kernel's argument."""
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


if __name__ == "__main__":
    print_version()
    for module, names in KERNELS:
        for name in names:
            setattr(module, name, Recorded(getattr(module, name)))
    launch_all()
    for kernel, given, fixed in calls:
        names = kernel.arg_names
        options = {name: value for name, value in fixed.items() if name not in names}
        options.pop("launch_pdl", None)  # how the kernel is launched, not how it is compiled
        constants = {name: value for name, value in fixed.items() if name in names}
        signature = {name: type_of(value) for name, value in zip(names, given, strict=False)}
        signature |= dict.fromkeys(constants, "constexpr")
        capability = 90 if fixed["PDL"] else 80
        compile_for(kernel, signature, constants, options, capability=capability)
