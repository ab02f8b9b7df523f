"""quantize(): puts a loaded base into 4 bits."""

from dataclasses import replace

from fastlora.arguments import check_arguments
from fastlora.checkpoints.bnb_format import check_quantizable
from fastlora.errors import raise_problems
from fastlora.models.init_offset import has_offset
from fastlora.models.input_checks import MODEL
from fastlora.models.names import base_from_tensors, projection_weights, tensors_from_base
from fastlora.models.params import is_quantized
from fastlora.models.state import StateT
from fastlora.ops.dispatch import refuse_transforms
from fastlora.ops.quant.bitsandbytes import quantize_4bit
from fastlora.runtime.layer_fetching import is_sharded


def quantize(model: StateT) -> StateT:
    """The model with its projections in NF4 with double quantisation, as after `load_in_4bit`.

        base {"embed_tokens": E, "layers": ({"q_proj": {"weight": W in 16 bits}, ...}, ...), ...}
    ->  base {"embed_tokens": E, "layers": ({"q_proj": {"weight": W in NF4}, ...}, ...), ...}

    Matrices are quantised one at a time on the model's device (on the CPU, 40 ms per million
    values). The given model is unchanged; embedding, head and norms are shared with it. The adapter
    is unchanged too; only the base is rounded. A model that is already quantised is returned
    unchanged.

    Raises:
        ValueError: the model is a mixture of experts or in float64; its adapter has an initial
            offset ("pissa", ...), which belongs to the base before rounding; or it has a
            qat_scheme; or naming each matrix that holds NaN or infinity.
        ModuleNotFoundError: bitsandbytes is not installed.
    """
    refuse_transforms("fastlora.quantize")
    check_arguments("fastlora.quantize", model=(model, MODEL))
    if is_quantized(model.base):
        return model
    config = model.spec.config
    # A0 and B0 approximate a part of W and not of its rounded version.
    if has_offset(model.base):
        raise ValueError(
            "the model has an initial offset, which its initialisation took out of the base in 16"
            " bits; merge the adapter first, or load the base with load_in_4bit=True and call"
            " fastlora.lora on it."
        )
    if model.spec.qat_scheme is not None:
        raise ValueError(
            f"qat_scheme={model.spec.qat_scheme!r} trains for another quantisation of this base;"
            " merge the adapter first."
        )
    check_quantizable(config, [model.base["norm"].dtype])
    if is_sharded(model.base):
        raise ValueError(
            "a sharded base is not quantised after loading; load it with load_in_4bit=True, which"
            " deals the matrices to the ranks."
        )
    tensors = {**tensors_from_base(config, model.base)}
    names = projection_weights(config)
    # bitsandbytes would quantise them without an error.
    raise_problems(
        ValueError,
        "fastlora.quantize cannot quantise NaN or infinity, but these matrices hold some:",
        [name for name in names if not tensors[name].isfinite().all()],
        "Load the checkpoint again; if the model was merged, its adapter may have diverged.",
    )
    quantized = {name: quantize_4bit(tensors[name]) for name in names}
    return replace(model, base=base_from_tensors(config, tensors | quantized))
