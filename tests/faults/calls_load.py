"""Bad calls of load, load_adapter, plan, value_and_grad, the Tokenizer and saving."""

from collections.abc import Iterator
from typing import Any

import torch

import fastlora
from faults.case import Case, Context
from faults.values import (
    CHOICE,
    COUNT,
    FLAG,
    FUNCTION,
    HUGE,
    MODEL,
    PATH,
    STRANGER,
    TEXT,
    TOKENIZER,
    bad_calls,
)

_DEVICE = (None, 5.5, (), "no such", "cpu:x", "meta", "cuda:99", {}, "")
_DTYPE = (None, 5, "no such", (), "int8", torch.int64, "torch", "", {})
_ROPE = (
    5,
    "linear",
    (),
    {"rope_type": "no such"},
    {"rope_type": "linear"},
    {"rope_type": "linear", "factor": -1.0},
    {"rope_type": "linear", "factor": HUGE},
    {"rope_type": "linear", "factor": float("nan")},
    {"rope_type": "linear", "factor": "2"},
)
_IDS = ("text", 5, None, [1.5], ["1"], [[1]], [None], [True], {}, [HUGE], [-1], [2**40])
_MESSAGES = ("text", 5, None, [], [5], ["user"], {}, STRANGER)


def _load(context: Context, **changed: Any) -> Any:
    return fastlora.load(**dict(model_name=context.good / "base", device="cpu") | changed)


def _load_adapter(context: Context, **changed: Any) -> Any:
    given = dict(model=context.model, folder_or_id=context.adapter_folder())
    return fastlora.load_adapter(**given | changed)


def _plan(context: Context, **changed: Any) -> Any:
    given = dict(model=context.tuned, batch_size=1, seq_length=16, memory="24GB", card="H100")
    return fastlora.plan(**given | changed)


def _encode(context: Context, **changed: Any) -> Any:
    return context.tokenizer.encode(**dict(text="w1") | changed)


def _decode(context: Context, **changed: Any) -> Any:
    return context.tokenizer.decode(**dict(ids=[1, 2]) | changed)


def _chat(context: Context, **changed: Any) -> Any:
    messages = [{"role": "user", "content": "w1"}]
    return context.tokenizer.apply_chat_template(**dict(messages=messages) | changed)


def _save_tokenizer(context: Context, **changed: Any) -> Any:
    return context.tokenizer.save_pretrained(**dict(folder=context.out) | changed)


def _add_tokens(context: Context, **changed: Any) -> Any:
    given = dict(model=context.model, tokenizer=context.tokenizer, tokens=["new"])
    return fastlora.add_tokens(**given | changed)


def _save(context: Context, **changed: Any) -> Any:
    return context.tuned.save_pretrained(**dict(folder=context.out) | changed)


def _save_merged(context: Context, **changed: Any) -> Any:
    return context.tuned.save_pretrained_merged(**dict(folder=context.out) | changed)


def _push(context: Context, **changed: Any) -> Any:
    return context.tuned.push_to_hub(**dict(repo_id="a/b") | changed)


def _to(context: Context, **changed: Any) -> Any:
    return context.tuned.to(**dict(device="cpu") | changed)


def _with_adapter(context: Context, **changed: Any) -> Any:
    return context.tuned.with_adapter(**dict(adapter=context.tuned.adapter) | changed)


def _with_spec(context: Context, **changed: Any) -> Any:
    return context.tuned.with_spec(**changed)


def _value_and_grad(context: Context, **changed: Any) -> Any:
    return fastlora.value_and_grad(**dict(fn=lambda adapter: 0) | changed)


def cases() -> Iterator[Case]:
    """All of them."""
    model = dict(model=MODEL)
    hub = dict(token=(5, (), {}, STRANGER), revision=(5, (), {}, ""), cache_dir=(5, (), "a\0b", ""))
    yield from bad_calls(
        "load",
        _load,
        dict(model_name=(None, *PATH, "no/such/folder", "./no-such", "x" * 5000), dtype=_DTYPE)
        | dict(max_seq_length=COUNT, load_in_4bit=FLAG, device=_DEVICE, rope_scaling=_ROPE)
        | dict(local_files_only=FLAG, base_precision=(None, *CHOICE))
        | hub,
    )
    folders = (None, *PATH, "./no-such", "x" * 5000)
    yield from bad_calls(
        "load_adapter",
        _load_adapter,
        model | dict(folder_or_id=folders, local_files_only=FLAG) | hub,
    )
    memory = ((), "much", "24", "-1GB", -1, 0, 1.5, True, {}, "")
    yield from bad_calls(
        "plan",
        _plan,
        dict(memory=memory, optimizer=(None, *CHOICE), card=(None, *CHOICE))
        | dict(model=MODEL, batch_size=(None, *COUNT), seq_length=(None, *COUNT, 10**9)),
    )
    yield from bad_calls(
        "encode", _encode, dict(text=(None, *TEXT, "\ud800"), add_special_tokens=FLAG)
    )
    yield from bad_calls("decode", _decode, dict(ids=_IDS, skip_special_tokens=FLAG))
    yield from bad_calls(
        "apply_chat_template",
        _chat,
        dict(messages=_MESSAGES, add_generation_prompt=FLAG, tokenize=FLAG)
        | dict(chat_template=(5, (), "no such", b"", {}, STRANGER)),
    )
    yield from bad_calls("tokenizer.save_pretrained", _save_tokenizer, dict(folder=(None, *PATH)))
    tokens = (None, 5, "new", [5], [None], [""], ["a\ud800"], [()])
    yield from bad_calls(
        "add_tokens",
        _add_tokens,
        model | dict(tokenizer=(None, *TOKENIZER), tokens=tokens, special=FLAG),
    )
    yield from bad_calls("save_pretrained", _save, dict(folder=(None, *PATH)))
    yield from bad_calls(
        "save_pretrained_merged",
        _save_merged,
        dict(folder=(None, *PATH), tokenizer=TOKENIZER, save_method=(None, *CHOICE))
        | dict(base=("no such", "dequantized", 5, "", ())),
    )
    yield from bad_calls(
        "push_to_hub",
        _push,
        dict(repo_id=(None, 5, "", (), "a/b/c", "a b", "../x", "a\0b", {}, STRANGER))
        | dict(token=(5, (), {}, STRANGER), private=("yes", 1, (), STRANGER)),
    )
    no_meta = tuple(device for device in _DEVICE if device != "meta")  # `plan` uses it
    yield from bad_calls("to", _to, dict(device=no_meta))
    adapters = ("text", 5, {}, (), [], STRANGER, torch.zeros(1))
    yield from bad_calls("with_adapter", _with_adapter, dict(adapter=adapters))
    yield from bad_calls(
        "with_spec",
        _with_spec,
        dict(recompute=(None, "all", -1, 2, 1.5, float("nan"), (), {}, True, HUGE))
        | dict(compile=(None, "yes", 1, (), STRANGER), kernels=(None, *CHOICE))
        | dict(deterministic=FLAG),
    )
    yield from bad_calls("value_and_grad", _value_and_grad, dict(fn=(None, "x", *FUNCTION)))
