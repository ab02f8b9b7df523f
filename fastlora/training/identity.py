"""run_identity(): everything that a run depends on, to compare two runs by."""

import hashlib
import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlora.errors import raise_problems
from fastlora.formats.peft.names import named_leaves
from fastlora.losses.loss_argument import loss_identity
from fastlora.models.names import projection_path, tensors_from_base
from fastlora.models.params import quantized_to
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import LoraConfig
from fastlora.models.state import ModelState, require_adapter
from fastlora.training.custom_optimizer import optimizer_identity
from fastlora.training.run import Run
from fastlora.training.schedules import schedule_identity

# Elements of each base tensor that are hashed, evenly spread, besides the sum over all of them.
_SAMPLES = 256

_SUM_ELEMENTS = 2**24  # added up at a time: 128 MiB as int64

# Settings that choose which steps are evaluated and saved. They change no step.
_WATCHING = ("eval_every", "save_every", "keep", "keep_best", "early_stopping")
_WATCHING += ("sample_prompts", "sample_tokens")

# Whole numbers of the size of an element, to add up its bits.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def run_identity(run: Run, model: ModelState) -> dict[str, Any]:
    """Everything that two runs must share to be the same run, as JSON values.

    Evaluating and saving do not change a run. Device, torch's version and the recompute policy
    change it by rounding only, so users may change them. The keys are part of the file format.
    """
    lora, adapter = require_adapter(model)
    settings = {f.name: getattr(run.settings, f.name) for f in fields(run.settings)}
    # max_steps and num_epochs count by the number of steps that they lead to, which is below.
    # How many ranks have a row together changes a run by rounding only.
    for name in ("max_steps", "num_epochs", "context_parallel", *_WATCHING):
        del settings[name]
    settings["batch_size"] = run.rows  # the number of ranks changes a run by rounding only
    settings["max_grad_norm"] = run.settings.max_grad_norm or None  # 0 and None mean the same
    settings["lr_scheduler"] = schedule_identity(run.settings.lr_scheduler, run.steps)
    settings["loss"] = loss_identity(run.settings.loss)
    if not isinstance(run.settings.optimizer, str):
        settings["optimizer"] = optimizer_identity(run.settings.optimizer)
    for name in ("learning_rates", "lr_scheduler_kwargs"):  # an empty dict means the same as None
        settings[name] = dict(settings[name]) if settings[name] else None
    # With a constant rate and no warm-up, a step does not depend on the length of the run: such a
    # run may be extended.
    constant = run.settings.lr_scheduler == "constant" and not run.settings.warmup_ratio
    identity = settings | {
        "steps of the whole run": None if constant else run.steps,
        "hash of the training data": _hash_data(run),
        "hash of the base model": _hash_base(model),
        "base dtype": str(model.base["norm"].dtype),
        "base quantized to": quantized_to(model.base),
        "adapter dtypes": sorted({str(x.dtype) for x in tree_leaves(adapter)}),
        **_loss_identity(run, model),
        **_lora_identity(lora),
        **_config_identity(model),
    }
    return json.loads(json.dumps(identity))  # tuples become lists, as in the file


def _lora_identity(lora: LoraConfig) -> dict[str, Any]:
    """All settings of LoRA, and what they resolve to."""
    extras = lora.extras
    given = {f.name: getattr(lora, f.name) for f in fields(lora)}
    # What they resolve to is below, under names for people.
    del given["targets"], given["extras"]
    for name in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save"):
        if isinstance(given[name], tuple):  # their order means nothing
            given[name] = sorted(given[name])
    targets = {
        projection_path(i, t.name): {"r": t.r, "scaling": t.scaling}
        for i, layer in enumerate(lora.targets)
        for t in layer
    }
    edge_targets = (extras.embed_tokens, extras.lm_head)
    targets |= {t.name: {"r": t.r, "scaling": t.scaling} for t in edge_targets if t is not None}
    return given | {
        "tensors trained whole": [*extras.replaced],
        "trained rows": {module: [*ids] for module, ids in extras.tokens},
        "embedding and head tied": extras.tied or extras.shared_rows,
        **targets,
    }


def _loss_identity(run: Run, model: ModelState) -> dict[str, Any]:
    """Hashes of the other models that the loss depends on: DPO's reference, a teacher."""
    models = {} if run.objective is None else run.objective.models()
    hashes = {}
    for name, other in models.items():
        leaves = {str(i): x for i, x in enumerate(tree_leaves(other.adapter))}
        hashes[f"hash of the loss's {name}"] = _hash_tensors(leaves)
        if other.base is not model.base:  # else its hash is known
            hashes[f"hash of the loss's {name}'s base"] = _hash_base(other)
    return hashes


