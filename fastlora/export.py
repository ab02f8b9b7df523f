"""Adapters out to PEFT folders and back in.

What is written is read by PEFT without a warning; what is read is any PEFT LoRA folder whose
adapter is a sum scaling * B A over projections. Everything else is refused by name.
"""

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastlora.adapter import DTYPES, ModelT
from fastlora.checkpoint import (
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
    write_text,
)
from fastlora.checks import CheckpointError, raise_problems
from fastlora.expert_keys import (
    PREFIX,
    fuse_adapter,
    is_mixture,
    unpacked,
)
from fastlora.factors import factor_problems, moves_base
from fastlora.first_weights import weight_factors
from fastlora.hub import resolve, upload
from fastlora.llama.config import LlamaConfig
from fastlora.llama.params import (
    EMBED_TOKENS,
    END_WEIGHTS,
    EXPERTS,
    LM_HEAD,
    PROJECTIONS,
    ROUTER,
    TARGETS,
    Adapter,
    Base,
    layer_targets,
    projection_path,
    tensors_from_base,
)
from fastlora.llama.spec import LoraConfig, Spec, Target
from fastlora.llama.start import with_start, without_start
from fastlora.merging import present
from fastlora.ops.cast import cast as cast_matrices
from fastlora.originals import with_originals
from fastlora.outside import ENDS, token_indices
from fastlora.peft_keys import (
    adapter_shapes,
    base_tensors_out,
    map_named,
    named_leaves,
    peft_state_dict,
    take_base_tensors,
    tensor_problems,
    vocabulary_rows,
)
from fastlora.targets import as_tuple, names_or_regex, peft_targets, resolve_targets

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# adapter_config.json, what is read of it: field -> PEFT's default where it is absent, types, types
# of what a list or dict holds.
_NULL = type(None)
_FIELDS: dict[str, tuple[Any, tuple[type, ...], tuple[type, ...]]] = {
    "peft_type": (None, (str,), ()),
    "task_type": (None, (str, _NULL), ()),
    "r": (8, (int,), ()),
    "lora_alpha": (8, (int, float), ()),
    "lora_dropout": (0.0, (int, float), ()),
    "target_modules": (None, (list, str, _NULL), (str,)),
    "target_parameters": (None, (list, _NULL), (str,)),
    "exclude_modules": (None, (list, str, _NULL), (str,)),
    "layers_to_transform": (None, (list, int, _NULL), (int,)),
    "layers_pattern": (None, (list, str, _NULL), (str,)),
    "use_rslora": (False, (bool,), ()),
    "rank_pattern": ({}, (dict,), (int,)),
    "alpha_pattern": ({}, (dict,), (int, float)),
    "init_lora_weights": (True, (bool, str), ()),
    "lora_bias": (False, (bool,), ()),
    "use_dora": (False, (bool,), ()),
    "bias": ("none", (str,), ()),
    "modules_to_save": (None, (list, _NULL), (str,)),
    "ensure_weight_tying": (False, (bool, _NULL), ()),
    "trainable_token_indices": (None, (list, dict, _NULL), (int, list)),
}
# Fields that change nothing in y = W x + scaling * B A x over frozen linear layers. The *_config
# ones only say how A and B were first filled; PEFT itself undoes fan_in_fan_out on a Linear.
_NEUTRAL = {
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "qalora_group_size"),
    *("megatron_core", "runtime_config", "fan_in_fan_out"),
}
# Ways of filling A and B that leave the base alone.
_KIND_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
# Others subtract from the base's weights, and the adapter is only right over what they left. These
# subtract the same every time, so that it can be found again, as PEFT does when it loads.
_REPEATABLE = ("pissa", "olora")
# Why it cannot be with the rest.
_UNREPEATABLE = {
    r"pissa_niter_\d+": "a randomised decomposition of",
    "loftq": "what a quantised copy lost of",
    "corda": "what data said about",
    "lora_ga": "what gradients said about",
}
# The forward of these PEFT classes is the causal language model's.
_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")


# ── adapter out ───────────────────────────────────────────────────────────────────────────


