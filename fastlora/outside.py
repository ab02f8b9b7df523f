"""What an adapter trains beside its projections: biases, whole tensors, embedding, head, rows.

PEFT's rules (peft 0.21.2, utils/other.py:1080 and :1535, tuners/lora/model.py:1290), which differ
from one argument to the next: `modules_to_save` matches the bare end of a name, so that "norm" is
every norm of the model, but keeps LoRA away from whole dotted parts only.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import regex
import torch
from torch import Tensor

from fastlora.llama.config import LlamaConfig
from fastlora.llama.params import (
    EMBED_TOKENS,
    LM_HEAD,
    PROJECTIONS,
    Base,
    base_tensors,
    tensors_from_base,
)
from fastlora.llama.spec import LoraConfig, Outside, Target

BIASES = ("none", "all", "lora_only")
# The two ends of the model: module name -> its key in the trees.
ENDS = {"model.embed_tokens": "embed_tokens", "lm_head": "lm_head"}
_WEIGHTS = {"embed_tokens": EMBED_TOKENS, "lm_head": LM_HEAD}


def keeps_lora_away(modules_to_save: Collection[str], module: str) -> bool:
    """Whether a module is trained whole, as far as LoRA's targets are concerned."""
    return any(regex.match(away_regex(name), module) for name in modules_to_save)


def away_regex(name: str) -> str:
    """The pattern that PEFT makes of an entry of modules_to_save; dots in it match anything."""
    return rf"(^|.*\.){name}($|\..*)"


def resolve_outside(
    settings: LoraConfig,
    config: LlamaConfig,
    modules: Collection[str],
    adapted: Collection[str],
    target: Callable[[str, str], Target],
    strict: bool,
) -> tuple[Outside, list[str]]:
    """(what the settings mean outside the layers, everything about it that cannot be).

    Args:
        settings: as given.
        config: of the model.
        modules: names of all its modules.
        adapted: names of those that carry LoRA.
        target: (name in the trees, module) -> rank and scaling that the patterns give it.
        strict: also name what PEFT would ignore.
    """
    saved = {m for m in modules if any(m.endswith(name) for name in settings.modules_to_save)}
    replaced, problems = _replaced(settings, config, saved, adapted)
    tokens, token_problems = _tokens(settings, config)
    lora = {end: target(end, m) for m, end in ENDS.items() if m in adapted}
    touched = {end for m, end in ENDS.items() if m in saved or m in adapted}
    tied = settings.ensure_weight_tying and config.tie_word_embeddings and bool(touched)
    if tied and lora:
        lora = {end: target(end, m) for m, end in ENDS.items()}
    if tied and not lora:
        replaced = tuple(dict.fromkeys(n if n != LM_HEAD else EMBED_TOKENS for n in replaced))
    shared = config.tie_word_embeddings and "embed_tokens" in tokens
    shared = shared and tokens.get("lm_head", tokens["embed_tokens"]) == tokens["embed_tokens"]
    if shared:
        tokens.pop("lm_head", None)
    outside = Outside(
        **lora, tied=tied, replaced=replaced, tokens=tuple(tokens.items()), shared_rows=shared
    )
    problems += token_problems + _pair_problems(settings, outside)
    if strict:
        problems += _without_effect(settings, config, modules, outside)
    return outside, problems


def _replaced(
    s: LoraConfig, config: LlamaConfig, saved: Collection[str], adapted: Collection[str]
) -> tuple[tuple[str, ...], list[str]]:
    """(names of the tensors trained whole, in the tree's order; problems)."""
    names = [*base_tensors(config), *([LM_HEAD] if config.tie_word_embeddings else [])]
    # Norms, projections, embedding and head: modules with tensors of their own, experts apart.
    whole = {n.rpartition(".")[0] for n in names if ".mlp.gate." not in n and ".experts." not in n}
    problems = [
        f"modules_to_save matches {m}; expected norms, embed_tokens, lm_head or single linear"
        f" layers, {list(PROJECTIONS)}."
        for m in sorted(saved)
        if m not in whole
    ]
    if s.bias not in BIASES:
        problems.append(f"bias={s.bias!r}: expected one of {list(BIASES)}.")
    homes = {"all": whole, "lora_only": set(adapted)}.get(s.bias, set())
    found = []
    for name in names:
        module, _, leaf = name.rpartition(".")
        if module in saved or (leaf == "bias" and module in homes):
            found.append(name)
    return tuple(found), problems


def _tokens(s: LoraConfig, config: LlamaConfig) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """("embed_tokens" or "lm_head" -> ids, problems)."""
    given = s.trainable_token_indices
    pairs = given if given and isinstance(given[0], tuple) else (("embed_tokens", given),)
    tokens: dict[str, tuple[int, ...]] = {}
    problems, v = [], config.vocab_size
    for name, ids in pairs if given else ():
        ends = [end for module, end in ENDS.items() if name and module.endswith(name)]
        if len(ends) != 1:
            problems.append(
                f"trainable_token_indices: {name!r} is neither 'embed_tokens' nor 'lm_head'."
            )
            continue
        wrong = [i for i in ids if type(i) is not int or not 0 <= i < v]
        if wrong or not ids:
            what = f"{wrong[:5]} of {name!r}" if wrong else f"{name!r} has none"
            problems.append(f"trainable_token_indices: {what}; expected ids in [0, {v}).")
            continue
        if len(set(ids)) < len(ids):
            twice = sorted({i for i in ids if ids.count(i) > 1})[:5]
            problems.append(f"trainable_token_indices: {twice} more than once in {name!r}.")
        tokens[ends[0]] = tuple(ids)
    return tokens, problems


