"""Measures of how far fastlora's base models are from transformers'.

oracles/transformers_table.py prints all of them for every family.
"""

from typing import Any

import torch
from torch import Tensor

from fastlora.models.config import LlamaConfig
from fastlora.models.rope_tables import layer_rope
from oracles.pairs import Pair
from oracles.trees import token_ids

LENGTHS = (1, 7, 24)  # 24 passes the windows (5) and dynamic RoPE's context (16)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference in units of max(1, absmax). The tests allow 1e-5."""
    return ((ours - theirs).abs().max() / max(1.0, theirs.abs().max().item())).item()


@torch.no_grad()
def prompts(pair: Pair, t: int) -> float:
    ids = token_ids(2, t, vocab_size=96)
    return difference(pair.model(ids), pair.theirs(ids))


def depends_on_length(config: LlamaConfig) -> bool:
    """Whether a position's angles depend on the length of its sequence."""
    types = {layer_rope(config, x).rope_type for x in config.layer_types}
    return not types.isdisjoint(("dynamic", "longrope"))


def padding(side: str, t: int = 24) -> Tensor:
    """[3, t] attention mask of rows with 24, 17 and 5 real tokens."""
    right = (torch.arange(t) < torch.tensor([[24], [17], [5]])).long()
    return right if side == "right" else right.flip(-1)


@torch.no_grad()
def padded(pair: Pair, side: str) -> float:
    """Real positions of a padded batch, against transformers' batch with the same positions.

    With dynamic RoPE and LongRoPE, transformers takes the angles from the longest row of the batch,
    fastlora from each row, so that rows do not depend on each other. Then transformers reads row by
    row.
    """
    ids, mask = token_ids(3, 24, vocab_size=96), padding(side)
    ours = pair.model(ids, attention_mask=mask)[mask.bool()]
    if depends_on_length(pair.model.spec.config):
        alone = [pair.theirs(row[m.bool()][None])[0] for row, m in zip(ids, mask, strict=True)]
        return difference(ours, torch.cat(alone))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    theirs = pair.theirs(ids, attention_mask=mask, position_ids=positions)
    return difference(ours, theirs[mask.bool()])


@torch.no_grad()
def packed(pair: Pair) -> float:
    """Documents side by side in two rows, against transformers on each alone."""
    ids, lengths = token_ids(2, 24, vocab_size=96), ([9, 8, 7], [20, 4])
    segments = torch.stack(
        [torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in lengths]
    )
    ours = pair.model(ids, segment_ids=segments)
    documents = [d for row, n in zip(ids, lengths, strict=True) for d in row.split(n)]
    return difference(ours.flatten(0, 1), torch.cat([pair.theirs(d[None])[0] for d in documents]))


@torch.no_grad()
def losses(pair: Pair) -> float:
    """The loss of a batch whose first labels are ignored, relative."""
    ids = token_ids(2, 24, vocab_size=96)
    labels = torch.where(torch.arange(24) < 5, -100, ids)
    ours = pair.model.loss({"input_ids": ids, "labels": labels})
    theirs = pair.fresh_oracle()(ids, labels=labels).loss
    return (ours / theirs - 1).abs().item()


@torch.no_grad()
def rounding(pair: Pair, exact: Pair, t: int) -> tuple[float, float]:
    """(ours, transformers') relative error of bfloat16 logits by Frobenius norm.

    For a mixture of experts it is the error of the median token. If two experts have nearly equal
    router scores, rounding can send a token to another expert (1 to 6 tokens of 100 in these
    models, on both sides alike), and these tokens would determine the norm.

    `exact` holds the same numbers in float32. 16 rows average out single roundings.
    """
    ids = token_ids(16, t, vocab_size=96)
    reference = exact.theirs(ids)
    mixture = any(pair.model.spec.config.sparse_layers)

    def error(logits: torch.Tensor) -> float:
        wrong = logits.float() - reference
        if mixture:
            return (wrong.norm(dim=-1) / reference.norm(dim=-1)).median().item()
        return (wrong.norm() / reference.norm()).item()

    return error(pair.model(ids)), error(pair.theirs(ids))


def widened(pair: Pair) -> Pair:
    """The same weights in float32. A new oracle: .float() would keep bfloat16's rotary tables."""
    oracle = type(pair.oracle).from_pretrained(pair.folder, dtype=torch.float32).eval()
    return pair._replace(oracle=oracle)


NEW = 24  # with a prompt of 9, past windows (5) and dynamic RoPE's context (16)


def prompt(b: int, t: int, seed: int = 0) -> Tensor:
    return 3 + token_ids(b, t, seed=seed, vocab_size=93)  # no special ids


def left_padding(*real: int) -> Tensor:
    """[b, longest] mask of rows with that many real tokens."""
    return (torch.arange(max(real)) >= max(real) - torch.tensor(real)[:, None]).long()


def theirs(one: Pair, ids: Tensor, mask: Tensor | None = None, **how: Any) -> Tensor:
    """transformers' generate, greedy unless told otherwise."""
    mask = torch.ones_like(ids) if mask is None else mask
    how = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **how}
    # Dynamic RoPE's trained 16 is not the limit here: see oracles.pairs.read_pair.
    return one.fresh_oracle().generate(ids, attention_mask=mask, **how)


def greedy_difference(one: Pair) -> float:
    """Share of greedy ids that differ from transformers', over single prompts and a padded batch.

    With dynamic RoPE and LongRoPE rows of transformers depend on the longest row, so only single
    prompts run.
    """
    how: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=())
    batches = [(prompt(1, t), None) for t in (1, 9)]
    if not depends_on_length(one.model.spec.config):
        batches.append((prompt(3, 12), left_padding(12, 7, 3)))
    same = [
        one.model.generate(ids, attention_mask=mask, **how)
        == theirs(one, ids, mask, eos_token_id=[])
        for ids, mask in batches
    ]
    return 1 - torch.cat([x[:, -NEW:].flatten() for x in same]).double().mean().item()
