"""Embedding and head of the base, in an adapter's file.

A PEFT file holds them, besides the adapter, if they differ from the checkpoint's: after the
vocabulary has grown, or if PEFT saved with save_embedding_layers. The key depends on what adapts
the module:

    base_model.model.lm_head.base_layer.weight                  LoRA
    base_model.model.lm_head.token_adapter.base_layer.weight    trained rows
    base_model.model.lm_head.weight                             nothing
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fastlora.adapters.edits.merging import merge_problem
from fastlora.adapters.extras import EDGE_MODULES
from fastlora.formats.peft.expert_layout import PREFIX
from fastlora.formats.peft.names import MODULE_OF
from fastlora.models.config import LlamaConfig
from fastlora.models.names import EMBED_TOKENS, LM_HEAD
from fastlora.models.params import Base
from fastlora.models.spec import UNTIED, LoraConfig, Spec
from fastlora.runtime.layer_fetching import with_resident_edges

_WITH_LORA, _WITH_ROWS, _ALONE = (
    "base_layer.weight",
    "token_adapter.base_layer.weight",
    "weight",
)


def base_problem(spec: Spec) -> str | None:
    """Why an adapter over this base cannot be saved alone; None if it can.

    An adapter's folder names a checkpoint and may hold another embedding and head, but no other
    tensor of the base. Over the checkpoint's own tensors the adapter would give other logits.
    """
    edges = (EMBED_TOKENS, LM_HEAD)
    others = [name for name in spec.changed if name not in edges]
    if not others:
        return None
    first = "the head, which was tied to the embedding" if others == [UNTIED] else others[0]
    more = f" and {len(others) - 1} more tensors" if len(others) > 1 else ""
    one = " Call model.save_pretrained_merged(folder), which writes base and adapter as one model."
    merging = "" if merge_problem(spec) else one
    return (
        f"the base is not that of {spec.name_or_path!r:.200}: {first}{more} changed, by"
        " fastlora.merge for example, and an adapter's folder cannot hold them."
        f"{merging} To save adapters over the changed base, write that base first, with"
        " fastlora.disable(model).save_pretrained_merged(folder), then load the folder and train"
        " over it"
    )


def base_tensors_out(spec: Spec, base: Base) -> dict[str, Tensor]:
    """PEFT's key -> tensor, for the embedding and the head that the file must hold.

    These are the ones in `spec.changed`, except those of which the adapter has a trained copy. A
    tied matrix is written twice, as PEFT does.
    """
    if spec.lora is None or not spec.changed:
        return {}
    extras, base = spec.lora.extras, with_resident_edges(base)
    matrices = {
        EMBED_TOKENS: base["embed_tokens"],
        LM_HEAD: base.get("lm_head", base["embed_tokens"]),
    }
    with_rows = {key for key, _ in extras.tokens} | ({"lm_head"} if extras.shared_rows else set())
    tensors = {}
    for key, module in MODULE_OF.items():
        name = f"{module}.weight"
        copied = name in extras.replaced or (extras.tied and EMBED_TOKENS in extras.replaced)
        # A copy is written under its own key. A tied base (no "lm_head") writes both modules if its
        # matrix has changed.
        if copied or (name not in spec.changed and "lm_head" in base):
            continue
        with_lora = getattr(extras, key) is not None
        leaf = _WITH_LORA if with_lora else _WITH_ROWS if key in with_rows else _ALONE
        tensors[f"{PREFIX}{module}.{leaf}"] = matrices[name]
    return tensors


def take_base_tensors(
    tensors: Mapping[str, Tensor],
    lora: LoraConfig,
    dtypes: Collection[torch.dtype],
    *,
    tied: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Separate a file's tensors: (the adapter's by key, the base's by name on disk, problems).

        {"...lm_head.base_layer.weight": W, "...lm_head.lora_A.weight": A, ...}
    ->  {"...lm_head.lora_A.weight": A, ...}, {"lm_head.weight": W}, []

    Args:
        tensors: PEFT's key -> tensor.
        lora: the adapter's settings. A tensor that they say is a trained copy is the adapter's.
        dtypes: accepted dtypes.
        tied: whether the base's head is its embedding. Then only the embedding is returned.
    """
    of_adapter, of_base, problems = dict(tensors), {}, []
    # With tied extras, a copy of one of the two matrices is the copy of both.
    both = {EMBED_TOKENS, LM_HEAD} if lora.extras.tied else set()
    copies = {*lora.extras.replaced}
    copies |= both if copies & both else set()
    for key, name in _base_keys().items():
        if key not in of_adapter or name in copies:
            continue
        if name in of_base:
            problems.append(f"twice       {key}: the base's matrix is there under another key too")
        of_base[name] = tensor = of_adapter.pop(key)
        if tensor.dtype not in dtypes:
            problems.append(f"dtype       {key}: {tensor.dtype} is not a floating-point dtype")
        elif not tensor.isfinite().all():
            problems.append(f"NaN or inf  {key}")
    if tied and len(of_base) == 2 and not torch.equal(of_base[EMBED_TOKENS], of_base[LM_HEAD]):
        problems.append(
            f"two heads   {PREFIX}lm_head's matrix is not the embedding's, but the base has one for"
            " both; load a base whose tie_word_embeddings is false"
        )
    # Any of the two will do: a difference was reported above.
    if tied and of_base:
        of_base = {EMBED_TOKENS: next(iter(of_base.values()))}
    return of_adapter, of_base, problems


def _base_keys() -> dict[str, str]:
    """Every key that the base's embedding or head may have -> its name on disk."""
    leaves = (_WITH_LORA, _WITH_ROWS, _ALONE)
    return {f"{PREFIX}{m}.{leaf}": f"{m}.weight" for m in EDGE_MODULES for leaf in leaves}


def vocabulary_size(tensors: Mapping[str, Tensor], config: LlamaConfig) -> tuple[int, list[str]]:
    """(size of the vocabulary that a file was saved with, problems), from the rows of its matrices.

    Never less than the base's vocabulary: a smaller one is reported as a problem.
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
    # Embedding and head of an untied base grow together, or new ids would have no logits.
    if v > config.vocab_size and not config.tie_word_embeddings:
        if len({k.removeprefix(PREFIX).startswith("lm_head") for k in rows}) < 2:
            problems.append(
                f"rows        {next(iter(rows))} has {v}, the base {config.vocab_size}, and the"
                " file holds only one of embedding and head"
            )
    if v < config.vocab_size:
        problems.append(f"rows        {rows}, but the base has {config.vocab_size}")
        v = config.vocab_size
    return v, problems