def save_adapter(
    spec: Spec, base: Base, adapter: Adapter | None, folder: str | os.PathLike[str]
) -> None:
    """Write a PEFT folder: the weights, README.md and adapter_config.json, in this order.

    Tensors keep their dtype. An embedding and a head that are not those of the checkpoint any more
    (`add_tokens`) are written too. A README.md that is there stays: it may be the user's own.

    Raises:
        ValueError: before any file is written, if there is no adapter, it does not fit the spec or
            holds NaN or infinity, or counts from start factors (`llama.start.equivalent` gives what
            to save), or the folder is a file or the base model's own.
        PermissionError: if the folder cannot be written to.
    """
    lora, adapter = present(spec, adapter)
    if moves_base(lora.init_lora_weights):
        raise ValueError(
            f"an adapter that began as {lora.init_lora_weights!r} is not saved without its start"
            " factors: call model.save_pretrained(folder), which has them."
        )
    tensors = peft_state_dict(adapter, lora)
    problems = tensor_problems(tensors, lora, spec.config, DTYPES.values())
    raise_problems(ValueError, "The adapter does not fit its spec, or is broken:", problems)
    path = writable(folder, spec)
    path.mkdir(parents=True, exist_ok=True)
    config = peft_config(spec, lora)
    write_safetensors(path / WEIGHTS_FILE, tensors | base_tensors_out(spec, base))
    # If what follows fails, new weights must not be read with an older adapter's settings.
    if (path / CONFIG_FILE).is_file() and _differs(path / CONFIG_FILE, config):
        (path / CONFIG_FILE).unlink()
    if not (path / "README.md").exists():
        write_text(path / "README.md", _readme(spec, lora))
    write_json(path / CONFIG_FILE, config)


def _differs(path: Path, config: Mapping[str, Any]) -> bool:
    try:
        return read_json(path) != config
    except CheckpointError:
        return True


