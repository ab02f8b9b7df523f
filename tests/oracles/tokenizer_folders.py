"""Folders of tokenizers in the style of the model families' published ones."""

import json
from pathlib import Path

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

CORPUS = [
    "The rank of a matrix is the number of independent rows. Don't you think so? 12 + 34 = 46!",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 22), 'straße', \"naïve café\")  # 日本語",
    "Ein Satz, noch ein Satz: we're here, they've gone; 3.14159 ~ pi. 🙂 {json: [1, 2, 3]}",
] * 4

LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

CHATML = """{% if messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' -}}
{% endif %}
"""

CHATML_MARKED = """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message['content'] + '<|im_end|>' }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% else %}
{{ ' ' + message['content'] + eos_token }}
{% endif %}
{% endfor %}"""

# As Qwen3: the last reply is rendered with (empty) thinking, earlier ones without.
THINKING = """{% set ns = namespace(last=-1) %}{% for m in messages %}
{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

ODDS_AND_ENDS = """{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}
{{ m | tojson(indent=1) }} {{ dict(a='<ü>') | tojson }} {{ strftime_now('%Y') | length }}
    {% if m.tool_calls is defined %}called{% endif %}
{% endfor %}{{ tools is none }}{{ unk_token }}"""


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_folder(
    folder: Path, raw: dict, tokenizer_config: dict | None, config: dict | None
) -> Path:
    write_json(folder / "tokenizer.json", raw)
    if tokenizer_config is not None:
        write_json(folder / "tokenizer_config.json", tokenizer_config)
    if config is not None:
        write_json(folder / "config.json", config)
    return folder


def added(content: str, id: int, special: bool = True, **flags) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False} | flags
    return {"id": id, "content": content, "special": special, **flags}


def without_id(token: dict) -> dict:
    return {key: value for key, value in token.items() if key != "id"}


def byte_level(*specials: str, plain: tuple[str, ...] = (), words: str | None = None) -> dict:
    """A trained byte-level BPE; `specials` and `plain` are added behind the vocabulary."""
    backend = Backend(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    split = [pre_tokenizers.Split(Regex(words), "isolated")] if words else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    raw = json.loads(backend.to_str())
    n = len(raw["model"]["vocab"])
    raw["added_tokens"] = [added(t, n + i, t in specials) for i, t in enumerate(specials + plain)]
    return raw


def bos_in_front(token: str, id: int) -> dict:
    template = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, id)]
    )
    return json.loads(template.__getstate__())


def sentencepiece_like(modern: bool) -> dict:
    """Llama-2's layout: <unk> <s> </s>, 256 byte tokens, pieces with "▁"."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    backend.train_from_iterator(
        [text.encode("ascii", "ignore").decode() for text in CORPUS],
        trainers.BpeTrainer(vocab_size=480, special_tokens=tokens, show_progress=False),
    )
    raw = json.loads(backend.to_str())
    raw["added_tokens"] = [added(t, i) for i, t in enumerate(tokens[:3])]
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    space = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw["normalizer"] = None if modern else json.loads(normalizers.Sequence(steps).__getstate__())
    raw["pre_tokenizer"] = json.loads(space.__getstate__()) if modern else None
    text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw["decoder"] = json.loads(decoders.Sequence([*text, decoders.Strip(" ", 1)]).__getstate__())
    raw["post_processor"] = bos_in_front("<s>", 1)
    return raw


LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama3(folder: Path, template: str | None = LLAMA3, **more) -> Path:
    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
    raw = byte_level(*specials, "<|eot_id|>", "<|pad|>", words=LLAMA3_WORDS)
    raw["model"]["ignore_merges"] = True
    ids = {token["content"]: token["id"] for token in raw["added_tokens"]}
    level = json.loads(processors.ByteLevel(trim_offsets=True).__getstate__())
    front = bos_in_front("<|begin_of_text|>", ids["<|begin_of_text|>"])
    raw["post_processor"] = {"type": "Sequence", "processors": [level, front]}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "added_tokens_decoder": {str(t["id"]): without_id(t) for t in raw["added_tokens"]},
        "clean_up_tokenization_spaces": True,
        **({"chat_template": template} if template else {}),
        **more,
    }
    eos = ids["<|end_of_text|>"]
    write_folder(folder, raw, tokenizer_config, {"model_type": "llama", "eos_token_id": eos})
    write_json(folder / "generation_config.json", {"eos_token_id": [eos, ids["<|eot_id|>"]]})
    return folder


def qwen(folder: Path, template: str | None = CHATML, model_type: str = "qwen3", **more) -> Path:
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    raw = byte_level(*specials, plain=("<tool_call>", "<think>"), words=r"\p{N}|\s*\p{L}+|\s+")
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "added_tokens_decoder": {str(t["id"]): without_id(t) for t in raw["added_tokens"]},
        **({"chat_template": template} if template else {}),
        **more,
    }
    return write_folder(folder, raw, tokenizer_config, {"model_type": model_type})


def llama2(folder: Path, modern: bool = False, config: dict | None = None, **more) -> Path:
    tokenizer_config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": True,  # tokenizer.json overrides, as in transformers
        "bos_token": {"__type": "AddedToken", **without_id(added("<s>", 1))},
        "eos_token": "</s>",
        "chat_template": MISTRAL,
        "model_max_length": 7,
        **more,
    }
    config = {"model_type": "llama"} if config is None else config
    return write_folder(folder, sentencepiece_like(modern), tokenizer_config, config)


