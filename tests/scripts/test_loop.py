"""scripts/loop.py is the loop of `train`."""

import loop

import fastlora
from fastlora.checkpoints.hub import DEMO
from fastlora.data.rows import read_rows
from oracles.pairs import adapted
from oracles.trees import same_bits


def test_losses_and_adapter_have_the_bits_of_train():
    """With dropout, two micro-batches a step, a last step that is shorter, and a second epoch."""
    base, tokenizer = fastlora.load("demo", dtype="float32", max_seq_length=96, device="cpu")
    model = adapted(base, r=2, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
    settings = dict(
        max_steps=5, batch_size=2, gradient_accumulation_steps=2, learning_rate=5e-3,
        warmup_ratio=0.2, weight_decay=0.1,
    )  # fmt: skip
    rows = read_rows(DEMO / "heldout.jsonl")[:16]
    copied, losses = loop.train(model, tokenizer, rows, **settings)
    trained, history = fastlora.train(model, tokenizer, rows, progress=False, **settings)
    assert len(set(history.tokens)) > 2  # the step that ends an epoch has fewer
    assert tuple(losses) == history.losses
    assert same_bits(copied.adapter, trained.adapter)
