"""What files call the tensors of a mixture of experts: a model's, and a PEFT adapter's.

The tree holds all experts of a layer in one tensor, as transformers 5 does. A model's file may hold
the same tensor, or one for each expert and matrix: what transformers 4 wrote, and 5 still writes.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.checkpoint import DTYPES, Entry, check_entries, entry_tensors
from fastlora.llama.config import LlamaConfig
from fastlora.llama.params import (
    EMBED_TOKENS,
    EXPERTS,
    LM_HEAD,
    PROJECTIONS,
    ROUTER,
    base_tensors,
    projection_path,
    projection_weights,
)
from fastlora.llama.spec import LoraConfig, Target
from fastlora.ops.dequantize import dequantize
from fastlora.quantized import Quantized, Weight, quantize_4bit
from fastlora.quantized_keys import (
    check_quantizable,
    quantizable,
    quantized_problems,
    read_quantized,
    split_quantized,
)

# model_type -> the sparse block's module in files that spell every expert, and its gate, up, down.
_SPELLINGS = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}

# ── 1. targets ────────────────────────────────────────────────────────────────────────────


def is_mixture(config: LlamaConfig) -> bool:
    """Whether the family is one of mixtures, for which PEFT translates targets."""
    return config.model_type in _SPELLINGS


def translate_targets(
    settings: LoraConfig,
    config: LlamaConfig,
    modules: Collection[str],
    matches: Callable[[str], bool],
) -> tuple[LoraConfig, list[str]]:
    """(settings without names of transformers 4, problems), as peft 0.21.2 translates them
    (utils/transformers_weight_conversion.py:402).

    In transformers 4 every expert's matrices were modules of their own; their names become target
    parameters. Gate and up are one tensor now: twice the rank, and twice alpha, keep each half's
    own. PEFT translates by bare name, so that a regex reaches every layer, and a dense MLP in a
    model of mixtures gets no adapter at all.

    Args:
        settings: as given.
        config: the model's shape; a dense family's settings come back as they are.
        modules: names of all modules.
        matches: whether `target_modules`, as given, matches a name.
    """
    if not is_mixture(config):
        return settings, []
    _, (gate, up, down) = _SPELLINGS[config.model_type]
    new = {"gate": "gate.weight", gate: _FUSED, up: _FUSED, down: "down_proj"}
    targets = _target_names(settings.target_modules, config, new, modules, matches)
    if not targets and isinstance(settings.target_modules, str):
        return settings, []  # for the error that the pattern matches nothing
    old = {t: next((o for o in new if f".{t}".endswith(f".{o}")), None) for t in targets}
    present = [o for o in (gate, up) if o in old.values()]
    if len(present) == 1:
        missing = up if present == [gate] else gate
        return settings, [
            f"target_modules has {present[0]!r} without {missing!r}, but the experts hold both in"
            f" one tensor, {_FUSED!r}; name both, or target_parameters=['{_FUSED}']."
        ]
    ranks, alphas = dict(settings.rank_pattern), dict(settings.alpha_pattern)
    if present:
        pattern = rf".*\.{re.escape(_FUSED)}"
        ranks |= {pattern: 2 * settings.r}
        alphas |= {pattern: 2 * settings.lora_alpha}
    added = dict.fromkeys(new[o] for o in old.values() if o)
    translated = replace(
        settings,
        target_modules=tuple(t for t in targets if old[t] is None),
        target_parameters=(*settings.target_parameters, *added),
        rank_pattern=tuple(ranks.items()),
        alpha_pattern=tuple(alphas.items()),
    )
    return translated, []


_FUSED = "gate_up_proj"


def _target_names(
    rule: tuple[str, ...] | str,
    config: LlamaConfig,
    new: Mapping[str, str],
    modules: Collection[str],
    matches: Callable[[str], bool],
) -> tuple[str, ...]:
    """`target_modules` as bare names, where it is a regex, "all-linear", or the default seven."""
    attention = [n for n, module in PROJECTIONS.items() if module == "self_attn"]
    if rule == "all-linear":
        return (*attention, *new)
    if isinstance(rule, tuple):
        # lora()'s own default: where the experts have other names, PEFT leaves them alone.
        names_none = set(rule) == set(PROJECTIONS) and "w1" in new
        return tuple(attention) if names_none else rule
    parameters = list(base_tensors(config))
    ends = [m.rpartition(".")[2] for m in (*modules, *parameters) if matches(m)]
    ends += [m.rpartition(".")[2] for m in former_names(config) if matches(m)]
    known = {m.rpartition(".")[2] for m in modules} | set(new)
    return tuple(e for e in dict.fromkeys(ends) if e in known)


def former_names(config: LlamaConfig) -> list[str]:
    """What a regex may call experts' matrices: as PEFT asks it, without an expert's number."""
    if not is_mixture(config):
        return []
    homes = [
        projection_path(layer, EXPERTS[0]).rpartition(".")[0]
        for layer, sparse in enumerate(config.sparse_layers)
        if sparse
    ]
    return [f"{home}.{name}" for home in homes for name in _SPELLINGS[config.model_type][1]]


def matched_parameters(settings: LoraConfig, config: LlamaConfig) -> list[str]:
    """The parameters that `target_parameters` names, in full or by their dotted ends."""
    rules = settings.target_parameters
    return [n for n in base_tensors(config) if any(f".{n}".endswith(f".{r}") for r in rules)]


# ── 2. a model's files ────────────────────────────────────────────────────────────────────


class Piece(NamedTuple):
    """One tensor of a file, as a part of one of the tree's."""

    name: str  # of the tree's tensor, as `base_tensors` has it
    index: tuple[Any, ...]  # tensor[index] is the piece; () is the whole
    shape: tuple[int, ...]