def push_to_hub(
    spec: Spec,
    base: Base,
    adapter: Adapter | None,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
) -> str:
    """Upload the PEFT folder to the Hub, creating the repository if need be; gives its URL.

    Args:
        spec: of the model.
        base: its own.
        adapter: to upload.
        repo_id: "user/name".
        token: None is the one huggingface_hub is logged in with.
        private: for a repository that is created here; None is the account's default.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(spec, base, adapter, folder)
        return upload(Path(folder), repo_id, token=token, private=private)


def peft_config(spec: Spec, lora: LoraConfig) -> dict[str, Any]:
    """adapter_config.json: what the adapter is, not how the user's patterns were spelled.

    PEFT writes its JSON with sorted keys but reads patterns in file order, so overlapping patterns
    change their meaning on the way (peft 0.21.2: ranks that no longer load, scalings off in
    silence). The resolved targets are written instead, and their patterns never overlap.
    `init_lora_weights` is true, because A and B count from the base as it is: with any other PEFT
    would move the base once more.
    """
    parameters = _target_names(spec.config, lora, parameters=True)
    indices = _token_indices(lora)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": spec.name_or_path,
        "revision": None,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "bias": lora.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "target_modules": _target_names(spec.config, lora, parameters=False),
        "modules_to_save": _modules_to_save(lora),
        "rank_pattern": _patterns(spec.config, lora, lambda t: t.r, lora.r),
        "alpha_pattern": _patterns(spec.config, lora, lambda t: t.lora_alpha, lora.lora_alpha),
        "layers_to_transform": None,
        "layers_pattern": None,
        # Only where it is used: to older PEFT every unknown field is a warning.
        **({"lora_bias": True} if lora.lora_bias else {}),
        **({"target_parameters": parameters} if parameters else {}),
        **({"ensure_weight_tying": True} if lora.outside.tied else {}),
        **({"trainable_token_indices": indices} if indices else {}),
    }


def _modules_to_save(lora: LoraConfig) -> list[str] | None:
    """As given; of a tied pair with one copy the embedding, as PEFT has it."""
    names = list(lora.modules_to_save)
    if lora.outside.tied and EMBED_TOKENS in lora.outside.replaced:
        names = [n for n in names if not any(m.endswith(n) for m in ENDS)]
        names.append("model.embed_tokens")
    return names or None


def _token_indices(lora: LoraConfig) -> list[int] | dict[str, list[int]]:
    given = lora.trainable_token_indices
    if given and isinstance(given[0], tuple):
        return {name: list(ids) for name, ids in given}
    return list(given)


def _ends(lora: LoraConfig) -> dict[str, Target]:
    """Module name -> target, of embedding and head. Of a tied pair both, though one is written."""
    found = {module: getattr(lora.outside, end) for module, end in ENDS.items()}
    return {module: target for module, target in found.items() if target is not None}


def _by_name(lora: LoraConfig) -> dict[str, dict[int, Target]]:
    """Projection name -> layer -> target, without the names that carry no adapter."""
    named = {
        name: {i: t for i, ts in enumerate(lora.targets) for t in ts if t.name == name}
        for name in TARGETS
    }
    return {name: layers for name, layers in named.items() if layers}


def _parameter(config: LlamaConfig, name: str) -> str | None:
    """The end of the parameter that PEFT must be told to adapt; None for what it takes as a module.

    In a mixture of experts it takes the dense MLP's names for experts'.
    """
    if name in EXPERTS:
        return name
    of_mlp = name == ROUTER or (is_mixture(config) and PROJECTIONS[name] == "mlp")
    return f"{name}.weight" if of_mlp else None


def _target_names(config: LlamaConfig, lora: LoraConfig, *, parameters: bool) -> list[str]:
    """A bare name where every layer that has the target carries it, else one full name per layer.

    Those of modules, or with `parameters` those of parameters.
    """
    having = Counter(n for i in range(len(lora.targets)) for n in layer_targets(config, i))
    names = []
    for name, layers in _by_name(lora).items():
        parameter = _parameter(config, name)
        if (parameter is not None) != parameters:
            continue
        short = parameter or name
        everywhere = len(layers) == having[name]
        full = [_full_name(i, name, short) for i in layers]
        names += [short] if everywhere else full
    ends = [m for m in _ends(lora) if not (lora.outside.tied and m == "lm_head")]
    return names + ([] if parameters else ends)


def _full_name(layer: int, name: str, short: str) -> str:
    return projection_path(layer, name).removesuffix(name) + short


def _patterns(
    config: LlamaConfig, lora: LoraConfig, value: Callable[[Target], Any], default: Any
) -> dict[str, Any]:
    """Pattern -> value, for what differs from the default; no two match the same module.

    Full names without "model.", as old PEFT wants a dot before the pattern (peft issue 2194).
    """
    patterns = {}
    for name, layers in _by_name(lora).items():
        short = _parameter(config, name) or name
        values = {i: value(t) for i, t in layers.items()}
        if len(set(values.values())) == 1:
            values = {re.escape(short): next(iter(values.values()))}
        else:
            full = {i: _full_name(i, name, short).removeprefix("model.") for i in values}
            values = {re.escape(full[i]): v for i, v in values.items()}
        patterns |= {key: v for key, v in values.items() if v != default}
    ends = {re.escape(m.removeprefix("model.")): value(t) for m, t in _ends(lora).items()}
    return patterns | {key: v for key, v in ends.items() if v != default}


def _readme(spec: Spec, lora: LoraConfig) -> str:
    name = spec.name_or_path
    # The Hub refuses a card whose base_model is not an id of its own, such as a local path.
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
    base = [f"base_model: {name}"] if is_id else []
    tags = [f"- base_model:adapter:{name}"] if is_id else []
    front = [*base, "library_name: peft", "pipeline_tag: text-generation", "tags:", *tags, "- lora"]
    names = ", ".join([*_by_name(lora), *(t.name for t in _ends(lora).values())])
    return "\n".join(
        [
            *("---", *front, "---", ""),
            f"# LoRA adapter for {name}",
            "",
            f"Rank {lora.r}, alpha {lora.lora_alpha:g}, on {names}. Trained with fastlora; read by",
            '`fastlora.load_adapter` and by `peft.PeftModel.from_pretrained(base, "this folder")`.',
            "",
        ]
    )


# ── adapter in ────────────────────────────────────────────────────────────────────────────


def load_adapter(
    model: ModelT,
    folder_or_id: str | os.PathLike[str],
    *,
    token: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> ModelT:
    """The model's base with the adapter of a PEFT folder, in place of any it carried.

    Tensors become float32 (float64 over a float64 base), as PEFT casts them, copies of whole
    tensors the base's dtype; the device is the base's. A folder with an embedding or a head of its
    own (PEFT's save_embedding_layers, a vocabulary that grew) gives the model a base that has it.
    Keys of a compiled model ("_orig_mod.") and keys with PEFT's adapter name (".default.") are read
    as what they stand for.

    Raises:
        FileNotFoundError: if the folder, its config or its weights are not there.
        CheckpointError: naming file and key of everything in it that is wrong, or that this version
            cannot represent. Nothing is ever unpickled: an adapter_model.bin is refused.
    """
    folder = resolve(
        folder_or_id,
        files=(CONFIG_FILE, WEIGHTS_FILE),
        token=token,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    config, lora, tensors, own = _contents(folder, model.spec.config)
    base, changed = _with_own(without_start(with_originals(model.base)), own, tensors, config)
    norm = base["norm"]
    dtype = torch.promote_types(norm.dtype, torch.float32)

    def read(key: str, shape: tuple[int, ...]) -> Tensor:
        x = tensors[key]
        if ".mlp.experts." in key:
            x = unpacked(key, x, config.num_local_experts)
        # Copies: what was read is a view of the file. Whole tensors keep the base's dtype.
        kind = norm.dtype if key.endswith((".weight", ".bias")) and ".lora_" not in key else dtype
        return x.to(norm.device, kind, copy=True).contiguous()

    adapter = map_named(read, adapter_shapes(lora, config))
    matrices = tensors_from_base(config, base)
    leaves = named_leaves(adapter) | {name: matrices[name] for name in changed}
    problems = [
        f"too large   {k} for {x.dtype}" for k, x in leaves.items() if not x.isfinite().all()
    ]
    raise_problems(CheckpointError, f"{folder / WEIGHTS_FILE} does not fit:", problems)
    changed = tuple(dict.fromkeys((*model.spec.changed, *changed)))
    spec = replace(model.spec, config=config, lora=lora, changed=changed)
    if lora.init_lora_weights in _REPEATABLE:
        found = weight_factors(spec, base, torch.Generator(), (4, 1))  # neither draws nor quantises
        base = with_start(base, [cast_matrices(x, dtype) for x in found])
    return cast(ModelT, replace(cast(Any, model), spec=spec, base=base, adapter=adapter))


class _Contents(NamedTuple):
    """An adapter's folder, read and checked against a base's config."""

    config: LlamaConfig  # with the vocabulary that the file has
    lora: LoraConfig
    tensors: dict[str, Tensor]  # PEFT's key -> the adapter's
    own: dict[str, Tensor]  # name on disk -> the base's embedding and head that the file brings


def _contents(folder: Path, present: LlamaConfig) -> _Contents:
    raw = read_json(_file(folder, CONFIG_FILE))
    path = _file(folder, WEIGHTS_FILE)
    tensors, problems = _canonical(read_safetensors(path))
    v, of_vocabulary = vocabulary_rows(tensors, present)
    config, tied = replace(present, vocab_size=v), present.tie_word_embeddings
    lora = config_from_peft(raw, config, str(folder / CONFIG_FILE))
    tensors, own, of_base = take_base_tensors(tensors, lora, DTYPES.values(), tied=tied)
    if v > present.vocab_size and not (own or _reads_copies_only(lora, tied)):
        of_base.append(
            f"rows        {v}, {present.vocab_size} of the base, but the file holds no matrix of"
            " the base itself: save it with save_embedding_layers=True"
        )
    tensors, of_experts = fuse_adapter(tensors, lora, config)
    problems += of_vocabulary + of_base
    problems += of_experts or tensor_problems(tensors, lora, config, DTYPES.values())
    cure = f"If the weights are right, check that {CONFIG_FILE} and the base model belong to them."
    raise_problems(CheckpointError, f"{path} does not fit:", problems, cure)
    return _Contents(config, lora, tensors, own)


def _reads_copies_only(lora: LoraConfig, tied: bool) -> bool:
    """Whether copies stand in for every matrix of embedding and head, so that a base without the
    new rows is never read."""
    copies = {EMBED_TOKENS, LM_HEAD} & {*lora.outside.replaced}
    return len(copies) == 2 or (tied and lora.outside.tied and bool(copies))


def _with_own(
    base: Base, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], config: LlamaConfig
) -> tuple[Base, list[str]]:
    """(the base with the embedding and head that a file brings, names of those that it changes).

    Where the vocabulary grew and only a trained copy is there, the base has its values too: rows
    that it never had are known from nowhere else.
    """
    names = {name: key for key, name in END_WEIGHTS.items() if key in base}
    changed: dict[str, Tensor] = {}
    for name, key in names.items():
        brought = own.get(name)
        if brought is None and base[key].shape[0] < config.vocab_size:
            brought = tensors.get(f"{PREFIX}{name}")
        if brought is None:
            continue
        value = brought.to(base["norm"].device, base["norm"].dtype, copy=True)
        if value.shape != base[key].shape or not torch.equal(value, base[key]):
            changed[key] = value
    whole: Any = {**base, **changed}
    return whole, [name for name, key in names.items() if key in changed]


def config_from_peft(raw: Mapping[str, Any], config: LlamaConfig, where: str) -> LoraConfig:
    """adapter_config.json's dict as settings, resolved for a model; patterns in the file's order.

    Args:
        raw: the file's content. A field that fastlora does not know is no matter while it is null,
            false or empty.
        config: the base model's shape.
        where: the file's name, for the message.

    Raises:
        CheckpointError: listing every field that is wrong or not represented.
    """
    problems = _field_problems(raw) + _refusals(raw, config)
    raise_problems(CheckpointError, f"{where} is no LoRA that fastlora can represent:", problems)
    value = {field: raw.get(field, default) for field, (default, _, _) in _FIELDS.items()}
    targets, exclude = value["target_modules"], value["exclude_modules"]
    settings = LoraConfig(
        r=value["r"],
        lora_alpha=value["lora_alpha"],
        lora_dropout=value["lora_dropout"],
        target_modules=peft_targets(config) if targets is None else names_or_regex(targets),
        exclude_modules=names_or_regex(exclude) if exclude else None,
        layers_to_transform=as_tuple(value["layers_to_transform"]),
        layers_pattern=as_tuple(value["layers_pattern"]),
        use_rslora=value["use_rslora"],
        rank_pattern=tuple(value["rank_pattern"].items()),
        alpha_pattern=tuple(value["alpha_pattern"].items()),
        init_lora_weights=value["init_lora_weights"],
        lora_bias=value["lora_bias"],
        use_dora=value["use_dora"],
        target_parameters=as_tuple(value["target_parameters"]) or (),
        bias=value["bias"],
        modules_to_save=as_tuple(value["modules_to_save"]) or (),
        ensure_weight_tying=bool(value["ensure_weight_tying"]),
        trainable_token_indices=token_indices(value["trainable_token_indices"]),
        targets=(),
    )
    heading = f"{where} does not fit this model:"
    lora = resolve_targets(settings, config, heading, error=CheckpointError, strict=False)
    init = lora.init_lora_weights
    problems = factor_problems(lora, config, init) if init in _REPEATABLE else []
    raise_problems(CheckpointError, heading, problems)
    return lora


def _field_problems(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    for field, (_, types, elements) in _FIELDS.items():
        if field not in raw:
            continue
        value = raw[field]
        inner = (
            list(value.values() if isinstance(value, dict) else value)
            if (isinstance(value, list | dict))
            else []
        )
        deep = [e for item in inner if isinstance(item, list) for e in item]
        if type(value) not in types or any(type(e) not in elements for e in inner):
            expected = " or ".join("null" if t is _NULL else t.__name__ for t in types)
            of = f" of {' or '.join(t.__name__ for t in elements)}" if elements else ""
            problems.append(f"{field}={value!r:.200}: expected {expected}{of}.")
        elif any(type(e) is int and abs(e) >= 2**31 for e in (value, *inner, *deep)):
            problems.append(f"{field}={value!r:.200}: expected less than 2**31.")
        elif (size := _text_size(value)) > _MOST_TEXT:
            problems.append(f"{field}: {size:,} characters; expected at most {_MOST_TEXT:,}.")
    return problems


# All 882 projections of Llama 3.1 405B by their full names are 35,000 characters.
_MOST_TEXT = 100_000


def _text_size(value: Any) -> int:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if not isinstance(value, list):
        return len(value) if isinstance(value, str) else 0
    return len(value) + sum(len(e) for e in value if isinstance(e, str | list))


def _refusals(raw: Mapping[str, Any], config: LlamaConfig) -> list[str]:
    problems = []
    if (kind := raw.get("peft_type")) != "LORA":
        given = f"peft_type={kind!r:.200}" if "peft_type" in raw else "peft_type is missing"
        problems.append(f"{given}: only 'LORA' adapters are read.")
    if (task := raw.get("task_type")) not in _TASKS:
        problems.append(f"task_type={task!r:.200}: expected 'CAUSAL_LM'.")
    if (init := raw.get("init_lora_weights", True)) not in _KIND_INITS + _REPEATABLE:
        problems.append(_init_refusal(init))
    if raw.get("target_modules") is None and config.model_type == "smollm3":
        problems.append("target_modules=None: PEFT has no default for 'smollm3'; name them.")
    for field in sorted(raw.keys() - _FIELDS.keys() - _NEUTRAL):
        if raw[field] not in (None, False, {}, [], "", "none"):
            problems.append(f"{field}={raw[field]!r:.200}: not in this version of fastlora.")
    return problems


def _init_refusal(init: Any) -> str:
    reasons = (why for kind, why in _UNREPEATABLE.items() if re.fullmatch(kind, str(init)))
    if not (why := next(reasons, None)):
        return f"init_lora_weights={init!r:.200}: unknown to fastlora."
    return (
        f"init_lora_weights={init!r:.200}: this adapter counts from a base that lacks {why} its"
        " weights, which is not in the folder (PEFT itself loads it wrong). Convert it where it was"
        " trained: save the fresh adapter first, then peft_model.save_pretrained(folder,"
        " path_initial_model_for_weight_conversion=fresh_folder)."
    )


def _file(folder: Path, name: str) -> Path:
    """A file of the folder; where it is not there, the error says what is."""
    if (path := folder / name).is_file():
        return path
    if name == WEIGHTS_FILE and (pickled := folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{pickled} is a pickle, which can run code when it is read, so fastlora does not;"
            " convert it once where you trust it: peft_model.save_pretrained(folder) writes"
            f" {WEIGHTS_FILE}."
        )
    inside = sorted(p.parent.name for p in folder.glob(f"*/{name}"))
    cure = f"load one of its sub-folders: {inside}." if inside else "is it a PEFT adapter's?"
    raise FileNotFoundError(f"{folder} has no {name}; {cure}")


def _canonical(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under PEFT's plain names, without compile's and the adapter's name in between."""
    renamed, problems = {}, []
    for key, tensor in tensors.items():
        plain = key.replace("_orig_mod.", "")
        plain = re.sub(r"\.lora_(\w+)\.default\b", r".lora_\1", plain)
        # Beside bias="all", or a vocabulary that grew, PEFT writes a module that is saved whole
        # twice more, and takes neither of the two for the copy.
        own = re.sub(r"\.(original_module|modules_to_save)\.(bias|weight)$", r".\2", plain)
        if own != plain and own in tensors:
            continue
        if plain in renamed:
            problems.append(f"twice       {key}, also there as {plain}")
        renamed[plain] = tensor
    return renamed, problems


# ── where to write ────────────────────────────────────────────────────────────────────────


def writable(folder: str | os.PathLike[str], spec: Spec) -> Path:
    """The folder as a path, once it is clear that it may be written to."""
    if error := folder_error(Path(folder), spec):
        raise error
    return Path(folder)


def folder_error(path: Path, spec: Spec) -> ValueError | PermissionError | None:
    """Why nothing of this model may or can be written to a folder; nothing is touched."""
    if (path / "config.json").is_file() and path.resolve() == Path(spec.name_or_path).resolve():
        return ValueError(f"{path} is the folder the base was loaded from; choose another.")
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not nearest.is_dir():
        return ValueError(f"{path} cannot be a folder: {nearest} is a file; choose another name.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        return PermissionError(f"{path} cannot be written: {nearest} is not writable for you.")
    return None
