"""A reference for bench.py: the same LoRA step in plain PyTorch, compiled with torch.compile.

A pure layer function over dicts is compiled with fullgraph=True and called in a Python loop. The
cross-entropy computes each chunk of logits together with its gradient. There are no custom kernels
and no recomputation. The step shows how fast this design runs on a card without further work. Llama
shapes only; adapters in bf16, random weights, no checks.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 512  # rows of logits


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def layer(x: Tensor, w: dict, lora: dict, cos: Tensor, sin: Tensor, hd: int) -> Tensor:
    def linear(name: str, y: Tensor) -> Tensor:
        return F.linear(y, w[name]) + F.linear(F.linear(y, lora[name][0]), lora[name][1])

    heads = lambda y: y.unflatten(-1, (-1, hd)).transpose(1, 2)
    y = norm(x, w["norm1"])
    q, k, v = (heads(linear(n, y)) for n in "qkv")
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + linear("o", y.transpose(1, 2).flatten(2))
    y = norm(x, w["norm2"])
    return x + linear("down", F.silu(linear("gate", y)) * linear("up", y))


def chunk_loss(h: Tensor, weight: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    logsoftmax = (h @ weight.t()).float().log_softmax(-1)
    columns = torch.arange(weight.shape[0], device=h.device)
    onehot = (columns == labels[:, None]).float()
    keep = labels >= 0
    dlogits = torch.where(keep[:, None], logsoftmax.exp() - onehot, 0.0) / count
    loss = -(logsoftmax.gather(1, labels.clamp(min=0)[:, None])[:, 0] * keep).sum() / count
    return loss, dlogits.to(h.dtype) @ weight


class ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, labels, count, chunk):
        pairs = zip(h.split(CHUNK), labels.split(CHUNK), strict=True)
        parts = [chunk(a, weight, b, count) for a, b in pairs]
        ctx.save_for_backward(torch.cat([d for _, d in parts]))
        return torch.stack([loss for loss, _ in parts]).sum()

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.saved_tensors[0] * dy.to(ctx.saved_tensors[0].dtype), None, None, None, None


def probe_step(raw: dict[str, Any], rank: int, device: str, compile: bool = True) -> Callable:
    """step(input_ids) -> loss: forward, backward and fused AdamW. raw: config.json's values."""
    d, f, hd = raw["hidden_size"], raw["intermediate_size"], raw["head_dim"]
    q, kv = raw["num_attention_heads"] * hd, raw["num_key_value_heads"] * hd
    gen = torch.Generator(device).manual_seed(0)

    def new(*size: int) -> Tensor:
        empty = torch.empty(size, device=device, dtype=torch.bfloat16)
        return empty.normal_(0.0, 0.02, generator=gen)

    sizes = dict(q=(q, d), k=(kv, d), v=(kv, d), o=(d, q), gate=(f, d), up=(f, d), down=(d, f))
    ones = torch.ones(d, device=device, dtype=torch.bfloat16)
    depth, vocab = range(raw["num_hidden_layers"]), raw["vocab_size"]
    weights = [
        {n: new(*s) for n, s in sizes.items()} | {"norm1": ones, "norm2": ones} for _ in depth
    ]
    ab = lambda o, i: (new(rank, i), new(o, rank).zero_())
    loras = [{n: ab(*s) for n, s in sizes.items()} for _ in depth]
    params = [p.requires_grad_() for lora in loras for pair in lora.values() for p in pair]
    embed = new(vocab, d)
    lm_head = embed if raw["tie_word_embeddings"] else new(vocab, d)
    optimizer = torch.optim.AdamW(params, lr=2e-4, fused=True)
    wrap = (lambda fn: torch.compile(fn, fullgraph=True)) if compile else (lambda fn: fn)
    run_layer, run_norm, run_chunk = wrap(layer), wrap(norm), wrap(chunk_loss)
    inverse = raw["rope_theta"] ** (-torch.arange(0, hd, 2, device=device) / hd)

    def step(ids: Tensor) -> Tensor:
        angles = torch.arange(ids.shape[1], device=device)[:, None] * inverse
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        x = F.embedding(ids, embed).requires_grad_()
        for w, lora in zip(weights, loras, strict=True):
            x = run_layer(x, w, lora, cos, sin, hd)
        h = run_norm(x, ones).flatten(0, 1)
        labels = F.pad(ids[:, 1:], (0, 1), value=-100).flatten()
        loss = ChunkedLoss.apply(h, lm_head, labels, ids[:, 1:].numel(), run_chunk)
        loss.backward()  # pyright: ignore
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()  # pyright: ignore

    return step


if __name__ == "__main__":  # a tiny shape on the CPU: the loss starts at log(vocab) and decreases
    tiny = dict(hidden_size=64, intermediate_size=128, head_dim=16, num_attention_heads=4)
    tiny |= dict(num_key_value_heads=2, num_hidden_layers=2, vocab_size=512)
    tiny |= dict(tie_word_embeddings=True, rope_theta=1e4)
    ids = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(0))
    step = probe_step(tiny, 8, "cpu", compile=False)
    print(math.log(512), [round(float(step(ids)), 4) for _ in range(5)])
