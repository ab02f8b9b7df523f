"""compile_for(): compile one kernel for a CUDA GPU that need not be there, and print a line of it.

The line has the kernel's name, the bytes of its machine code, and the share of a block's shared
memory that it takes. The first line of a program is Triton's version (`print_version`).
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SMALL_CARD = 99 * 1024  # bytes of shared memory per block on an RTX 30 or 40


def print_version() -> None:
    print(triton.__version__)


def compile_for(
    kernel: Any,
    signature: dict[str, Any],
    constants: dict[str, Any],
    options: dict[str, Any],
    *,
    capability: int = 90,
    shared: int = SMALL_CARD,
    aligned: bool = False,
) -> None:
    """Compile a kernel and print its line.

    Args:
        kernel: of triton.jit.
        signature: the type of each argument, "constexpr" for a constant.
        constants: the value of each constant, by name.
        options: such as num_warps. As in ops/launch.py, products and sums are fused by default.
        capability: of the GPU: 90 is an H100, 80 an A100.
        shared: bytes of shared memory per block.
        aligned: whether tensors begin at multiples of 16 bytes, as those do that are not views.
    """
    names = kernel.arg_names
    values = {(names.index(name),): value for name, value in constants.items()}
    tensors = [i for i, name in enumerate(names) if str(signature[name]).startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in tensors} if aligned else None
    ordered = {name: signature[name] for name in names}
    source = ASTSource(kernel, ordered, constexprs=values, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    options = {"enable_fp_fusion": True} | options
    compiled = triton.compile(source, target=target, options=options)
    print(kernel.__name__, len(compiled.asm["cubin"]), compiled.metadata.shared / shared)
