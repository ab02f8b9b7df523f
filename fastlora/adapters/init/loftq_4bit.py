"""LoftQ over a base that is already quantised (Li et al. 2023, arXiv:2310.08659, one iteration).

More iterations would requantise the base, and it would no longer match the checkpoint that the
adapter is saved for. LoftQ over a base in 16 bits is in loftq.py.
"""

from dataclasses import replace

import torch

from fastlora.adapters.init.decompositions import low_rank_factors
from fastlora.checkpoints.unquantized import source_folder, unquantized_matrices
from fastlora.errors import CheckpointError
from fastlora.models.names import projection_path
from fastlora.models.params import Adapter, AdapterRecord, Base, DoRA
from fastlora.models.spec import Spec, Target
from fastlora.ops.linear.dora import row_norms
from fastlora.ops.quant.dequantize import dense


def fit_quantization_error(spec: Spec, base: Base, adapter: Adapter) -> tuple[Spec, Adapter]:
    """Set A and B to the best approximation, at their rank, of W - Q.

        base    {"layers": ({"q_proj": {"weight": Q in 4 or 8 bits}, ...}, ...)}
        adapter {"layers": ({"q_proj": (A, B)}, ...)}
    ->  adapter {"layers": ({"q_proj": (A1, B1)}, ...)}    scaling * B1 A1 ~ W - Q

    The base is unchanged, and the adapter has no initial offset, as after PEFT's
    replace_lora_weights_loftq. The 16-bit matrices W are read from the base's checkpoint.

    Raises:
        FileNotFoundError: the checkpoint is not available.
        CheckpointError: the checkpoint does not hold the matrices that were quantised.
    """
    assert spec.lora is not None, spec
    try:
        source = unquantized_matrices(spec.config, source_folder(spec), base)
    except (FileNotFoundError, CheckpointError) as error:
        raise type(error)(
            f"init_lora_weights='loftq' needs the matrices in 16 bits: {error} Load that checkpoint"
            ' from its folder with load_in_4bit=True or base_precision="fp8".'
        ) from error

    def fitted(layer: int, t: Target, record: AdapterRecord) -> AdapterRecord:
        quantised = base["layers"][layer][t.name]["weight"]
        matrix = source(f"{projection_path(layer, t.name)}.weight", quantised)
        # float32: the error is a small difference of two close matrices.
        error = matrix.to(torch.float32) - dense(quantised, torch.float32)
        a, b = (x.to(record.a) for x in low_rank_factors(error, t.r, t.scaling))
        if isinstance(record, DoRA):
            norms = row_norms(dense(quantised, base["norm"].dtype), a, b, t.scaling)
            return DoRA(a, b, norms.to(record.magnitude))
        return record._replace(a=a, b=b)

    layers = tuple(
        {t.name: fitted(i, t, adapter["layers"][i][t.name]) for t in targets}
        for i, targets in enumerate(spec.lora.targets)
    )
    # Saved as an ordinary adapter over the quantised checkpoint: no offset, the usual rank.
    lora = replace(spec.lora, init_lora_weights=True)
    return replace(spec, lora=lora), Adapter(**adapter | {"layers": layers})
