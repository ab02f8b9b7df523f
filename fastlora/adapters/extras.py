"""What an adapter trains beside its projections: biases, whole tensors, embedding, head, rows.

PEFT's rules (peft 0.21.2, utils/other.py:1080 and :1535, tuners/lora/model.py:1290), which differ
from one argument to the next: `modules_to_save` matches the bare end of a name, so that "norm" is
every norm of the model, but keeps LoRA away from whole dotted parts only.
"""

import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any

import regex
import torch
from torch import Tensor

from fastlora.models.config import LlamaConfig
from fastlora.models.names import (
    EMBED_TOKENS,
    END_WEIGHTS,
    LM_HEAD,
    base_tensors,
    tensors_from_base,
)
from fastlora.models.params import PROJECTIONS, Base
from fastlora.models.spec import Extras, LoraConfig, Target

BIASES = ("none", "all", "lora_only")


# The two ends of the model: module name -> its key in the trees.
EDGE_MODULES = {"model.embed_tokens": "embed_tokens", "lm_head": "lm_head"}


# ── arguments ─────────────────────────────────────────────────────────────────────────────
def type_problems(
    bias: Any, modules_to_save: Any, ensure_weight_tying: Any, trainable_token_indices: Any
) -> list[str]:
    """Arguments of fastlora.lora that are of no type they can be, before anything is done."""
    problems = []
    if not isinstance(bias, str):
        problems.append(f"bias={bias!r}: expected one of {list(BIASES)}.")
    names = [modules_to_save] if isinstance(modules_to_save, str) else modules_to_save
    if names is not None and not (_is_collection(names) and all(isinstance(n, str) for n in names)):
        problems.append(f"modules_to_save={modules_to_save!r}: expected a list of names.")
    if type(ensure_weight_tying) is not bool:
        problems.append(f"ensure_weight_tying={ensure_weight_tying!r}: expected True or False.")
    given = trainable_token_indices
    parts = list(given.values()) if isinstance(given, Mapping) else [given]
    if given is not None and not all(map(_is_collection, parts)):
        problems.append(
            f"trainable_token_indices={given!r}: expected a list of ids, or a dict of them."
        )
    return problems


def _is_collection(value: Any) -> bool:
    if isinstance(value, str | bytes):
        return False
    try:
        iter(value)
    except TypeError:  # a tensor without dimensions is Iterable to isinstance
        return False
    return True


def token_indices(value: Any) -> tuple[Any, ...]:
    """Ids as a tuple of ints, or (module, ids) pairs of a mapping's; a set in sorted order.

    What is no whole number stays, as text, for the error to show.
    """
    if isinstance(value, Mapping):
        return tuple((str(name), _ids(ids)) for name, ids in value.items())
    return () if value is None else _ids(value)


def _ids(values: Any) -> tuple[int | str, ...]:
    ids = tuple(_id(value) for value in values)
    return tuple(sorted(ids, key=str)) if isinstance(values, set | frozenset) else ids


def _id(value: Any) -> int | str:
    try:
        return repr(value) if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value if isinstance(value, str) else repr(value)


# ── rules ─────────────────────────────────────────────────────────────────────────────────
def keeps_lora_away(modules_to_save: tuple[str, ...], module: str) -> bool:
    """Whether a module is trained whole, as far as LoRA's targets are concerned: whether an entry
    is a dotted part of its name. A dot in an entry matches any character, as in PEFT."""
    return bool(modules_to_save) and _away(modules_to_save).match(module) is not None


@lru_cache(maxsize=8)  # asked for every module of a model, with the same names
def _away(names: tuple[str, ...]) -> regex.Pattern:
    plain = [name for name in names if _is_end(name)]  # anything else is refused
    return regex.compile(rf"(^|.*\.)({'|'.join(plain)})($|\..*)" if plain else r"(?!)")


def _is_end(name: str) -> bool:
    """Whether a text could be the end of a module's name."""
    return regex.fullmatch(r"[\w.]+", name) is not None