def _config_identity(model: ModelState) -> dict[str, Any]:
    """All fields of the model's config that this library reads: "config.rope_theta", ..."""
    config = asdict(model.spec.config)
    # The file's text may differ in what means nothing, such as transformers' version.
    del config["raw_json"], config["raw_generation_json"]
    # Fields that most families leave at their defaults are not in checkpoints of earlier versions.
    unused = {f.name for f in fields(model.spec.config) if config.get(f.name, ...) == f.default}
    config = {name: value for name, value in config.items() if name not in unused}
    rope = config.pop("rope_parameters")
    return {f"config.{name}": value for name, value in (config | rope).items()}


def check_same_run(
    heading: str, saved: Mapping[str, Any], present: Mapping[str, Any], cure: str
) -> None:
    """Raise a ValueError that lists every setting in which two identities differ."""
    if problems := differences(saved, present):
        raise_problems(ValueError, heading, problems, cure, shown=20)


def differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """One line for each setting in which two identities differ."""
    show = lambda settings, name: repr(settings[name]) if name in settings else "absent"
    # A setting that only one of the two has counts as None in the other.
    return [
        f"{name}: {show(saved, name)} there, {show(present, name)} now"
        for name in dict.fromkeys([*present, *saved])  # settings before the many projections
        if saved.get(name) != present.get(name)
    ]


def _hash_data(run: Run) -> str:
    """A hash of all sequences; of a stream, of its first block, with the sizes of its files."""
    if run.stream is None:
        return hash_sequences(run.sequences)
    assert run.stream.first is not None
    sizes = [file.stat().st_size for source in run.stream.sources for file in source.files]
    return f"{hash_sequences(run.stream.first)} and files of {sizes} bytes"


def hash_sequences(sequences: Iterable[Any]) -> str:
    """A fingerprint of encoded data: 16 hexadecimal digits of a SHA-256."""
    digest = hashlib.sha256()
    for sequence in sequences:
        for column in (getattr(sequence, field.name) for field in fields(sequence)):
            # The length first, so that two columns cannot be mistaken for one.
            digest.update(len(column).to_bytes(8, "little") + column.tobytes())
    return digest.hexdigest()[:16]


def hash_adapter(model: ModelState) -> str:
    """A fingerprint of all bytes of an adapter: 16 hexadecimal digits of a SHA-256."""
    _, adapter = require_adapter(model)
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(adapter).items()):
        digest.update(repr((name, tuple(leaf.shape), str(leaf.dtype))).encode())
        digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _hash_base(model: ModelState) -> str:
    """A hash of the sum over the bits of every tensor, and of samples spread over each.

    A change of any one element changes the sum. Takes milliseconds on a GPU, and on a CPU a few
    seconds for an 8B model.
    """
    base = self_contained(model, unpark=False).base
    return _hash_tensors(tensors_from_base(model.spec.config, base))


def _hash_tensors(tensors: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    # The order of the names, not of the tree: two trees of the same tensors are the same base.
    for name, weight in sorted(tensors.items(), key=operator.itemgetter(0)):
        for leaf in tree_leaves(weight):
            digest.update(repr((name, tuple(leaf.shape), str(leaf.dtype))).encode())
            digest.update(_summary(leaf).numpy().tobytes())
    return digest.hexdigest()[:16]


def _summary(x: Tensor) -> Tensor:
    """The sum over the bits of all elements, and samples, as int64 on the CPU."""
    bits = (x.to(torch.uint8) if x.dtype == torch.bool else x).detach().reshape(-1)
    bits = bits.view(_INTEGERS[bits.dtype.itemsize])
    if not len(bits):
        return torch.zeros(1, dtype=torch.int64, device="cpu")
    # To the CPU one by one: parked originals are there already, the other tensors on the GPU.
    last, n = len(bits) - 1, min(_SAMPLES, len(bits))
    at = torch.linspace(0, last, n, dtype=torch.float64, device="cpu").long()
    samples = bits[at.to(bits.device)].long()
    # In parts, because sum() makes an int64 copy of what it adds up.
    parts = torch.stack([part.sum(dtype=torch.int64) for part in bits.split(_SUM_ELEMENTS)])
    return torch.cat([parts.sum()[None], samples]).cpu()
