"""The folders that the fault suite damages: a tiny model, its tokenizer, an adapter, rows.

Written with safetensors and tokenizers alone. The worker process forks, and transformers would
start threads in it and take seconds to import.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

VOCAB_SIZE, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, LENGTH = 64, 16, 20, 2, 2, 1, 64
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>")
WORDS = tuple(f"w{i}" for i in range(VOCAB_SIZE - len(SPECIAL)))
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=VOCAB_SIZE,
    hidden_size=HIDDEN,
    intermediate_size=INTERMEDIATE,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=HIDDEN // HEADS,
    hidden_act="silu",
    max_position_embeddings=LENGTH,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=3,
    dtype="float32",
)


def weights(seed: int = 0, **config: Any) -> dict[str, torch.Tensor]:
    """Random tensors of the tiny model, under the names of the file."""
    sizes = CONFIG | config
    d, f, v = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    kv = sizes["num_key_value_heads"] * sizes["head_dim"]
    q = sizes["num_attention_heads"] * sizes["head_dim"]
    matrices = {"self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d)}
    matrices |= {"self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, q)}
    matrices |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}
    for i in range(sizes["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{name}.weight": shape for name, shape in matrices.items()}
        shapes |= {f"{layer}{n}_layernorm.weight": (d,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (d,), "lm_head.weight": (v, d)}
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator)
    return {
        name: 1 + 0.2 * draw(shape) if "norm" in name else 0.25 * draw(shape)
        for name, shape in shapes.items()
    }


def write_model(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A model's folder without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config, indent=2))
    save_file(weights(seed, **config), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_tokenizer(
    folder: Path, template: str | None = TEMPLATE, *, bos: bool = False, pad: str = "<pad>"
) -> Path:
    """The files of a word-level tokenizer, with a chat template.

    With `bos` it writes <s> in front of a text. Another `pad` is an id beyond the model's rows.
    """
    vocab = {token: i for i, token in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    if pad not in SPECIAL:
        backend.add_special_tokens([AddedToken(pad, special=True)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    backend.save(str(folder / "tokenizer.json"))
    named = dict(bos_token="<s>", eos_token="</s>", pad_token=pad, unk_token="<unk>")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named})
    )
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3})
    )
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def rows(count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Chats of two turns, 6 to 12 words each."""
    generator = torch.Generator().manual_seed(seed)

    def text() -> str:
        n = int(torch.randint(6, 13, (), generator=generator))
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (n,), generator=generator))

    return [
        {"messages": [{"role": role, "content": text()} for role in ("user", "assistant")]}
        for _ in range(count)
    ]


def write_rows(path: Path, count: int = 24, seed: int = 0) -> Path:
    """A JSONL file of `rows`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count, seed)))
    return path


def write_all(folder: Path) -> Path:
    """`base`, another base `other`, and `rows.jsonl` in a folder."""
    for name, seed in (("base", 0), ("other", 1)):
        write_tokenizer(write_model(folder / name, seed))
    write_rows(folder / "rows.jsonl")
    return folder