GEMMA = """{{ bos_token }}{% for message in messages %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""


def gemma(folder: Path, model_type: str = "gemma3_text", **more) -> Path:
    """Gemma's layout: <pad> <eos> <bos> <unk>, no space in front, a word with its space."""
    raw = sentencepiece_like(modern=False)
    names = {"<unk>": "<pad>", "<s>": "<eos>", "</s>": "<bos>"}
    vocab = {names.get(t, t): i for t, i in raw["model"]["vocab"].items()}
    turns = ("<unk>", "<start_of_turn>", "<end_of_turn>")
    vocab |= {t: len(vocab) + i for i, t in enumerate(turns)}
    raw["model"] |= {"vocab": vocab, "unk_token": "<unk>"}
    raw["added_tokens"] = [added(t, vocab[t]) for t in ("<pad>", "<eos>", "<bos>", *turns)]
    raw["normalizer"] = json.loads(normalizers.Replace(" ", "▁").__getstate__())
    split = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    raw["pre_tokenizer"] = json.loads(split.__getstate__())
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw["decoder"] = json.loads(decoders.Sequence(steps).__getstate__())
    raw["post_processor"] = bos_in_front("<bos>", vocab["<bos>"])
    tokenizer_config = {
        "tokenizer_class": "GemmaTokenizer",
        **{f"{x}_token": f"<{x}>" for x in ("bos", "eos", "pad", "unk")},
        "chat_template": GEMMA,
        **more,
    }
    return write_folder(folder, raw, tokenizer_config, {"model_type": model_type})


def smollm2(folder: Path) -> Path:
    raw = byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    digits = {"type": "Digits", "individual_digits": True}
    raw["pre_tokenizer"]["pretokenizers"].insert(0, digits)
    tokenizer_config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": [
            {"name": "default", "template": CHATML},
            {"name": "marked", "template": CHATML_MARKED},
        ],
    }
    return write_folder(folder, raw, tokenizer_config, {"model_type": "llama"})


def scattered(folder: Path, **more) -> Path:
    """An old layout: no added_tokens_decoder, tokens in three files and absent from the first."""
    raw = byte_level("<s>", "</s>")
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", **more}
    folder = write_folder(folder, raw, tokenizer_config, None)
    n = len(raw["model"]["vocab"])
    write_json(
        folder / "special_tokens_map.json",
        {
            "bos_token": without_id(added("<s>", n)),
            "eos_token": "</s>",
            "pad_token": without_id(added("<pad>", 0, rstrip=True)),
            "additional_special_tokens": ["<|extra|>", "the"],
        },
    )
    write_json(folder / "added_tokens.json", {"<pad>": n + 2, "matrix": n + 3})
    write_json(folder / "config.json", {"model_type": "llama", "eos_token_id": 5})
    return folder


def newcomers(folder: Path) -> Path:
    """Special tokens that tokenizer_config.json names and tokenizer.json lacks."""
    folder = write_folder(
        folder,
        byte_level("<s>"),
        {
            "tokenizer_class": "SomethingUnheardOf",
            "bos_token": "<s>",
            "eos_token": "<eos>",
            "image_token": "<image>",
            "extra_special_tokens": ["<one>", "<two>"],
            "added_tokens_decoder": {"700": without_id(added(" rank", 700, special=False))},
        },
        {"model_type": "llama"},
    )
    (folder / "chat_template.jinja").write_text(ODDS_AND_ENDS + "{{ image_token }}")
    return folder


def word_level(folder: Path) -> Path:
    backend = Backend(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(
        CORPUS, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False)
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    more = {"clean_up_tokenization_spaces": True, "chat_template": ODDS_AND_ENDS}
    return write_folder(folder, json.loads(backend.to_str()), config | more, None)


FOLDERS = {
    "llama3": llama3,
    "llama3, called LlamaTokenizer": lambda f: llama3(f, tokenizer_class="LlamaTokenizerFast"),
    "llama3, splitting special tokens": lambda f: llama3(f, split_special_tokens=True),
    "qwen2": lambda f: qwen(f, model_type="qwen2", tokenizer_class="LlamaTokenizerFast"),
    "qwen3": qwen,
    "qwen3, thinking": lambda f: qwen(f, THINKING),
    "qwen3, more special": lambda f: qwen(f, additional_special_tokens=["<tool_call>", "<think>"]),
    "qwen3, class unnamed": lambda f: qwen(f, CHATML_MARKED, tokenizer_class=None),
    "qwen3, as it is": lambda f: qwen(f, tokenizer_class="PreTrainedTokenizerFast"),
    "llama2": llama2,
    "llama2, legacy": lambda f: llama2(f, modern=True, legacy=True),
    "llama2, no prefix": lambda f: llama2(f, add_prefix_space=False),
    "llama2, defaults": lambda f: llama2(f, bos_token="<s>", unk_token="<unk>", pad_token="<pad>"),
    "llama2, modern": lambda f: llama2(f, modern=True, tokenizer_class="PreTrainedTokenizerFast"),
    "mistral": lambda f: llama2(f, config={"model_type": "mistral"}),
    "gemma": gemma,
    "gemma, class unnamed": lambda f: gemma(f, "gemma3", tokenizer_class=None),
    "smollm2": smollm2,
    "scattered": scattered,
    "scattered, told twice": lambda f: scattered(f, additional_special_tokens=["<one>"]),
    "newcomers": newcomers,
    "word level": word_level,
}
