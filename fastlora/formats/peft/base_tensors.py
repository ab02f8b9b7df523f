"""base_tensors."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fastlora.adapters.extras import EDGE_MODULES
from fastlora.formats.peft.expert_layout import PREFIX
from fastlora.formats.peft.names import BASE_KEYS, MODULES
from fastlora.models.config import LlamaConfig
from fastlora.models.names import EMBED_TOKENS, LM_HEAD
from fastlora.models.params import Base
from fastlora.models.spec import LoraConfig, Spec


# ── 3. an embedding and a head of the base's own ──────────────────────────────────────────
def base_tensors_out(spec: Spec, base: Base) -> dict[str, Tensor]:
    """Key -> tensor, for embedding and head where they are not those of the checkpoint any more.

    A tied pair is written twice, as PEFT does. What has a trained copy is not written.
    """
    if spec.lora is None or not spec.changed:
        return {}
    extras = spec.lora.extras
    own = {EMBED_TOKENS: base["embed_tokens"], LM_HEAD: base.get("lm_head", base["embed_tokens"])}
    rows = {end for end, _ in extras.tokens} | ({"lm_head"} if extras.shared_rows else set())
    tensors = {}
    for end, module in MODULES.items():
        name = f"{module}.weight"
        copied = name in extras.replaced or (extras.tied and EMBED_TOKENS in extras.replaced)
        if copied or (name not in spec.changed and "lm_head" in base):
            continue
        with_lora = getattr(extras, end) is not None
        how = BASE_KEYS[0] if with_lora else BASE_KEYS[1] if end in rows else BASE_KEYS[2]
        tensors[f"{PREFIX}{module}.{how}"] = own[name]
    return tensors


def take_base_tensors(
    tensors: Mapping[str, Tensor],
    lora: LoraConfig,
    dtypes: Collection[torch.dtype],
    *,
    tied: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """(a file's tensors but those of the base, name on disk -> base's own tensors, problems).

    Args:
        tensors: key -> tensor.
        lora: the adapter's settings; what these make a trained copy is not the base's.
        dtypes: what a matrix may be stored as.
        tied: whether the base's head is its embedding.
    """
    rest, found, problems = dict(tensors), {}, []
    twin = {EMBED_TOKENS, LM_HEAD} if lora.extras.tied else set()
    copies = {*lora.extras.replaced}
    copies |= twin if copies & twin else set()
    for key, name in _base_keys().items():
        if key not in rest or name in copies:
            continue
        if name in found:
            problems.append(f"twice       {key}: the base's matrix is there under another key too")
        found[name] = tensor = rest.pop(key)
        if tensor.dtype not in dtypes:
            problems.append(f"dtype       {key}: {tensor.dtype}, no floating-point matrix")
        elif not tensor.isfinite().all():
            problems.append(f"NaN or inf  {key}")
    if tied and len(found) == 2 and not torch.equal(found[EMBED_TOKENS], found[LM_HEAD]):
        problems.append(
            f"two heads   {PREFIX}lm_head's matrix is not the embedding's, but the base has one for"
            " both; load a base whose tie_word_embeddings is false"
        )
    if tied and found:
        found = {EMBED_TOKENS: next(iter(found.values()))}
    return rest, found, problems


def _base_keys() -> dict[str, str]:
    """Every key that a base's embedding or head may have -> name on disk."""
    return {f"{PREFIX}{m}.{how}": f"{m}.weight" for m in EDGE_MODULES for how in BASE_KEYS}


def vocabulary_rows(tensors: Mapping[str, Tensor], config: LlamaConfig) -> tuple[int, list[str]]:
    """(vocabulary of the model a file was saved from, problems): rows of its matrices.

    Never less than the base's: then the shapes are reported.
    """
    keys = _base_keys()
    rows = {k: tensors[k].shape[0] for k in keys if k in tensors and tensors[k].dim() == 2}
    widths = {k: tensors[k].shape[-1] for k in rows if tensors[k].shape[-1] != config.hidden_size}
    problems = [
        f"shape       {k}: {w} columns, not {config.hidden_size}" for k, w in widths.items()
    ]
    problems += [
        f"shape       {k}: {tuple(tensors[k].shape)}, expected a matrix"
        for k in keys
        if k in tensors and k not in rows
    ]
    if len(set(rows.values())) > 1:
        problems.append(f"rows        differ: {rows}")
    v = max(rows.values(), default=config.vocab_size)
    if v > config.vocab_size and not config.tie_word_embeddings:
        if len({k.removeprefix(PREFIX).startswith("lm_head") for k in rows}) < 2:
            problems.append(
                f"rows        {v} of {next(iter(rows))}, {config.vocab_size} of the base, and the"
                " file holds only one of embedding and head"
            )
    if v < config.vocab_size:
        problems.append(f"rows        {rows}, but the base has {config.vocab_size}")
        v = config.vocab_size
    return v, problems
