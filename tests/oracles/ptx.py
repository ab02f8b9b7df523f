"""Executes the inline PTX of packed_mma_kernel.py in Triton's interpreter, with numpy.

Each register is an array with one element for each thread of a program. Only the instructions that
this kernel uses are known; another one raises. Branches are taken by all threads or by none.
"""

import ctypes
import re
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

WIDTHS = {"b32": 4, "f32": 4, "b64": 8}


class Machine:
    """Shared memory of one program, which its threads' PTX reads and writes."""

    def __init__(self):
        self.shared = np.zeros(64 * 1024, np.uint8)

    def run(self, text: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
        self.n = max(x.size for x in inputs)
        self.r = {f"${outputs + i}": self.broadcast(x) for i, x in enumerate(inputs)}
        self.r["%laneid"] = np.arange(self.n, dtype=np.uint32) % 32
        self.r["table"] = np.full(self.n, 1024, np.uint32)
        lines = [line.strip() for line in re.sub(r"^\{|\}$", "", text.strip()).split("\n")]
        lines = [part for line in lines for part in re.split(r"(?<=;)\s+(?=\.)", line) if part]
        at = 0
        while at < len(lines):
            line = lines[at].rstrip(";")
            at += 1
            if line.startswith(".") or line.endswith(":"):
                continue
            guard = np.ones(self.n, bool)
            if line.startswith("@"):
                name, line = line[1:].split(" ", 1)
                guard = self.r[name]
            op, _, rest = line.partition(" ")
            if op == "bra":
                assert guard.all() or not guard.any()
                at = lines.index(f"{rest}:") if guard.all() else at
            else:
                self.execute(op, self.operands(rest), guard)
        return [self.r[f"${i}"] for i in range(outputs)]

    def broadcast(self, x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x).reshape(-1)
        x = x.view({4: np.uint32, 8: np.uint64}[x.itemsize])
        return np.broadcast_to(x, self.n).copy()

    def operands(self, text: str) -> list:
        found = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text)
        return [re.findall(r"[^,\s{}]+", x) if x[0] == "{" else x for x in found]

    def value(self, name: str, kind: Any = np.uint32) -> np.ndarray:
        if name in self.r:
            return self.r[name].astype(kind) if kind == np.uint64 else self.r[name]
        number = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
        return np.full(self.n, number, kind)

    def floats(self, name: str) -> np.ndarray:
        return self.value(name).view(np.float32)

    def pairs(self, name: str) -> np.ndarray:
        return self.value(name).view(np.float16).reshape(self.n, 2).astype(np.float64)

    def address(self, text: str) -> np.ndarray:
        name, _, plus = text.strip("[]").partition("+")
        return self.r[name.strip()].astype(np.uint64) + np.uint64(int(plus or 0))

    def memory(self, op: str, to, address: np.ndarray, guard: np.ndarray) -> None:
        names = to if isinstance(to, list) else [to]
        size = WIDTHS[op.split(".")[-1]]
        assert not np.any(address[guard] % (size * len(names))), f"{op} is not aligned"
        for i, name in enumerate(names):
            if op.startswith("ld"):
                self.r[name] = self.r.get(name, np.zeros(self.n, np.uint32)).copy()
            for thread in np.flatnonzero(guard):
                at = int(address[thread]) + i * size
                if op.startswith("ld.global"):
                    data = np.frombuffer(ctypes.string_at(at, size), np.uint32)
                elif op.startswith("ld.shared"):
                    data = self.shared[at : at + size].view(np.uint32)
                else:
                    self.shared[at : at + size].view(np.uint32)[:] = self.r[name][thread]
                    continue
                self.r[name][thread] = data[0]

    def execute(self, op: str, x: list, guard: np.ndarray) -> None:  # noqa: C901, PLR0912
        kind = np.uint64 if ".u64" in op or ".wide" in op else np.uint32
        match op.split("."):
            case ["ld", *_]:
                return self.memory(op, x[0], self.address(x[1]), guard)
            case ["st", "shared", *_]:
                return self.memory(op, x[1], self.address(x[0]), guard)
            case ["bar", "sync"]:
                return None
            case ["mma", *_]:
                return self.mma(*x)
            case ["setp", "lt", "u32"]:
                new = self.value(x[1]) < self.value(x[2])
            case ["mov", *_]:
                new = self.value(x[1], kind)
            case ["add", *_]:
                new = self.value(x[1]) + self.value(x[2])
            case ["and", *_]:
                new = self.value(x[1]) & self.value(x[2])
            case ["shl", *_]:
                new = self.value(x[1]) << self.value(x[2])
            case ["shr", *_]:
                new = self.value(x[1]) >> self.value(x[2])
            case ["lop3", "b32"]:
                assert x[4] == "0xea"
                new = (self.value(x[1]) & self.value(x[2])) | self.value(x[3])
            case ["mad", *_]:
                new = self.value(x[1], kind) * self.value(x[2], kind) + self.value(x[3], kind)
            case ["fma", "rn", "f32"]:
                wide = [self.floats(name).astype(np.float64) for name in x[1:]]
                new = (wide[0] * wide[1] + wide[2]).astype(np.float32).view(np.uint32)
            case ["fma", "rn", "f16x2"]:
                wide = [self.pairs(name) for name in x[1:]]
                new = (wide[0] * wide[1] + wide[2]).astype(np.float16).view(np.uint32)[:, 0]
            case ["cvt", "rn", "f16x2", "f32"]:
                two = np.stack([self.floats(x[2]), self.floats(x[1])], 1)
                new = two.astype(np.float16).view(np.uint32)[:, 0]
            case _:
                raise NotImplementedError(op)
        self.r[x[0]] = new
        return None

    def mma(self, to: list, a: list, b: list, c: list) -> None:
        """m16n8k16: the fragments of PTX ISA 9.0, section "mma.m16n8k16 with .f16 or .bf16"."""
        lane = np.arange(32)
        g, t = lane // 4, lane % 4
        for warp in range(self.n // 32):
            mine = slice(32 * warp, 32 * warp + 32)
            left, right = np.zeros((16, 16)), np.zeros((16, 8))
            for i, name in enumerate(a):
                for j in range(2):
                    values = self.pairs(name)[mine, j]
                    left[g + 8 * (i % 2), 2 * t + j + 8 * (i // 2)] = values
            for i, name in enumerate(b):
                for j in range(2):
                    right[2 * t + j + 8 * i, g] = self.pairs(name)[mine, j]
            product = left @ right
            for i, (name, plus) in enumerate(zip(to, c, strict=True)):
                more = product[g + 8 * (i // 2), 2 * t + i % 2].astype(np.float32)
                sums = self.floats(plus).copy()
                sums[mine] += more
                self.r[name] = sums.view(np.uint32)


def interpret(machine: Machine):
    """A replacement of tl.inline_asm_elementwise in Triton's interpreter."""

    def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
        text = getattr(asm, "value", asm)
        kinds = dtype if isinstance(dtype, (tuple, tl.tuple)) else (dtype,)
        arrays = [x.handle.data for x in args]
        shape = np.broadcast_shapes(*(x.shape for x in arrays))
        results = machine.run(text, arrays, len(kinds))
        made = []
        for result, kind in zip(results, kinds, strict=True):
            view = {"fp32": np.float32, "int32": np.int32, "int64": np.int64}[str(kind)]
            data = result.view(view).reshape(shape)
            kept = tl.block_type(kind, list(shape)) if shape else kind
            made.append(tl.tensor(TensorHandle(data, kind), kept))
        return made[0] if len(made) == 1 else tuple(made)

    return inline_asm_elementwise