def pieces(config: LlamaConfig, found: Collection[str] = ()) -> dict[str, Piece]:
    """Name in a file -> what it is of the tree, for a whole model, in the tree's order.

    Args:
        config: of the model.
        found: names that the file has; an experts' tensor among them is there in one piece.
    """
    whole: dict[str, Piece] = {}
    experts = _expert_pieces(config)
    for name, shape in base_tensors(config).items():
        split = {} if name in found else experts.get(name, {})
        whole |= split or {name: Piece(name, (), shape)}
    return whole


def _expert_pieces(config: LlamaConfig) -> dict[str, dict[str, Piece]]:
    """Name in the tree -> its pieces' names in files that spell every expert."""
    found: dict[str, dict[str, Piece]] = {}
    for layer, sparse in enumerate(config.sparse_layers):
        if not sparse:
            continue
        module, spelled = _SPELLINGS[config.model_type]
        prefix = f"model.layers.{layer}.{module}"
        router = f"{projection_path(layer, ROUTER)}.weight"
        found[router] = {
            f"{prefix}.gate.weight": Piece(
                router, (), (config.num_local_experts, config.hidden_size)
            )
        }
        for name in EXPERTS:
            path = projection_path(layer, name)
            found[path] = {
                f"{prefix}.experts.{e}.{spelled[matrix]}.weight": Piece(path, (e, rows), shape)
                for e in range(config.num_local_experts)
                for matrix, rows, shape in _matrices(config, name)
            }
    return found


def _matrices(config: LlamaConfig, name: str) -> Iterator[tuple[int, slice, tuple[int, int]]]:
    """(number among gate, up, down; rows in one expert's matrix; shape) of a tensor's matrices."""
    d, f = config.hidden_size, config.moe_intermediate_size
    if name == "experts.down_proj":
        yield 2, slice(None), (d, f)
    else:
        yield 0, slice(0, f), (f, d)
        yield 1, slice(f, 2 * f), (f, d)


def read_model(
    folder: Any,
    entries: Mapping[str, Entry],
    config: LlamaConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    quantize: bool = False,
) -> dict[str, Weight]:
    """Name in the tree -> tensor, of `checkpoint.scan`'s entries, all checked before any is read.

    Pieces go one at a time into the tensor they are part of; on the CPU, what is one tensor in the
    file stays a view of it. A projection stored in 4 or 8 bits is a record of its bytes as they
    are; a head stored so is dequantised.

    Args:
        folder: for messages.
        entries: the files' tensors.
        config: the model's shape.
        device: where the tensors go.
        dtype: of dense tensors; None is the file's.
        quantize: put the projections into 4 bits, one at a time, on the device; a checkpoint that
            has any in 4 or 8 bits stays as it is.

    Raises:
        CheckpointError: as `checkpoint.check_entries` does, in the file's own names.
        ValueError: if `quantize` cannot be.
    """
    dense, stored = split_quantized(entries)
    parts = {n: part for n, part in pieces(config, entries.keys()).items() if n not in stored}
    matrices = {n: s for n, s in base_tensors(config).items() if n in quantizable(config)}
    wrong = quantized_problems(stored, matrices)
    check_entries(folder, dense, {name: part.shape for name, part in parts.items()}, wrong)
    packed = {}
    projections = projection_weights(config)
    if quantize and not any(n in stored for n in projections):
        packed = {n: dtype or DTYPES[dense[n].dtype] for n in projections}
        check_quantizable(config, packed.values())
    keep = lambda name, tensor: quantize_4bit(tensor) if name in packed else tensor
    tensors: dict[str, Any] = _whole_tensors(dense, parts, config, device, dtype, keep)
    tensors |= read_quantized(stored, device=device)
    if isinstance(tensors.get(LM_HEAD), Quantized):
        tensors[LM_HEAD] = dequantize(tensors[LM_HEAD], tensors[EMBED_TOKENS].dtype)
    return {name: tensors[name] for name in base_tensors(config)}


def _whole_tensors(
    entries: Mapping[str, Entry],
    parts: Mapping[str, Piece],
    config: LlamaConfig,
    device: torch.device | str,
    dtype: torch.dtype | None,
    keep: Callable[[str, Tensor], Any],
) -> dict[str, Any]:
    """Name in the tree -> what `keep` makes of its tensor, one at a time."""
    shapes, tensors = base_tensors(config), {}
    for key, tensor in entry_tensors(entries, device=device, dtype=dtype):
        name, index, _ = parts[key]
        if not index:
            tensors[name] = keep(name, tensor)
        else:
            if name not in tensors:
                kind = dtype or DTYPES[entries[key].dtype]
                tensors[name] = torch.empty(shapes[name], dtype=kind, device=device)
            tensors[name][index] = tensor
        del tensor  # what was put into 4 bits goes before the next one comes
    return tensors


