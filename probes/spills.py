"""Compile kernels for sm_90 on the CPU machine: registers, spills, shared memory."""
import os, re, subprocess, sys, tempfile
os.environ["TRITON_INTERPRET"] = "0"
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PTXAS = os.path.dirname(triton.__file__) + "/backends/nvidia/bin/ptxas-blackwell"


def report(kernel, constants, types, options, arch=90):
    names = kernel.arg_names
    def kind(name):
        if name in constants:
            return "constexpr"
        if name in types:
            return types[name]
        return "*bf16" if name.endswith("_ptr") else "i32"
    signature = {name: kind(name) for name in names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
             if n not in constants and signature[n] not in ("fp32", "i1")}
    values = {(names.index(n),): v for n, v in constants.items()}
    c = triton.compile(ASTSource(kernel, signature, constexprs=values, attrs=attrs),
                       target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(c.asm["ptx"]); f.flush()
        more = ["--maxrregcount", str(options["maxnreg"])] if "maxnreg" in options else []
        out = subprocess.run([PTXAS, "-v", *more, f"--gpu-name=sm_{arch}a", f.name, "-o", "/dev/null"],
                             capture_output=True, text=True).stderr
    regs = re.findall(r"Used (\d+) registers", out)
    spill = re.findall(r"(\d+) bytes spill stores", out)
    ptx = c.asm["ptx"]
    if not regs: print(out[:300])
    return dict(regs=regs, spill=spill, shared=c.metadata.shared, wgmma=ptx.count("wgmma.mma_async"),
                mma=ptx.count("mma.sync"), cp=ptx.count("cp.async"), tma=ptx.count("cp.async.bulk.tensor"))
