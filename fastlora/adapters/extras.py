"""Extras: biases, copies of tensors, embedding, head and rows that an adapter trains.

The rules are PEFT's (peft 0.21.2, utils/other.py:1080 and :1535, tuners/lora/model.py:1290). They
differ from one argument to the next: `modules_to_save` matches the bare end of a name, so that
"norm" means every norm of the model, but it keeps LoRA away only from modules that have the entry
as a dotted part of their name.
"""

import operator
from collections import ChainMap, Counter
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any, cast

import regex
import torch
from torch import Tensor

from fastlora.adapters.extras_checks import ineffective_problems, pair_problems
from fastlora.arguments import one_of
from fastlora.models.config import LlamaConfig
from fastlora.models.names import (
    EDGE_WEIGHTS,
    EMBED_TOKENS,
    LM_HEAD,
    base_tensors,
    linear_names,
    tensors_from_base,
)
from fastlora.models.params import Base
from fastlora.models.spec import Extras, LoraConfig, Target

BIAS = one_of("none", "all", "lora_only")

# Module name of embedding and head -> key in the trees.
EDGE_MODULES = {"model.embed_tokens": "embed_tokens", "lm_head": "lm_head"}


def token_indices(value: Any) -> tuple[Any, ...]:
    """`trainable_token_indices` as a tuple of ids, or of (module, ids) pairs if it is a mapping.

    Ids of a set are sorted. Values that are not integers are kept as text, so that an error message
    can show them.
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


def keeps_lora_away(modules_to_save: tuple[str, ...], module: str) -> bool:
    """Whether an entry of `modules_to_save` is a dotted part of a module's name.

    LoRA does not adapt such a module. A dot in an entry matches any character, as in PEFT.
    """
    return bool(modules_to_save) and _part_regex(modules_to_save).match(module) is not None


@lru_cache(maxsize=8)  # called for every module of a model with the same names
def _part_regex(names: tuple[str, ...]) -> regex.Pattern:
    valid = [name for name in names if _may_end_a_name(name)]  # others are reported elsewhere
    return regex.compile(rf"(^|.*\.)({'|'.join(valid)})($|\..*)" if valid else r"(?!)")


def _may_end_a_name(text: str) -> bool:
    return regex.fullmatch(r"[\w.]+", text) is not None


def resolve_extras(
    settings: LoraConfig,
    config: LlamaConfig,
    modules: Collection[str],
    adapted: Collection[str],
    target: Callable[[str, str], Target],
    strict: bool,
    spoken: Callable[[str], str] = str,
) -> tuple[Extras, list[str]]:
    """(what the settings train besides projections, problems).

    Args:
        settings: as given; the `extras` in it are not read.
        config: the model's shape.
        modules: names of all modules of the model.
        adapted: names of the modules that carry LoRA.
        target: (key in the trees, module) -> the target with the rank and scaling of the patterns.
        strict: also report settings that PEFT would ignore.
        spoken: a module's name -> the name that the settings' names are matched with.
    """
    saved = {m for m in modules if spoken(m).endswith(settings.modules_to_save)}
    replaced, problems = _replaced(settings, config, saved, adapted)
    tokens, token_problems = _tokens(settings, config, modules)
    lora = {key: target(key, m) for m, key in EDGE_MODULES.items() if m in adapted}
    any_edge = any(m in saved or m in adapted for m in EDGE_MODULES)
    tied = settings.ensure_weight_tying and config.tie_word_embeddings and any_edge
    # One adapter serves both, so both have a target with its rank and scaling.
    if tied and lora:
        lora = {key: target(key, m) for m, key in EDGE_MODULES.items()}
    # One copy serves both matrices, under the embedding's name.
    if tied and not lora:
        replaced = tuple(dict.fromkeys(EMBED_TOKENS if n == LM_HEAD else n for n in replaced))
    # The head of a tied model reads the embedding's trained rows, unless it has other ids.
    rows = tokens.get("embed_tokens")
    shared_rows = config.tie_word_embeddings and rows is not None
    shared_rows = shared_rows and tokens.get("lm_head", rows) == rows
    if shared_rows:
        tokens.pop("lm_head", None)
    extras = Extras(
        **lora, tied=tied, replaced=replaced, tokens=tuple(tokens.items()), shared_rows=shared_rows
    )
    problems += token_problems + pair_problems(settings, config, extras)
    if strict:
        problems += ineffective_problems(settings, config, modules, extras)
    return extras, problems


def _replaced(
    s: LoraConfig, config: LlamaConfig, saved: Collection[str], adapted: Collection[str]
) -> tuple[tuple[str, ...], list[str]]:
    """(names on disk of the tensors of which a copy is trained, problems)."""
    names = [*base_tensors(config), *([LM_HEAD] if config.tie_word_embeddings else [])]
    # Modules with tensors that may be copied: norms, projections, embedding and head.
    allowed = {
        n.rpartition(".")[0] for n in names if ".mlp.gate." not in n and ".experts." not in n
    }
    problems = [
        f"modules_to_save matches {m}; expected norms, embed_tokens, lm_head or single linear"
        f" layers, {list(linear_names(config))}"
        for m in sorted(saved)
        if m not in allowed
    ]
    problems += [
        f"modules_to_save: {name!r:.200} cannot be the end of a module's name; expected letters,"
        " digits, _ and dots"
        for name in s.modules_to_save
        if not _may_end_a_name(name)
    ]
    problems += [
        f"{m} is in modules_to_save and in target_modules; choose one"
        for m in sorted(m for m in saved if m in adapted)
    ]
    with_bias = {"all": allowed, "lora_only": set(adapted)}.get(s.bias, set())
    replaced = []
    for name in names:
        module, _, leaf = name.rpartition(".")
        if module in saved or (leaf == "bias" and module in with_bias):
            replaced.append(name)
    return tuple(replaced), problems


def _tokens(
    s: LoraConfig, config: LlamaConfig, modules: Collection[str]
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """("embed_tokens" or "lm_head" -> ids, problems)."""
    given = s.trainable_token_indices
    pairs = given if given and isinstance(given[0], tuple) else (("embed_tokens", given),)
    tokens: dict[str, tuple[int, ...]] = {}
    problems, v = [], config.vocab_size
    for name, ids in pairs if given else ():
        # PEFT takes any end of a module's name. Ends that match several modules are refused.
        matched = [m for m in modules if m.endswith(name)]
        key = EDGE_MODULES.get(matched[0]) if len(matched) == 1 else None
        wrong = [i for i in ids if not isinstance(i, int) or not 0 <= i < v]
        twice = [i for i, n in Counter(ids).items() if n > 1]
        if key is None:
            problems.append(
                f"trainable_token_indices: {name!r:.200} is neither 'embed_tokens' nor 'lm_head'"
            )
        elif key in tokens:
            problems.append(f"trainable_token_indices names {key} twice")
        elif wrong or not ids:
            what = f"{wrong[:5]} of {name!r}" if wrong else f"{name!r} has none"
            problems.append(f"trainable_token_indices: {what}; expected ids in [0, {v})")
        elif twice:
            problems.append(f"trainable_token_indices: {twice[:5]} more than once in {name!r}")
        else:
            tokens[key] = ids
    return tokens, problems


def first_tensors(config: LlamaConfig, extras: Extras, base: Base, dtype: torch.dtype) -> dict:
    """The "replaced" and "tokens" of a fresh adapter: copies, because the base is never written to.

        base {"embed_tokens": E, "norm": n, ...},  extras.replaced ("model.norm.weight",),
                                                   extras.tokens (("embed_tokens", (7, 9)),)
    ->  {"replaced": {"model.norm.weight": a copy of n}, "tokens": {"embed_tokens": E[[7, 9]]}}

    Copies of tensors keep the base's dtype, as in PEFT. Rows are in `dtype`.
    """
    if not extras.replaced and not extras.tokens:
        return {}
    tensors = tensors_from_base(config, base)
    if LM_HEAD not in tensors:
        head = {LM_HEAD: tensors[EMBED_TOKENS]}
        tensors = ChainMap(head, cast(dict[str, Any], tensors))
    trees: dict[str, Any] = {}
    if extras.replaced:
        trees["replaced"] = {name: tensors[name].clone() for name in extras.replaced}
    if extras.tokens:
        trees["tokens"] = {
            key: _rows(tensors[EDGE_WEIGHTS[key]], ids, dtype) for key, ids in extras.tokens
        }
    return trees


def _rows(matrix: Tensor, ids: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A copy of the rows of some ids."""
    return matrix[torch.tensor(ids, device=matrix.device)].to(dtype)


def trained_extras(lora: LoraConfig) -> Mapping[str, Any]:
    """Argument -> value, for the arguments that train more than projections in this adapter."""
    arguments = {
        "bias": lora.bias if any(n.endswith(".bias") for n in lora.extras.replaced) else None,
        "modules_to_save": [*lora.modules_to_save],
        "trainable_token_indices": [*lora.trainable_token_indices],
        "target_modules": [key for key in EDGE_WEIGHTS if getattr(lora.extras, key) is not None],
    }
    return {name: value for name, value in arguments.items() if value}
