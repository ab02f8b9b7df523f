"""The figures of a step beside its loss: tokens, operations, and the bar's text."""

import sys
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastlora.training import progress
from fastlora.training.loop import train
from fastlora.training.progress import bar_figures, card_peak, step_cost, step_operations
from oracles.training_runs import ROWS

PACKED = {"segment_ids": torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])}
PADDED = {"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}


def test_operations_are_those_that_torch_counts(base):
    """Forward: one of the two products of each matrix, two of the seven of attention, which torch
    does not count on the CPU."""
    ids = torch.ones(2, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        base.with_spec(kernels="torch")(ids)
    config = base.spec.config
    assert step_operations(config, 32, 0) / 2 == counter.get_total_flops()
    q = torch.ones(2, config.num_attention_heads, 16, config.head_dim)
    with FlopCounterMode(display=False) as counter:
        (q @ q.mT) @ q
    forward = step_operations(config, 0, 2 * 16 * 16) * 2 / 7
    assert forward == config.num_hidden_layers * counter.get_total_flops()


def test_tokens_and_pairs_leave_padding_out(model):
    assert progress._read_tokens(PACKED) == (11, 6 + 3 + 21)
    assert progress._read_tokens(PADDED) == (7, 6 + 10)
    assert step_cost(model, [PACKED, PACKED], 1.0) == {"read_tokens": 22}


def test_the_share_of_a_known_card(monkeypatch, model):
    norm = SimpleNamespace(device=torch.device("cuda"), itemsize=2)
    on_gpu = SimpleNamespace(base={"norm": norm}, spec=model.spec)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    seconds = step_operations(model.spec.config, 11, 30) / (0.25 * 989.4e12)
    call = getattr(step_cost, "__wrapped__", step_cost)
    cost = call(on_gpu, [PACKED], seconds)
    assert cost == {"read_tokens": 11, "memory_gib": 1.5, "peak_share": 0.25}
    assert card_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert card_peak("Quadro") is None


def test_the_bar_shows_every_figure():
    record = dict(loss=1.23456, read_tokens=3000, seconds=2.0, eval_loss=2.0, peak_share=0.412)
    record |= dict(memory_gib=10.24)
    assert bar_figures(record, encoded="1,024 rows") == {
        "loss": "1.2346", "tokens/s": "1,500", "eval": "2.0000", "of peak": "41%",
        "memory": "10.2 GiB", "rows": "1,024 rows",
    }  # fmt: skip


def test_the_bar_is_on_stderr(model, tokenizer, capfd):
    train(model, tokenizer, ROWS, max_steps=2, warmup_ratio=0.0)
    out, err = capfd.readouterr()
    sys.stderr.write(err)
    assert out == "" and "2/2" in err and "loss=" in err and "tokens/s=" in err
