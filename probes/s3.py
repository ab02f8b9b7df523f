import sys; sys.path.insert(0,"probes")
from spills import report
from fastlora.ops.linear import masked_lora_kernel as K
T=dict(keys_ptr="*i64",sums_ptr="*fp32",scale="fp32")
for S in ((0,1,2),(0,)):
    base=dict(RANKS=(16,)*len(S),SLOTS=S,R=16,PRECISION="tf32",HALF=64)
    for bm,w,st in ((32,4,None),(32,4,2),(32,4,3),(32,4,4)):
        print(S,"fwd",bm,w,st,report(K._masked_x_a_kernel,dict(base,BM=bm,STAGES=st),T,dict(num_warps=w)))
    for bm,bn,w,st in ((32,32,4,None),(32,32,4,2),(32,32,4,3),(32,64,4,2),(32,64,4,3),(32,64,8,3),(16,64,4,3),(16,64,4,4)):
        print(S,"bwd",bm,bn,w,st,report(K._masked_x_a_backward_kernel,dict(base,NEEDS_X=True,NEEDS_A=True,BM=bm,BN=bn,STAGES=st),T,dict(num_warps=w)))
