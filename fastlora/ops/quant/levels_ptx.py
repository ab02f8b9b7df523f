"""Inline PTX of the kernels for 4-bit weights: the levels of indices."""

# In a decode step, looking the 16 levels up in memory takes 10 times as long as reading the weights
# (H200). A warp's lanes hold them instead: lane i has level i % 16, and a shuffle returns the level
# of any index. Only the low four bits of an index count (0x101f: segments of 16 lanes).
TABLE = """{
.reg .u32 lane; .reg .u64 at;
mov.u32 lane, %laneid;
and.b32 lane, lane, 15;
mul.wide.u32 at, lane, 4;
add.u64 at, at, $1;
ld.global.nc.b32 $0, [at];
}"""

# Four bytes, $8, to the levels of their high halves, $0 to $3, and of their low halves.
SHUFFLE = (
    "{\n.reg .u32 i;\n"
    + "".join(
        f"shr.u32 i, $8, {shift};\nshfl.sync.idx.b32 ${out}, $9, i, 0x101f, 0xffffffff;\n"
        for out, shift in enumerate((4, 12, 20, 28, 0, 8, 16, 24))
    )
    + "}"
)
