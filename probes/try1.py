import torch
from fastlora.ops.linear import low_rank_gradients_kernel as K
K._PROGRAMS=12
for widths, ranks, dt in (((300,70,64),(16,8,3),torch.float32),((128,),(20,),torch.float16)):
    K._TILE=(32,64,4,2)
    n=133; g=torch.Generator().manual_seed(0)
    dy=torch.randn(n,sum(widths)+10,generator=g).to(dt); bs=[torch.randn(w,r,generator=g).to(dt) for w,r in zip(widths,ranks)]
    x_a=torch.randn(n,sum(ranks),generator=g).to(dt); starts=[10]
    for w in widths[:-1]: starts.append(starts[-1]+w)
    s=[0.5+i for i in range(len(widths))]
    dx_a,db=K.low_rank_gradients_fused(dy,bs,x_a,starts,s)
    o=0;p=0
    for w,r,st,b,sc in zip(widths,ranks,starts,bs,s):
        e=sc*dy[:,st:st+w].double()@b.double()
        f=sc*dy[:,st:st+w].double().T@x_a[:,o:o+r].double()
        print((dx_a[:,o:o+r]-e).norm()/e.norm(), (db[p:p+w*r].view(w,r)-f).norm()/f.norm())
        o+=r;p+=w*r
