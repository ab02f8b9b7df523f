"""Operators: pure functions of tensors, without knowledge of layers or models.

Most files read downward: the formula, a reference in plain torch that defines the result, the
custom op with its derivative, and the function that the model calls. A file *_kernel.py holds the
Triton kernels of the op beside it; it imports triton, so the op imports it on first use.

    dispatch.py       kernel or reference?          attention/   causal attention, RoPE
    cast.py           adapters to another dtype     linear/      frozen, adapted, grouped products
    dropout.py        masks from a key              swiglu/      SwiGLU over adapted gate and up
    rms_norm.py                                     loss/        log-probabilities of labels
    gradient_barrier.py                             quant/       4 and 8 bits, e4m3, QAT
    soft_cap.py       of scores and logits          decode/      kernels of one more token
    count_sketch.py   of gradients
    launch.py         how kernels are launched
"""
