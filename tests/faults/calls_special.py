"""Bad calls that fit no table: paths, links, values that mean nothing, NaN in tensors, the Hub."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

import fastlora
from faults.case import IDS, Case, Context, right


def _home(context: Context, _: Any) -> str | None:
    """For a path that begins with "~": no folder of that name in the working directory."""
    return "a folder named ~ was made" if (context.cwd / "~").exists() else None


def _paths() -> Iterator[Case]:
    path = "~/fastlora-fault"
    writers = {
        "save_pretrained": lambda c: c.tuned.save_pretrained(path),
        "save_pretrained_merged": lambda c: c.tuned.save_pretrained_merged(path),
        "tokenizer.save_pretrained": lambda c: c.tokenizer.save_pretrained(path),
        "train": lambda c: c.train(output_dir=path),
    }
    for name, call in writers.items():
        yield Case(f"{name} to ~/", "C14", call, ("~",), _home)
    load = lambda c: fastlora.load("~/no-such-folder", device="cpu")
    yield Case("load from ~/", "C14", load, ("~/no-such-folder",))
    data = lambda c: c.train(data="~/no-such.jsonl")
    yield Case("train on ~/", "C14", data, ("no-such.jsonl",))
    over = lambda c: c.tuned.save_pretrained(c.good / "base")
    yield Case("save_pretrained over the base", "C14", over, ("base",))
    file = lambda c: c.tuned.save_pretrained(_file(c))
    yield Case("save_pretrained to a file", "C14", file, ("a-file",))
    into = lambda c: c.train(output_dir=_file(c))
    yield Case("train into a file", "C13", into, ("a-file",))
    under = lambda c: c.train(output_dir=_file(c) / "below")
    yield Case("train below a file", "C13", under, ("a-file",))
    tokenizer = lambda c: c.tokenizer.save_pretrained(_file(c))
    yield Case("tokenizer.save_pretrained to a file", "C14", tokenizer, ("a-file",))


def _file(context: Context) -> Path:
    path = context.cwd / "a-file"
    path.write_text("x")
    return path


def _links() -> Iterator[Case]:
    def through(context: Context) -> Any:
        outside = context.cwd / "elsewhere"
        outside.mkdir()
        (outside / "mine.jinja").write_text("keep me")
        folder = context.cwd / "folder"
        folder.mkdir()
        (folder / "additional_chat_templates").symlink_to(outside)
        return context.tokenizer.save_pretrained(folder)

    def kept(context: Context, _: Any) -> str | None:
        file = context.cwd / "elsewhere" / "mine.jinja"
        return None if file.exists() else "a file outside the folder was deleted"

    named = ("additional_chat_templates",)
    yield Case("tokenizer.save_pretrained, a linked folder", "C15", through, named, kept)

    def out_of(context: Context) -> Any:
        folder = context.copy("base")
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"model.norm.weight": "../other/model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return fastlora.load(folder, device="cpu")

    yield Case("load, an index that leads out", "C15", out_of, ("model.safetensors.index.json",))
    for file, key in {"config.json": "model_type", "tokenizer_config.json": "eos_token"}.items():

        def control(context: Context, file: str = file, key: str = key) -> Any:
            path = context.copy("base") / file
            changed = json.loads(path.read_text()) | {key: "\x1b[2J\x07evil"}
            path.write_text(json.dumps(changed))
            return fastlora.load(path.parent, device="cpu")

        yield Case(f"load, control characters in {file}", "C15", control, (file,), right)

    def row(context: Context) -> Any:
        path = context.cwd / "rows.jsonl"
        path.write_text("\x1b[2J\x07evil\n")
        return context.train(data=path)

    yield Case("train, control characters in rows.jsonl", "C15", row, ("rows.jsonl", "line 1"))
    yield Case("push_to_hub, offline", "C16", lambda c: c.tuned.push_to_hub("a/b"), ("a/b",))


def _meaningless() -> Iterator[Case]:
    linear = {"rope_type": "linear", "factor": 2.0}
    for key in ("facter", "rope_teta", "original_max_positions"):
        call = lambda c, key=key: fastlora.load(
            c.good / "base", device="cpu", rope_scaling=linear | {key: 3.0}
        )
        yield Case(f"load rope_scaling with {key}", "C14", call, (key,))
    both = dict(use_gradient_checkpointing=True, recompute="none")
    call = lambda c: fastlora.lora(c.model, r=2, **both)
    yield Case("lora, both names of recompute", "C14", call, ("use_gradient_checkpointing",))
    twice = lambda c: fastlora.lora(c.tuned, r=2)
    yield Case("lora of a model with an adapter", "C14", twice, ("adapter",))
    dicts = lambda c: fastlora.lora(c.model, r=2, target_modules={"q_proj": 1})
    yield Case("lora, a dict of targets", "C14", dicts, ("target_modules",))
    merge = lambda c: fastlora.merge(c.model)
    yield Case("merge without an adapter", "C14", merge, ("adapter",))
    save = lambda c: c.model.save_pretrained(c.out)
    yield Case("save_pretrained without an adapter", "C14", save, ("adapter",))
    base = lambda c: c.train(model=c.model)
    yield Case("train without an adapter", "C14", base, ("adapter",))
    pair = lambda c: fastlora.lora(fastlora.load(c.good / "base", device="cpu"), r=2)
    yield Case("lora(load(...))", "C11", pair, ("model, tokenizer = fastlora.load",))
    swapped = lambda c: c.train(model=c.tokenizer, tokenizer=c.tuned)
    yield Case("train, model and tokenizer swapped", "C11", swapped, ("model", "tokenizer"))
    padded = lambda c: c.tuned.generate(
        IDS[:, :3], attention_mask=torch.tensor([[1, 1, 0]] * 2), max_new_tokens=2
    )
    yield Case("generate, padded on the right", "C14", padded, ("left",))
    masked = lambda c: c.tuned.generate(
        IDS[:, :3], attention_mask=torch.zeros(2, 3, dtype=torch.int64), max_new_tokens=2
    )
    yield Case("generate, no real token", "C14", masked, ())
    ignored = lambda c: c.tuned.loss(c.batch | {"labels": torch.full((2, 6), -100)})
    yield Case("model.loss, no label", "C14", ignored, (), right)


def _nan(context: Context, adapted: bool = False) -> Any:
    """The model with a NaN in one tensor of its base."""
    model = context.tuned if adapted else context.model
    first = torch.ones(())

    def change(x: torch.Tensor) -> torch.Tensor:
        nonlocal first
        x = x.clone()
        if x.dim() == 2 and x.shape[0] == x.shape[1] and first:
            x[3, 3], first = float("nan"), torch.zeros(())
        return x

    return dataclasses.replace(model, base=tree_map(change, model.base))


def _numbers() -> Iterator[Case]:
    pissa = lambda c: fastlora.lora(_nan(c), r=2, init_lora_weights="pissa")
    yield Case("lora pissa over NaN", "C6", pissa, ("model.layers.0.self_attn",))
    yield Case("quantize over NaN", "C6", lambda c: fastlora.quantize(_nan(c)), ("q_proj",))
    greedy = lambda c: _nan(c).generate(IDS[:, :3], max_new_tokens=2)
    yield Case("generate over NaN, greedy", "C6", greedy, ("NaN",))
    sampled = lambda c: _nan(c).generate(IDS[:, :3], max_new_tokens=2, temperature=1.0, seed=1)
    yield Case("generate over NaN, sampled", "C6", sampled, ("NaN",))
    train = lambda c: c.train(model=_nan(c, adapted=True))
    yield Case("train over NaN", "C6", train, ("layers.0",))
    for value in (1e39, 1e308):
        alpha = lambda c, value=value: fastlora.lora(c.model, r=2, lora_alpha=value)(IDS)
        yield Case(f"lora lora_alpha={value:g}", "C6", alpha, ("lora_alpha",))
    for name, value in dict(temperature=1e-320, top_p=1e-320).items():
        given = dict(max_new_tokens=2, temperature=1.0, seed=1) | {name: value}
        call = lambda c, given=given: c.tuned.generate(IDS[:, :3], **given)
        yield Case(f"generate {name}={value:g}", "C6", call, (name,), right)
    epochs = lambda c: c.train(max_steps=None, num_epochs=1.7e308)
    yield Case("train num_epochs=1.7e308", "C11", epochs, ("num_epochs",))
    seed = lambda c: c.train(seed=2**64)
    yield Case("train seed=2**64", "C11", seed, ("seed",))


def _late() -> Iterator[Case]:
    """C13: everything is checked before the work."""
    for value in ("a\0b", "", "x" * 300, "/proc/no-such", "/dev/null"):
        call = lambda c, value=value: c.train(output_dir=value)
        yield Case(f"train output_dir={ascii(value)[:20]}", "C13", call, ("output_dir",))
    merged = lambda c: c.tuned.save_pretrained_merged(c.out, "demo")
    yield Case("save_pretrained_merged(folder, 'demo')", "C13", merged, ("tokenizer",))
    in_4bit = lambda c: c.tuned.save_pretrained_merged(c.out, object(), "merged_4bit")
    yield Case("save_pretrained_merged(folder, object())", "C13", in_4bit, ("tokenizer",))

    def read_only(context: Context) -> Any:
        folder = context.cwd / "read-only"
        folder.mkdir()
        folder.chmod(0o500)
        with contextlib.ExitStack() as stack:
            stack.callback(folder.chmod, 0o700)
            return context.train(output_dir=folder)

    if os.getuid() != 0:  # the superuser writes anywhere
        yield Case("train, a read-only output_dir", "C13", read_only, ("read-only",))


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (_paths, _links, _meaningless, _numbers, _late):
        yield from group()
