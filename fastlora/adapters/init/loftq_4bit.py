"""LoftQ over a base that is quantised already (Li et al. 2023, arXiv:2310.08659, one iteration).

With more iterations the base would be quantised anew, and would be another than the one in the file
that the adapter belongs to. Over a base in 16 bits LoftQ is one of factors.py's.
"""

from dataclasses import replace

import torch

from fastlora.adapters.init.from_weights import largest_directions
from fastlora.checkpoints.originals import original, source_folder
from fastlora.errors import CheckpointError
from fastlora.models.names import projection_path
from fastlora.models.params import Adapter, AdapterRecord, Base, DoRA
from fastlora.models.spec import Spec, Target
from fastlora.ops.linear.dora import row_norms
from fastlora.ops.quant.dequantize import dense


def filled_with_loss(spec: Spec, base: Base, adapter: Adapter) -> tuple[Spec, Adapter]:
    """LoftQ over a quantised base: A and B are what quantisation lost, as far as their rank goes.

    The base stays, and A and B count from it as it is, as with PEFT's replace_lora_weights_loftq.
    The matrices in 16 bits are read from where the base came from.

    Raises:
        FileNotFoundError: if they are not there.
        CheckpointError: if they are not those.
    """
    assert spec.lora is not None, spec
    try:
        whole = original(spec.config, source_folder(spec), base)
    except (FileNotFoundError, CheckpointError) as error:
        raise type(error)(
            f"init_lora_weights='loftq' needs the matrices in 16 bits: {error} Load that checkpoint"
            " from its folder with load_in_4bit=True."
        ) from error

    def filled(layer: int, t: Target, record: AdapterRecord) -> AdapterRecord:
        kept = base["layers"][layer][t.name]["weight"]
        matrix = whole(f"{projection_path(layer, t.name)}.weight", kept)
        lost = matrix.to(torch.float32) - dense(kept, torch.float32)
        a, b = (x.to(record.a) for x in largest_directions(lost, t.r, t.scaling))
        if isinstance(record, DoRA):
            norms = row_norms(dense(kept, base["norm"].dtype), a, b, t.scaling)
            return DoRA(a, b, norms.to(record.magnitude))
        return record._replace(a=a, b=b)

    layers = tuple(
        {t.name: filled(i, t, adapter["layers"][i][t.name]) for t in targets}
        for i, targets in enumerate(spec.lora.targets)
    )
    lora = replace(spec.lora, init_lora_weights=True)
    return replace(spec, lora=lora), Adapter(**adapter | {"layers": layers})
