"""Inline PTX of `packed_vector_kernel`: a word of indices times x, and eight values at once."""

# A word of eight indices, $1, to the sum of their levels times x, $3 to $10. The first of a byte's
# two values is in its high half.
DOT8 = (
    "{\n.reg .u32 i;\n.reg .b32 l;\n.reg .f32 s;\nmov.f32 s, 0f00000000;\n"
    + "".join(
        f"shr.u32 i, $1, {shift};\nshfl.sync.idx.b32 l, $2, i, 0x101f, 0xffffffff;\n"
        f"fma.rn.f32 s, l, ${x}, s;\n"
        for x, shift in enumerate((4, 0, 12, 8, 20, 16, 28, 24), 3)
    )
    + "mov.f32 $0, s;\n}"
)

# Eight values at address $8 to float32, by the bits of their type. As an operation on addresses it
# runs where its results are needed. tl.load chooses a layout by addresses alone, and each of the
# eight results then takes a copy through shared memory and two barriers.
_UNPACK = {
    "bfloat16": "shl.b32 t, r{i}, 16;\nmov.b32 ${a}, t;\n"
    "and.b32 t, r{i}, 0xffff0000;\nmov.b32 ${b}, t;\n",
    "float16": "mov.b32 {{h, l}}, r{i};\ncvt.f32.f16 ${a}, h;\ncvt.f32.f16 ${b}, l;\n",
}
LOAD8 = {
    name: "{\n.reg .b32 r<4>, t;\n.reg .b16 h, l;\nld.global.v4.b32 {r0, r1, r2, r3}, [$8];\n"
    + "".join(text.format(i=i, a=2 * i, b=2 * i + 1) for i in range(4))
    + "}"
    for name, text in _UNPACK.items()
} | {
    "float32": "{\nld.global.v4.f32 {$0, $1, $2, $3}, [$8];\n"
    "ld.global.v4.f32 {$4, $5, $6, $7}, [$8 + 16];\n}"
}
