"""The loop of fastlora.train, to copy and change. It gives the same losses, to the bit on the CPU.

    python scripts/loop.py

fastlora.train adds evaluation, checkpoints with resume, logs, and checks of arguments and files.
"""

import math
from itertools import count, islice

import torch
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL
from fastlora.checkpoints.hub import DEMO
from fastlora.data.batches import batches, count_trained_tokens
from fastlora.data.encoding import encode_rows
from fastlora.data.packing import pack
from fastlora.data.rows import read_rows
from fastlora.training.step import dropout_seed


def train(
    model: fastlora.Model, tokenizer: fastlora.Tokenizer, data, *, max_steps: int,
    batch_size: int = 8, gradient_accumulation_steps: int = 1, learning_rate: float = 2e-4,
    warmup_ratio: float = 0.03, weight_decay: float = 0.0, max_grad_norm: float = 1.0,
    seed: int = 3407,
) -> tuple[fastlora.Model, list[float]]:  # fmt: skip
    """The model with a trained adapter, and the loss of every step."""
    length, pad = model.spec.max_seq_length, tokenizer.pad_token_id
    examples = encode_rows(read_rows(data), tokenizer, max_seq_length=length, split_text=True)
    sequences = pack(examples, length, pad_token_id=pad)

    def stream():  # the micro-batches of each step
        for epoch in count():
            micro_batches = batches(sequences, batch_size, seed=seed, epoch=epoch)
            while step := list(islice(micro_batches, gradient_accumulation_steps)):
                yield step

    def loss_sum(adapter, batch, seed):  # of -log p over the trained tokens. Your loss goes here.
        return FL.loss_sum(adapter, model.base, model.spec, batch, seed=seed)[0]

    adapter = tree_map(lambda x: x.detach().clone(), model.adapter)  # the optimizer writes to it
    leaves, device = tree_leaves(adapter), model.base["norm"].device
    optimizer = torch.optim.AdamW(leaves, weight_decay=weight_decay, fused=device.type == "cuda")
    warmup, losses = math.ceil(warmup_ratio * max_steps), []
    loss_and_grad = fastlora.value_and_grad(loss_sum)

    for step, micro_batches in enumerate(islice(stream(), max_steps)):
        tokens, total, gradient = sum(map(count_trained_tokens, micro_batches)), 0.0, []
        for i, batch in enumerate(micro_batches):
            batch = {name: x.to(device) for name, x in batch.items()}
            value, grads = loss_and_grad(adapter, batch, dropout_seed(seed, step + 1, i))
            grads = tree_leaves(grads)
            gradient = list(map(torch.add, gradient, grads)) if gradient else grads
            total = total + value
        gradient = [g / tokens for g in gradient]
        clip = (max_grad_norm / (get_total_norm(gradient) + 1e-6)).clamp(max=1.0)
        for leaf, g in zip(leaves, gradient, strict=True):
            leaf.grad = g * clip
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, max_steps - warmup)))
        rate = learning_rate * (step / warmup if step < warmup else cosine)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append(float(total / tokens))
    return model.with_adapter(adapter), losses


if __name__ == "__main__":
    model, tokenizer = fastlora.load("demo", dtype="float32", max_seq_length=256)
    assert tokenizer is not None
    model = fastlora.lora(model, r=16)
    model, losses = train(model, tokenizer, DEMO / "train.jsonl", max_steps=30, learning_rate=2e-3)
    print(*(f"{loss:.3f}" for loss in losses))
    model.save_pretrained("runs/loop")
