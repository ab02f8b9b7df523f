"""Inline PTX of packed_mma_kernel.py: the table of byte pairs, loads, products of four blocks."""

GROUP = 4  # blocks of one step of a warp

# Fills the table and 256 float32 of `code` after it, and returns the table's address. $1: levels,
# $2: code, $3: number of the thread. Each thread of the first 256 writes one entry (two if the
# program has 128 threads): eight times four copies, beginning at different copies in
# neighbouring lanes, which would meet in one bank otherwise.
_FILL = """{{
.shared .align 128 .b8 table[33792];
.reg .u32 base, entry, at, high, low, copy;
.reg .u64 from;
.reg .f32 a, b;
.reg .b32 pair;
.reg .pred more;
mov.u32 base, table;
mov.u32 entry, $3;
NEXT:
shr.u32 high, entry, 4;
and.b32 low, entry, 15;
mad.wide.u32 from, high, 4, $1;
ld.global.nc.f32 a, [from];
mad.wide.u32 from, low, 4, $1;
ld.global.nc.f32 b, [from];
cvt.rn.{two}.f32 pair, b, a;
mad.lo.u32 at, entry, 128, base;
{copies}
mad.wide.u32 from, entry, 4, $2;
ld.global.nc.f32 a, [from];
mad.lo.u32 at, entry, 4, base;
st.shared.f32 [at + 32768], a;
add.u32 entry, entry, {threads};
setp.lt.u32 more, entry, 256;
@more bra NEXT;
bar.sync 0;
mov.u32 $0, base;
}}"""


def fill(kind: str, warps: int) -> str:
    """PTX that fills the table: `kind` is "bf16" or "f16"."""
    assert warps in (4, 8), "the table has 256 entries, at least one for each thread"
    copies = "".join(
        f"add.u32 copy, entry, {i};\nand.b32 copy, copy, 7;\nmad.lo.u32 copy, copy, 16, at;\n"
        "st.shared.v4.b32 [copy], {pair, pair, pair, pair};\n"
        for i in range(8)
    )
    return _FILL.format(two=f"{kind}x2", copies=copies, threads=32 * warps)


# The words of four blocks in rows g ($0 to $7) and g + 8 ($8 to $15), at addresses $16 and $17.
READ = (
    "{\n"
    + "".join(
        f"ld.global.nc.L1::no_allocate.v2.b32 {{${8 * row + 2 * i}, ${8 * row + 2 * i + 1}}}, "
        f"[${16 + row} + {32 * i}];\n"
        for row in range(2)
        for i in range(GROUP)
    )
    + "}"
)

# Four numbers of nested absmax values in rows g and g + 8.
READ_NUMBERS = "{\nld.global.nc.b32 $0, [$2];\nld.global.nc.b32 $1, [$3];\n}"

READ_FLOATS = "{\nld.global.nc.f32 $0, [$2];\nld.global.nc.f32 $1, [$3];\n}"


def step(kind: str, *, norm: bool, nested: bool) -> str:
    """PTX that adds four blocks' products to the sums of rows g and g + 8, $0 and $1.

    $2, $3: the sums before. $4 to $19: words. $20: address of this thread's first value of x.
    $21: address of the norm's weight. $22: the table. $23, $24: numbers of the absmax values, or
    their addresses if not nested. $25, $26: nested scales. $27: nested offset.
    """
    text = [
        "{\n.reg .pred first;\n.reg .u32 lane, own, i, code;\n.reg .f32 s<4>, m<2>;\n",
        ".reg .b32 x<8>, n<8>, l<4>;\n.reg .f32 c<8>;\n",
        "mov.u32 lane, %laneid;\nsetp.lt.u32 first, lane, 4;\n",  # column 0 of x
        "shl.b32 own, lane, 2;\nadd.u32 code, $22, 32768;\n",
        "mov.f32 s0, $2;\nmov.f32 s1, $3;\n",
    ]
    if not nested:
        for row in range(2):
            absmax = ", ".join(f"c{4 * row + i}" for i in range(GROUP))
            text.append(f"ld.global.nc.v4.f32 {{{absmax}}}, [${23 + row}];\n")
    for block in range(GROUP):
        text += _read_x(kind, block, norm)
        text.append("".join(f"mov.f32 d{i}, 0f00000000;\n" for i in range(4)))
        for quarter in range(4):
            text += _multiply(kind, block, quarter)
        for row in range(2):
            text += _absmax(block, row, nested)
            text.append(f"fma.rn.f32 s{row}, d{2 * row}, m{row}, s{row};\n")
    text.append("mov.f32 $0, s0;\nmov.f32 $1, s1;\n}")
    return "".join(text).replace(".f32 s<4>", ".f32 s<2>, d<4>")


def _read_x(kind: str, block: int, norm: bool) -> list[str]:
    """x0 to x7: 16 values of x in the lanes of column 0, zeros in the others."""
    text = ["".join(f"mov.b32 x{i}, 0;\n" for i in range(8))]
    for i in (0, 4):
        places = ", ".join(f"x{i + j}" for j in range(4))
        text.append(f"@first ld.global.v4.b32 {{{places}}}, [$20 + {128 * block + 4 * i}];\n")
    if not norm:
        return text
    text.append("".join(f"mov.b32 n{i}, 0;\n" for i in range(8)))
    for i in (0, 4):
        places = ", ".join(f"n{i + j}" for j in range(4))
        text.append(f"@first ld.global.nc.v4.b32 {{{places}}}, [$21 + {128 * block + 4 * i}];\n")
    text += [f"fma.rn.{kind}x2 x{i}, x{i}, n{i}, l0;\n" for i in range(8)]
    return [*text[:-8], "mov.b32 l0, 0x80008000;\n", *text[-8:]]  # minus zero


def _multiply(kind: str, block: int, quarter: int) -> list[str]:
    """Two bytes of both rows: a quarter of a lane's eight bytes of a block."""
    text = []
    for place in range(4):  # mma's order: row g, row g + 8, and both again eight columns later
        row, byte = place % 2, 2 * quarter + place // 2
        word, shift = 4 + 8 * row + 2 * block + byte // 4, 8 * (byte % 4) - 7
        text.append(
            f"{'shl' if shift < 0 else 'shr'}.b32 i, ${word}, {abs(shift)};\n"
            "lop3.b32 i, i, 0x7f80, own, 0xea;\nadd.u32 i, i, $22;\n"
            f"ld.shared.b32 l{place}, [i];\n"
        )
    x = f"{{x{2 * quarter}, x{2 * quarter + 1}}}"
    sums = "{d0, d1, d2, d3}"
    text.append(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        f"{sums}, {{l0, l1, l2, l3}}, {x}, {sums};\n"
    )
    return text


def _absmax(block: int, row: int, nested: bool) -> list[str]:
    if not nested:
        return [f"mov.f32 m{row}, c{4 * row + block};\n"]
    shift = 8 * block - 2
    return [
        f"{'shl' if shift < 0 else 'shr'}.b32 i, ${23 + row}, {abs(shift)};\n",
        f"and.b32 i, i, 0x3fc;\nadd.u32 i, i, code;\nld.shared.f32 m{row}, [i];\n",
        f"fma.rn.f32 m{row}, m{row}, ${25 + row}, $27;\n",
    ]
