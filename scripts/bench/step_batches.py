"""The batches of a measured step: random tokens, or chats of ragged length that are packed.

Every setting sees the same tokens. fastlora takes packed documents as rows of equal length with
segment_ids, where the padding behind the last document is segment 0. Other libraries take the same
documents without padding in one row, as the collators of TRL and Unsloth make it: position_ids
that restart, and for Unsloth the lengths of the documents.
"""

import argparse
import tempfile
from itertools import islice
from pathlib import Path

import torch
from random_checkpoint import SHAPES
from torch import Tensor
from whole_job.compare import write_rows

from fastlora.checkpoints.hub import DEMO
from fastlora.data.batches import batches
from fastlora.data.encoding import encode_rows
from fastlora.data.packing import pack
from fastlora.data.rows import read_rows
from fastlora.text.tokenizer import Tokenizer

Batch = dict[str, Tensor]  # int64 [batch, seq]: input_ids and labels, and segment_ids if packed
PEERS = ("hf", "liger", "unsloth")  # how the names of other libraries' settings begin
CHATS, BATCHES = 1000, 6  # rows that are packed, and different batches of them in a measurement


def step_batches(args: argparse.Namespace, device: str = "cuda") -> list[Batch]:
    """The batches that the steps take in turn: one of random tokens, or BATCHES with --chats."""
    made = chats(args.batch, args.seq) if args.chats else [random_tokens(args)]
    if args.one.startswith(PEERS) and "segment_ids" in made[0]:
        made = [one_row(batch, lengths=args.one.startswith("unsloth")) for batch in made]
    # Unsloth's collator leaves the lengths on the CPU.
    on = lambda name: "cpu" if name == "packed_seq_lengths" else device
    return [{name: x.to(on(name)) for name, x in batch.items()} for batch in made]


def random_tokens(args: argparse.Namespace) -> Batch:
    """Random tokens; with --documents each row holds documents of so many tokens."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = SHAPES[args.shape]["vocab_size"]
    ids = torch.randint(0, vocab_size, (args.batch, args.seq), generator=generator)
    packed = {}
    if args.documents:
        packed["segment_ids"] = (1 + torch.arange(args.seq) // args.documents).repeat(args.batch, 1)
    return {"input_ids": ids, "labels": ids, **packed}


def chats(batch: int, seq: int) -> list[Batch]:
    """Chats of whole_job/compare.py, packed to rows of `seq` tokens, every token trained."""
    tokenizer = Tokenizer.from_folder(DEMO)
    assert tokenizer is not None
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.jsonl", CHATS)
        rows = read_rows(Path(folder) / "rows.jsonl")
    examples = encode_rows(rows, tokenizer, train_on="all", max_seq_length=seq, too_long="truncate")
    made = list(islice(batches(pack(examples, seq), batch, seed=0), BATCHES))
    assert len(made) == BATCHES, f"{CHATS} chats fill {len(made)} batches of {batch} x {seq}"
    return made


def one_row(batch: Batch, lengths: bool) -> Batch:
    """The documents of a batch behind one another, without padding: [1, real tokens]."""
    segments, starts = batch["segment_ids"], torch.ones_like(batch["segment_ids"], dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    kept = segments > 0
    begins = starts[kept]
    sizes = begins.nonzero()[:, 0].diff(append=torch.tensor([len(begins)]))
    row = {name: batch[name][kept][None] for name in ("input_ids", "labels")}
    # The first token of a document is not trained: the tokens before it belong to another one.
    row["labels"] = row["labels"].masked_fill(begins[None], -100)
    row["position_ids"] = torch.cat([torch.arange(n) for n in sizes.tolist()])[None]
    return row | ({"packed_seq_lengths": sizes.int()} if lengths else {})


def real_tokens(batch: Batch) -> int:
    """Tokens of a batch without padding."""
    segments = batch.get("segment_ids")
    return batch["input_ids"].numel() if segments is None else int((segments > 0).sum())
