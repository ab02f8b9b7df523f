"""Damaged folders of a model, an adapter and a tokenizer, read by load and load_adapter.

Each loads right or is refused by the file's name. A flipped bit of a weight may be accepted, and so
may a wrong value in a field that fastlora does not read.
"""

import json
import struct
from collections.abc import Iterator
from typing import Any

import fastlora
from faults.case import Case, Context, right
from faults.damage import BYTES, JSON_FILE, fields
from faults.folders import CONFIG

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Must be refused in every file; the other ways may leave a file that is right.
MUST = ("half", "noise", "a folder", "50 GB", "a link to itself")
# Files that a folder need not have.
OPTIONAL = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")
# A template is any text; cut off, it may still be one.
ANY_TEXT = {"chat_template.jinja": ("half", "noise")}
ADAPTER_FIELDS = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules")
ADAPTER_FIELDS += ("base_model_name_or_path", "bias", "fan_in_fan_out", "init_lora_weights")
ADAPTER_FIELDS += ("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")
ADAPTER_FIELDS += ("modules_to_save", "use_rslora", "use_dora", "lora_bias", "exclude_modules")
ADAPTER_FIELDS += ("trainable_token_indices", "loftq_config", "revision", "inference_mode")
TOKENIZER_FIELDS = ("tokenizer_class", "bos_token", "eos_token", "pad_token", "chat_template")
TOKENIZER_FIELDS += ("added_tokens_decoder", "add_prefix_space", "split_special_tokens")
TOKENIZER_FIELDS += ("clean_up_tokenization_spaces", "extra_special_tokens", "legacy")
GENERATION_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def used(context: Context, loaded: Any) -> str | None:
    """For `Case.accepts`: run the loaded model and tokenizer, which must not crash or hang."""
    model, tokenizer = loaded if isinstance(loaded, tuple) else (loaded, None)
    model(context.batch["input_ids"])
    if tokenizer is not None and not isinstance(tokenizer.encode("w1 w2"), list):
        return "encode gives no list"
    return None


def _load(name: str, damage: Any, folder: str = "base") -> Any:
    def call(context: Context) -> Any:
        path = context.copy(folder)
        damage(path / name)
        return fastlora.load(path, device="cpu", local_files_only=True)

    return call


def _load_adapter(name: str, damage: Any) -> Any:
    def call(context: Context) -> Any:
        path = context.adapter_folder()
        damage(path / name)
        return fastlora.load_adapter(context.model, path)

    return call


def _item(what: str) -> str:
    return "C8" if what in ("50 GB", "a link to a device") else "C11"


def cases() -> Iterator[Case]:
    """All of them."""
    for name in (*MODEL_FILES, *TOKENIZER_FILES, *ADAPTER_FILES):
        for what, damage in BYTES.items():
            named = () if what == "absent" else (name,)
            accepts = None if _must_be_refused(name, what) else used
            call = _reader(name)(name, damage)
            yield Case(f"{name}, {what}", _item(what), call, named, accepts, every=4)
        for what, damage in JSON_FILE.items() if name.endswith(".json") else ():
            optional = what == "an empty object" and name in OPTIONAL
            accepts = used if optional or name == "tokenizer.json" else None
            call = _reader(name)(name, damage)
            yield Case(f"{name}, {what}", "C12", call, (name,), accepts, every=4)
    for name, keys in {
        "config.json": list(CONFIG),
        "generation_config.json": list(GENERATION_FIELDS),
        "tokenizer_config.json": list(TOKENIZER_FIELDS),
        "adapter_config.json": list(ADAPTER_FIELDS),
    }.items():
        for key, what, damage in fields(keys):
            call = _reader(name)(name, damage)
            yield Case(f"{name}, {key} is {what}", _item(what), call, (name,), used, every=8)
    yield from _lengths()


def _reader(name: str) -> Any:
    return _load_adapter if name in ADAPTER_FILES else _load


def _must_be_refused(name: str, what: str) -> bool:
    optional = name in OPTIONAL or name == "tokenizer.json"
    if what in ("absent", "a folder", "a link to itself"):
        return not optional  # `load` treats such a file as absent
    if what in ("one byte short", "one byte more"):
        return name.endswith(".safetensors")
    return what in MUST and what not in ANY_TEXT.get(name, ())


def _header(count: int) -> bytes:
    """A safetensors file of many tensors of one element."""
    # Written as text: json.dumps would take longer than the second that the reader has.
    entries = (
        f'"model.layers.{i}.x":{{"dtype":"F32","shape":[1],"data_offsets":[{4 * i},{4 * i + 4}]}}'
        for i in range(count)
    )
    header = f"{{{','.join(entries)}}}".encode()
    return struct.pack("<Q", len(header)) + header + bytes(4 * count)


def _lengths() -> Iterator[Case]:
    """C10: numbers and lengths that files claim; refused in under a second."""
    quick = dict(seconds=1.0)
    many = lambda path: path.write_bytes(_header(300_000))
    for name, make in (("model.safetensors", _load), ("adapter_model.safetensors", _load_adapter)):
        yield Case(f"{name}, 300,000 tensors", "C10", make(name, many), (name,), **quick)
    for key, value in dict(
        num_hidden_layers=10_000,
        vocab_size=10**9,
        hidden_size=10**7,
        num_attention_heads=10**6,
        max_position_embeddings=10**12,
        intermediate_size=10**9,
    ).items():

        def damage(path: Any, key: str = key, value: int = value) -> None:
            path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

        accepts = right if key == "max_position_embeddings" else None
        call = _load("config.json", damage)
        named = (f"{key}||model.safetensors",)
        yield Case(f"config.json, {key} = {value:,}", "C10", call, named, accepts, **quick)
    for key, value in {
        "target_modules": "(?:q_proj|v_proj|" + "x" * 5_000_000 + ")",
        "exclude_modules": "x" * 5_000_000,
        "init_lora_weights": "pissa_niter_999999999",
        "rank_pattern": {f"layer_{i}": 4 for i in range(200_000)},
        "r": 10**9,
    }.items():

        def config(path: Any, key: str = key, value: Any = value) -> None:
            path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

        call = _load_adapter("adapter_config.json", config)
        yield Case(f"adapter_config.json, a long {key}", "C10", call, (key,), **quick)
    for what, settings in {
        "pissa_niter_999999999": dict(init_lora_weights="pissa_niter_999999999"),
        "loftq_iter=10**9": dict(init_lora_weights="loftq", loftq_config={"loftq_iter": 10**9}),
        "a regex of 5 MB": dict(target_modules="(?:q_proj|" + "x" * 5_000_000 + ")"),
        "a million names": dict(target_modules=[f"x{i}" for i in range(10**6)]),
    }.items():
        call = lambda context, s=settings: fastlora.lora(context.model, r=2, **s)
        name = next(iter(settings))
        named = "loftq_iter" if "loftq" in what else name
        yield Case(f"lora, {what}", "C10", call, (named,), **quick)