# ── 3. an adapter's files ─────────────────────────────────────────────────────────────────
# PEFT wraps the module that holds a parameter, once for each parameter, in the order they are
# registered: of gate_up_proj and down_proj the first is the inner one, and only the nesting says
# which is which. A is expert-major [e * r, d_in], B rank-major [d_out, r * e].

PREFIX = "base_model.model."  # of all of PEFT's keys


def adapter_path(layer: int, name: str, adapted: Collection[str]) -> str:
    """Module name of a target's A and B, in a layer that adapts the targets `adapted`."""
    if name not in EXPERTS:
        return projection_path(layer, name)
    module = projection_path(layer, name).rpartition(".")[0]
    inner = name == EXPERTS[0] and EXPERTS[1] in adapted
    return f"{module}.base_layer" if inner else module


def packed(key: str, leaf: Float[Tensor, "e _ _"]) -> Float[Tensor, "_ _"]:
    """An ExpertLoRA's a or b as PEFT's matrix, which of the two the key says."""
    return leaf.flatten(0, 1) if _is_a(key) else leaf.permute(1, 2, 0).flatten(1)


def unpacked(key: str, matrix: Float[Tensor, "_ _"], experts: int) -> Float[Tensor, "e _ _"]:
    """PEFT's matrix as an ExpertLoRA's a or b: a view."""
    if _is_a(key):
        return matrix.view(experts, -1, matrix.shape[1])
    return matrix.view(matrix.shape[0], -1, experts).permute(2, 0, 1)


def _is_a(key: str) -> bool:
    return key.endswith("lora_A.weight")


def packed_shape(field: str, r: int, shape: tuple[int, int], experts: int) -> tuple[int, int]:
    """The shape of `packed`, for experts' matrices of `shape`."""
    d_out, d_in = shape
    return (r * experts, d_in) if field == "a" else (d_out, r * experts)


def fuse_adapter(
    tensors: Mapping[str, Tensor], lora: LoraConfig, config: LlamaConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors under PEFT's present names, problems), from a file that may spell every expert.

    Of gate and up of an expert, A is stacked and B block-diagonal, so that each keeps its own rank.
    """
    if not is_mixture(config):
        return dict(tensors), []
    module, _ = _SPELLINGS[config.model_type]
    one_by_one = re.compile(rf"{re.escape(PREFIX)}model\.layers\.\d+\.{module}\.experts\.\d+\.")
    spelled = {k for k in tensors if one_by_one.match(k)}
    fused = {k.replace(f".{module}.", ".mlp."): t for k, t in tensors.items() if k not in spelled}
    problems, used = [], set()
    for layer, targets in enumerate(lora.targets if spelled else ()):
        adapted = [t.name for t in targets]
        for target in targets:
            if target.name not in EXPERTS:
                continue
            expected = _expert_shapes(config, layer, target)
            wrong = _differences(tensors, expected)
            problems += wrong
            used |= expected.keys()
            if not wrong:
                path = PREFIX + adapter_path(layer, target.name, adapted)
                a, b = _stacked(tensors, expected, config.num_local_experts)
                for key, leaf in ((f"{path}.lora_A.weight", a), (f"{path}.lora_B.weight", b)):
                    fused[key] = packed(key, leaf)
    return fused, problems + [f"unexpected  {k}" for k in sorted(spelled - used)]


def _expert_shapes(config: LlamaConfig, layer: int, target: Target) -> dict[str, tuple[int, int]]:
    """Key -> shape, expert by expert, A before B, gate before up."""
    module, spelled = _SPELLINGS[config.model_type]
    matrices = list(_matrices(config, target.name))
    r = target.r // len(matrices)
    return {
        f"{PREFIX}model.layers.{layer}.{module}.experts.{e}.{spelled[m]}.lora_{side}.weight": s
        for e in range(config.num_local_experts)
        for m, _, (d_out, d_in) in matrices
        for side, s in (("A", (r, d_in)), ("B", (d_out, r)))
    }


def _differences(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, int]]
) -> list[str]:
    problems = [f"missing     {k} {s}" for k, s in expected.items() if k not in tensors]
    return problems + [
        f"shape       {k}: file has {tuple(tensors[k].shape)}, the config says {s}"
        for k, s in expected.items()
        if k in tensors and tuple(tensors[k].shape) != s
    ]


def _stacked(
    tensors: Mapping[str, Tensor], keys: Collection[str], experts: int
) -> tuple[Float[Tensor, "e r d_in"], Float[Tensor, "e d_out r"]]:
    found = [tensors[k] for k in keys]
    each = len(found) // experts
    parts = [found[i : i + each] for i in range(0, len(found), each)]
    a = torch.stack([torch.cat(part[0::2]) for part in parts])
    return a, torch.stack([torch.block_diag(*part[1::2]) for part in parts])