def resolve_extras(
    settings: LoraConfig,
    config: LlamaConfig,
    modules: Collection[str],
    adapted: Collection[str],
    target: Callable[[str, str], Target],
    strict: bool,
) -> tuple[Extras, list[str]]:
    """(what the settings mean outside the layers, everything about it that cannot be).

    Args:
        settings: as given.
        config: of the model.
        modules: names of all its modules.
        adapted: names of those that carry LoRA.
        target: (name in the trees, module) -> rank and scaling that the patterns give it.
        strict: also name what PEFT would ignore.
    """
    saved = {m for m in modules if m.endswith(settings.modules_to_save)}
    replaced, problems = _replaced(settings, config, saved, adapted)
    tokens, token_problems = _tokens(settings, config, modules)
    lora = {end: target(end, m) for m, end in EDGE_MODULES.items() if m in adapted}
    touched = {end for m, end in EDGE_MODULES.items() if m in saved or m in adapted}
    tied = settings.ensure_weight_tying and config.tie_word_embeddings and bool(touched)
    if tied and lora:
        lora = {end: target(end, m) for m, end in EDGE_MODULES.items()}
    if tied and not lora:
        replaced = tuple(dict.fromkeys(n if n != LM_HEAD else EMBED_TOKENS for n in replaced))
    shared = config.tie_word_embeddings and "embed_tokens" in tokens
    shared = shared and tokens.get("lm_head", tokens["embed_tokens"]) == tokens["embed_tokens"]
    if shared:
        tokens.pop("lm_head", None)
    extras = Extras(
        **lora, tied=tied, replaced=replaced, tokens=tuple(tokens.items()), shared_rows=shared
    )
    problems += token_problems + _pair_problems(settings, config, extras)
    if strict:
        problems += _without_effect(settings, config, modules, extras)
    return extras, problems


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
    problems += [
        f"modules_to_save: {name!r:.200} is no end of a module's name."
        for name in s.modules_to_save
        if not _is_end(name)
    ]
    problems += [
        f"{m} is in modules_to_save and in target_modules; choose one."
        for m in sorted(m for m in saved if m in adapted)
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


def _tokens(
    s: LoraConfig, config: LlamaConfig, modules: Collection[str]
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """("embed_tokens" or "lm_head" -> ids, problems)."""
    given = s.trainable_token_indices
    pairs = given if given and isinstance(given[0], tuple) else (("embed_tokens", given),)
    tokens: dict[str, tuple[int, ...]] = {}
    problems, v = [], config.vocab_size
    for name, ids in pairs if given else ():
        ended = [m for m in modules if m.endswith(name)]
        end = EDGE_MODULES.get(ended[0]) if len(ended) == 1 else None
        wrong = [i for i in ids if not isinstance(i, int) or not 0 <= i < v]
        twice = [i for i, n in Counter(ids).items() if n > 1]
        if end is None:
            problems.append(
                f"trainable_token_indices: {name!r:.200} is neither 'embed_tokens' nor 'lm_head'."
            )
        elif end in tokens:
            problems.append(f"trainable_token_indices names {end} twice.")
        elif wrong or not ids:
            what = f"{wrong[:5]} of {name!r}" if wrong else f"{name!r} has none"
            problems.append(f"trainable_token_indices: {what}; expected ids in [0, {v}).")
        elif twice:
            problems.append(f"trainable_token_indices: {twice[:5]} more than once in {name!r}.")
        else:
            tokens[end] = ids
    return tokens, problems


def _pair_problems(s: LoraConfig, config: LlamaConfig, o: Extras) -> list[str]:
    """What cannot be on the same matrix, or in the same model."""
    lora = {end for end in END_WEIGHTS if getattr(o, end) is not None}
    copies = {end for end, name in END_WEIGHTS.items() if name in o.replaced}
    rows = {end for end, _ in o.tokens} | ({"lm_head"} if o.shared_rows else set())
    if o.tied and copies:
        copies = {*END_WEIGHTS}
    problems = [
        f"trainable_token_indices and {other} both train {end}"
        + (", whose rows a tied head shares" if end == "lm_head" and o.shared_rows else "")
        + "; choose one."
        for other, ends in (("target_modules", lora), ("modules_to_save", copies))
        for end in sorted(rows & ends)
    ]
    problems += [
        f"ensure_weight_tying: {end} would have LoRA and a copy, one of them its twin's; choose one"
        " for both."
        for end in sorted(lora & copies)
        if o.tied
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
    if len(o.tokens) == 2 and s.ensure_weight_tying and config.tie_word_embeddings:
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
    s: LoraConfig, config: LlamaConfig, modules: Collection[str], o: Extras
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
def first_tensors(config: LlamaConfig, extras: Extras, base: Base, dtype: torch.dtype) -> dict:
    """A fresh adapter's "replaced" and "tokens", copies: the base is never written to.

    Those of whole tensors keep the base's dtype, as in PEFT; rows are in `dtype`.
    """
    own = tensors_from_base(config, base)
    own.setdefault(LM_HEAD, own[EMBED_TOKENS])
    trees: dict[str, Any] = {}
    if extras.replaced:
        trees["replaced"] = {name: own[name].clone() for name in extras.replaced}
    if extras.tokens:
        trees["tokens"] = {
            end: rows(own[END_WEIGHTS[end]], ids, dtype) for end, ids in extras.tokens
        }
    return trees


def rows(matrix: Tensor, ids: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The rows of some ids, as a tensor of their own."""
    return matrix[torch.tensor(ids, device=matrix.device)].to(dtype)


def described(lora: LoraConfig) -> Mapping[str, Any]:
    """What is trained beside the projections, by argument; empty where nothing is."""
    asked = {
        "bias": lora.bias if any(n.endswith(".bias") for n in lora.extras.replaced) else None,
        "modules_to_save": [*lora.modules_to_save],
        "trainable_token_indices": [*lora.trainable_token_indices],
        "target_modules": [end for end in END_WEIGHTS if getattr(lora.extras, end) is not None],
    }
    return {name: value for name, value in asked.items() if value}
