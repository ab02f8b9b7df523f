"""Combinations of settings for embedding, head, biases and copies that are refused."""

from collections.abc import Collection

from fastlora.models.config import LlamaConfig
from fastlora.models.names import EDGE_WEIGHTS
from fastlora.models.spec import Extras, LoraConfig


def pair_problems(s: LoraConfig, config: LlamaConfig, extras: Extras) -> list[str]:
    """Two settings that train the same matrix, or that exclude each other."""
    lora = {key for key in EDGE_WEIGHTS if getattr(extras, key) is not None}
    copies = {key for key, name in EDGE_WEIGHTS.items() if name in extras.replaced}
    rows = {key for key, _ in extras.tokens} | ({"lm_head"} if extras.shared_rows else set())
    # A tied copy is used for both matrices.
    if extras.tied and copies:
        copies = {*EDGE_WEIGHTS}
    problems = [
        f"trainable_token_indices and {argument} both train {key}"
        + (", whose rows a tied head shares" if key == "lm_head" and extras.shared_rows else "")
        + "; choose one"
        for argument, keys in (("target_modules", lora), ("modules_to_save", copies))
        for key in sorted(rows & keys)
    ]
    if "embed_tokens" in lora and s.lora_bias:
        problems.append("lora_bias=True does not go with target_modules of embed_tokens")
    if s.qat_scheme is not None and (both := sorted(lora | copies | rows)):
        problems.append(
            f"qat_scheme with an adapter on {' and '.join(both)}: embedding and head are quantised"
            " as they are in the base; train one or quantise"
        )
    return problems + _tying_problems(s, config, extras, lora, copies)


def _tying_problems(
    s: LoraConfig, config: LlamaConfig, extras: Extras, lora: set[str], copies: set[str]
) -> list[str]:
    """Settings that train embedding and head in different ways, which tying excludes."""
    problems = []
    # If the ids were equal, the head would share the embedding's rows: one entry.
    if len(extras.tokens) == 2 and s.ensure_weight_tying and config.tie_word_embeddings:
        problems.append(
            "ensure_weight_tying: trainable_token_indices differ between embed_tokens and lm_head"
        )
    if not extras.tied:
        return problems
    problems += [
        f"ensure_weight_tying: {key} would have LoRA and a copy, because one of them is tied to the"
        " other matrix; choose one for both"
        for key in sorted(lora & copies)
    ]
    # A magnitude has one entry per row: v for the head, d for the embedding's transposed matrix.
    if lora and s.use_dora:
        problems.append(
            "use_dora=True with ensure_weight_tying: embedding and head cannot share their"
            " magnitudes; leave one of the two out"
        )
    a, b = extras.embed_tokens, extras.lm_head
    if a and b and (a.r, a.lora_alpha) != (b.r, b.lora_alpha):
        problems.append(
            f"ensure_weight_tying: rank {a.r} and alpha {a.lora_alpha} of embed_tokens, but"
            f" {b.r} and {b.lora_alpha} of lm_head; let the patterns give both the same"
        )
    return problems


def ineffective_problems(
    s: LoraConfig, config: LlamaConfig, modules: Collection[str], extras: Extras
) -> list[str]:
    """Settings that would have no effect on this model, which PEFT ignores."""
    problems = [
        f"modules_to_save: {name!r} matches no module of this model"
        for name in s.modules_to_save
        if not any(m.endswith(name) for m in modules)
    ]
    if s.bias in ("all", "lora_only") and not any(n.endswith(".bias") for n in extras.replaced):
        part = "this model" if s.bias == "all" else "the adapted layers of this model"
        problems.append(f"bias={s.bias!r}, but there is no bias in {part}; leave it 'none'")
    if s.ensure_weight_tying and not config.tie_word_embeddings:
        problems.append("ensure_weight_tying=True, but embedding and head of this model differ")
    elif s.ensure_weight_tying and not (extras.tied or extras.tokens):
        problems.append("ensure_weight_tying=True, but neither embedding nor head is trained")
    return problems
