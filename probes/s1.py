import sys; sys.path.insert(0,"probes")
from spills import report
from fastlora.ops.linear import low_rank_gradients_kernel as K
F="*fp32"
for tile in [(64,256,8,3),(64,128,4,3),(64,256,4,3),(128,128,8,3),(64,128,8,3),(128,256,8,2)]:
    bm,bn,w,st=tile
    for W in ((2048,),(2048,512,512)):
        c=dict(WIDTHS=W,STARTS=tuple(range(0,len(W))),RANKS=(16,)*len(W),R=16,BM=bm,BN=bn,STAGES=st,PRECISION="tf32")
        c["STARTS"]=(0,2048,2560)[:len(W)]
        print(tile,len(W),report(K._parts_kernel,c,dict(dx_a_parts_ptr=F,db_parts_ptr=F),dict(num_warps=w)))
print(report(K._sums_kernel,dict(WIDTHS=(2048,512,512),RANKS=(16,)*3,R=16,BN=256,CHUNKS=22,ROWS=32),dict(dx_a_parts_ptr=F,db_parts_ptr=F,s_0="fp32",s_1="fp32",s_2="fp32"),dict(num_warps=2)))
