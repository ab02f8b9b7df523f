"""Number of parameters of a model, counted as PEFT's `print_trainable_parameters` counts."""

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlora.models.names import tensors_from_base
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import LoraConfig
from fastlora.models.state import ModelState
from fastlora.ops.quant.weights import numel
from fastlora.runtime.layer_fetching import described


def count_parameters(model: ModelState) -> tuple[int, int]:
    """(parameters of the adapter, parameters of base and adapter together).

    A quantised matrix counts the elements of the matrix that it approximates. The frozen factors of
    an initial offset do not count.
    """
    adapter = model.adapter
    trainable = sum(x.numel() for x in tree_leaves(adapter) if isinstance(x, Tensor))
    copies = {} if adapter is None else adapter.get("replaced", {})
    # PEFT trains a bias in place, but a copy of any other tensor next to the original.
    lora = model.spec.lora
    in_place = sum(x.numel() for name, x in copies.items() if _is_trained_bias(name, lora))
    base = self_contained(model, unpark=False).base
    tensors = tensors_from_base(model.spec.config, described(base)).values()
    return trainable, trainable - in_place + sum(numel(x) for x in tensors)


def parameter_line(model: ModelState) -> str:
    """PEFT's line: trainable parameters, all parameters, and their ratio."""
    trainable, total = count_parameters(model)
    return (
        f"trainable params: {trainable:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trainable / total:.4f}"
    )


def _is_trained_bias(name: str, lora: LoraConfig | None) -> bool:
    """Whether a copy comes from the argument `bias` and not from modules_to_save."""
    module, _, leaf = name.rpartition(".")
    saved = lora is not None and any(module.endswith(n) for n in lora.modules_to_save)
    return leaf == "bias" and not saved