def _pair_problems(s: LoraConfig, o: Outside) -> list[str]:
    """What cannot be on the same matrix, or in the same model."""
    lora = {end for end in _WEIGHTS if getattr(o, end) is not None}
    copies = {end for end, name in _WEIGHTS.items() if name in o.replaced}
    rows = {end for end, _ in o.tokens} | ({"lm_head"} if o.shared_rows else set())
    if o.tied and copies:
        copies = {*_WEIGHTS}
    problems = [
        f"trainable_token_indices and {other} both train {end}"
        + (", whose rows a tied head shares" if end == "lm_head" and o.shared_rows else "")
        + "; choose one."
        for other, ends in (("target_modules", lora), ("modules_to_save", copies))
        for end in sorted(rows & ends)
    ]
    problems += [
        f"ensure_weight_tying: {end} is in modules_to_save and in target_modules; choose one."
        for end in sorted(lora & copies)
    ]
    if "embed_tokens" in lora and s.lora_bias:
        problems.append("lora_bias=True does not go with target_modules of embed_tokens.")
    if o.tied and lora and s.use_dora:
        problems.append(
            "use_dora=True with ensure_weight_tying: the magnitudes of embedding and head cannot be"
            " one; leave one of the two out."
        )
    a, b = o.embed_tokens, o.lm_head
    if o.tied and a and b and (a.r, a.lora_alpha) != (b.r, b.lora_alpha):
        problems.append(
            f"ensure_weight_tying: rank {a.r} and alpha {a.lora_alpha} of embed_tokens, but"
            f" {b.r} and {b.lora_alpha} of lm_head; let the patterns give both the same."
        )
    mismatch = len(o.tokens) == 2 and s.ensure_weight_tying
    if mismatch:
        problems.append(
            "ensure_weight_tying: trainable_token_indices differ between embed_tokens and lm_head."
        )
    if s.qat_scheme is not None and (both := sorted(lora | copies | rows)):
        problems.append(
            f"qat_scheme with an adapter on {' and '.join(both)}: embedding and head are quantised"
            " as they are; train one or quantise."
        )
    return problems


def _without_effect(
    s: LoraConfig, config: LlamaConfig, modules: Collection[str], o: Outside
) -> list[str]:
    problems = [
        f"modules_to_save: {name!r} matches no module of this model."
        for name in s.modules_to_save
        if not any(m.endswith(name) for m in modules)
    ]
    if s.bias in BIASES[1:] and not any(n.endswith(".bias") for n in o.replaced):
        where = "this model" if s.bias == "all" else "the adapted layers of this model"
        problems.append(f"bias={s.bias!r}, but there is no bias in {where}; leave it 'none'.")
    if s.ensure_weight_tying and not config.tie_word_embeddings:
        problems.append("ensure_weight_tying=True, but embedding and head of this model differ.")
    elif s.ensure_weight_tying and not (o.tied or o.tokens):
        problems.append("ensure_weight_tying=True, but neither embedding nor head is trained.")
    return problems


# ── first tensors ─────────────────────────────────────────────────────────────────────────


def first_tensors(config: LlamaConfig, outside: Outside, base: Base, dtype: torch.dtype) -> dict:
    """ "replaced" and "tokens" of a fresh adapter: copies, so that the base is never written to.

    Copies of whole tensors keep the base's dtype, as in PEFT; rows are in `dtype`.
    """
    own = tensors_from_base(config, base)
    own.setdefault(LM_HEAD, own[EMBED_TOKENS])
    trees: dict[str, Any] = {}
    if outside.replaced:
        trees["replaced"] = {name: own[name].clone() for name in outside.replaced}
    if outside.tokens:
        trees["tokens"] = {end: rows(own[_WEIGHTS[end]], ids, dtype) for end, ids in outside.tokens}
    return trees


def rows(matrix: Tensor, ids: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The rows of some ids, as a tensor of their own."""
    return matrix[torch.tensor(ids, device=matrix.device)].to(dtype)


def described(lora: LoraConfig) -> Mapping[str, Any]:
    """What is trained beside the projections, by argument; empty where nothing is."""
    asked = {
        "bias": lora.bias if any(n.endswith(".bias") for n in lora.outside.replaced) else None,
        "modules_to_save": [*lora.modules_to_save],
        "trainable_token_indices": [*lora.trainable_token_indices],
        "target_modules": [end for end in _WEIGHTS if getattr(lora.outside, end) is not None],
    }
    return {name: value for name, value in asked.items() if value}
