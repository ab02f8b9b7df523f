import sys; sys.path.insert(0,"probes")
from spills import report
from fastlora.ops.linear import masked_lora_kernel as K
import old_masked as O
T=dict(keys_ptr="*i64",sums_ptr="*fp32",scale="fp32")
for S in ((0,1,2),(0,1),(0,)):
    base=dict(RANKS=(16,)*len(S),SLOTS=S,R=16,PRECISION="tf32")
    print(S,"old fwd",report(O._masked_x_a_kernel,dict(base,BM=64,BK=128),T,dict(num_warps=4)))
    for bm,w in ((64,4),(32,4),(64,8),(128,8)):
        print(S,"fwd",bm,w,report(K._masked_x_a_kernel,dict(base,BM=bm,HALF=64),T,dict(num_warps=w)))
    print(S,"old bwd",report(O._masked_x_a_backward_kernel,dict(base,NEEDS_X=True,NEEDS_A=True,BM=32,BN=64),T,dict(num_warps=4)))
    for bm,bn,w in ((32,32,4),(32,64,4),(32,64,8),(64,32,4),(64,64,8),(64,32,8)):
        print(S,"bwd",bm,bn,w,report(K._masked_x_a_backward_kernel,dict(base,NEEDS_X=True,NEEDS_A=True,BM=bm,BN=bn,HALF=64),T,dict(num_warps=w)))
