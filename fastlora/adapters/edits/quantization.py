"""quantize(): a loaded base put into 4 bits."""

from dataclasses import replace

from fastlora.checkpoints.bnb_format import check_quantizable
from fastlora.models.init_offset import has_offset
from fastlora.models.names import base_from_tensors, projection_weights, tensors_from_base
from fastlora.models.params import is_quantized
from fastlora.models.state import StateT
from fastlora.ops.quant.bitsandbytes import quantize_4bit


def quantize(model: StateT) -> StateT:
    """The model with its projections in NF4 with double quantisation, as `load_in_4bit` has them.

    One matrix at a time, on the model's device (on the CPU some 40 ms for a million values). An
    adapter stays what it is, over a base that is rounded now. The given model is unchanged, and
    embedding, head and norms are shared with it; a base that is quantised already is itself.

    Raises:
        ValueError: for a mixture of experts, a base in float64, an adapter that counts from start
            factors ("pissa", ...), which belong to the base as it was, or one with a qat_scheme.
        ModuleNotFoundError: without bitsandbytes.
    """
    if is_quantized(model.base):
        return model
    config = model.spec.config
    if has_offset(model.base):
        raise ValueError(
            "the adapter counts from what its initialisation took out of the base; merge it first,"
            " or load the base with load_in_4bit=True and initialise there."
        )
    if model.spec.qat_scheme is not None:
        raise ValueError(
            f"qat_scheme={model.spec.qat_scheme!r} trains for another quantisation of this base;"
            " merge the adapter first."
        )
    check_quantizable(config, [model.base["norm"].dtype])
    tensors = tensors_from_base(config, model.base)
    packed = {name: quantize_4bit(tensors[name]) for name in projection_weights(config)}
    base = base_from_tensors(config, tensors | packed)
    return replace(model, base=base)
