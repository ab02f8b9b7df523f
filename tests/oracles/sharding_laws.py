"""What two and four processes check of a sharded base. Each law returns a list of failures.

No law imports transformers, which takes each process four seconds.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL
from fastlora.checkpoints import tensors as tensors_file
from fastlora.distributed.leading import on_first_rank
from fastlora.distributed.mesh import world_size
from fastlora.model import Model
from fastlora.ops.quant.weights import Weight4bit, Weight8bit
from fastlora.runtime import compiled, layer_fetching
from oracles.trees import randomised, relative_error, same_bits, token_ids

IDS = token_ids(2, 12, vocab_size=90)
BATCH = {"input_ids": IDS, "labels": IDS}
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {},
    "NF4": {"load_in_4bit": True},
}
LORA = dict(r=2, lora_dropout=0.1)


def with_adapter(model: Model, **settings: Any) -> Model:
    """The model with LoRA whose A and B are random."""
    model = fastlora.lora(model, **LORA | settings)
    return model.with_adapter(randomised(model.adapter, 0))


def read(folder: Path, shard: Any, name: str = "llama_bias", **how: Any) -> Model:
    return fastlora.load(folder / name, device="cpu", shard=shard, **how)[0]


def pair(folder: Path, shard: Any = None, **how: Any) -> tuple[Model, Model]:
    """(whole, sharded), both adapted."""
    shard = world_size() if shard is None else shard
    whole, sharded = read(folder, None, **how), read(folder, shard, **how)
    return with_adapter(whole), with_adapter(sharded)


def step(model: Model, batch: Any = BATCH) -> Any:
    """(loss, gradients) with dropout."""
    loss = lambda a, base: FL.loss(a, base, model.spec, batch, seed=3)
    return fastlora.value_and_grad(loss)(model.adapter, model.base)


class Passes:
    """The passes that are made inside a `with`."""

    def __enter__(self) -> list[layer_fetching.LayerPass]:
        self.init, made = layer_fetching.LayerPass.__init__, []

        def spy(itself: Any, *args: Any, **more: Any) -> None:
            self.init(itself, *args, **more)
            made.append(itself)

        layer_fetching.LayerPass.__init__ = spy
        return made

    def __exit__(self, *error: object) -> None:
        layer_fetching.LayerPass.__init__ = self.init


def same_bits_at_every_level(folder: Path) -> list[str]:
    wrong = []
    for kind, how in KINDS.items():
        whole, sharded = pair(folder, **how)
        layers = whole.spec.config.num_hidden_layers
        for level in ("none", "selective", "full", 0.4)[: 4 if kind == "NF4" else 2]:
            with Passes() as made:
                got = step(sharded.with_spec(recompute=level))
            if not same_bits(got, step(whole.with_spec(recompute=level))):
                wrong.append(f"{kind} {level}: other bits")
            if (made[0].fetches, made[0].most) != (2 * layers - 1, 2):
                wrong.append(f"{kind} {level}: {made[0].fetches} fetches, {made[0].most} at once")
        if not same_bits(sharded(IDS), whole(IDS)):
            wrong.append(f"{kind}: other logits")
        if not same_bits(fastlora.gathered(sharded).base, whole.base):
            wrong.append(f"{kind}: gathered() gives other weights")
        kept = sharded.base["layers"].kept_bytes
        # Padding is a third of these tiny layers in NF4.
        if not kept < 0.7 * sum(x.nbytes for x in tree_leaves(whole.base["layers"])) + 12_000:
            wrong.append(f"{kind}: this rank keeps {kept} bytes")
    return wrong


def same_bits_and_no_new_graph_when_compiled(folder: Path) -> list[str]:
    compiled.backend = lambda graph, inputs: torch._dynamo.lookup_backend("aot_eager")(
        graph, inputs
    )
    wrong = []
    for kind in ("NF4",):
        whole, sharded = (m.with_spec(compile=True) for m in pair(folder, **KINDS[kind]))
        want = step(whole)
        graphs = compiled._region.cache_info().currsize
        with Passes() as made:
            got = step(sharded)
        if not same_bits(got, want):
            wrong.append(f"{kind}: other bits")
        if made[0].most > 2 or compiled._region.cache_info().currsize != graphs:
            wrong.append(f"{kind}: another graph, or {made[0].most} layers at once")
    return wrong


def torch_func_works(folder: Path) -> list[str]:
    whole, sharded = pair(folder, dtype="float32")
    one = lambda m: lambda a, i: FL.loss(a, m.base, m.spec, {"input_ids": i, "labels": i})
    each = lambda m: torch.vmap(torch.func.grad(one(m)), (None, 0))(m.adapter, IDS[:, None])
    ones = tree_map(torch.ones_like, whole.adapter)
    hessian = lambda m: torch.func.jvp(
        torch.func.grad(lambda a: one(m)(a, IDS)), (m.adapter,), (ones,)
    )[1]
    wrong = [] if relative_error(each(sharded), each(whole)) < 1e-6 else ["vmap(grad)"]
    return wrong + (
        [] if relative_error(hessian(sharded), hessian(whole)) < 1e-5 else ["jvp(grad)"]
    )


def generation_is_rank_0s(folder: Path) -> list[str]:
    whole, sharded = pair(folder, load_in_4bit=True)
    how = dict(max_new_tokens=4, eos_token_id=(), return_logprobs=True)
    ids, logp = sharded.generate(IDS[:, :5] + dist.get_rank(), **how)
    want = whole.generate(IDS[:, :5], **how)
    wrong = [] if same_bits((ids, logp), want) else ["other tokens"]
    sampled = sharded.generate(IDS[:, :5], max_new_tokens=4, temperature=1.0, eos_token_id=())
    every = [torch.empty_like(sampled) for _ in range(dist.get_world_size())]
    dist.all_gather(every, sampled)
    return wrong + ([] if torch.equal(every[0], every[-1]) else ["ranks have other samples"])


def merged_folders_have_the_same_bytes(folder: Path) -> list[str]:
    wrong = []
    for kind, method in (("bfloat16", "merged_16bit"), ("NF4", "merged_4bit")):
        whole, sharded = pair(folder, **KINDS[kind])
        mine, other = folder / f"{kind} sharded", folder / f"{kind} whole"
        report = sharded.save_pretrained_merged(mine, save_method=method)
        if dist.get_rank() == 0:
            if report != whole.save_pretrained_merged(other, save_method=method):
                wrong.append(f"{kind}: another report")
            names = {path.name for path in other.iterdir()}
            if names != {path.name for path in mine.iterdir()} or not all(
                (mine / name).read_bytes() == (other / name).read_bytes() for name in names
            ):
                wrong.append(f"{kind}: other files")
        dist.barrier()
        merged = fastlora.merge(sharded)
        if not same_bits(fastlora.gathered(merged).base, fastlora.merge(whole).base):
            wrong.append(f"{kind}: merge gives other weights")
        if merged.base["layers"].shards.ranks != dist.get_world_size():
            wrong.append(f"{kind}: the merged base is not sharded")
    return wrong


def an_error_of_rank_0_ends_all(folder: Path) -> list[str]:
    _, sharded = pair(folder)
    file = folder / "a file"
    if dist.get_rank() == 0:
        file.touch()
    dist.barrier()
    try:
        sharded.save_pretrained_merged(file / "inside")
    except (RuntimeError, OSError, ValueError) as error:
        named = dist.get_rank() == 0 or "rank 0 could not do this" in str(error)
        return [] if named else [f"{type(error).__name__}: {error}"]
    return ["no error"]


def ctrl_c_on_rank_0_ends_all(folder: Path) -> list[str]:
    _, sharded = pair(folder)

    def work() -> int:
        raise KeyboardInterrupt

    try:
        found = on_first_rank(sharded.base, work)
    except KeyboardInterrupt:
        return [] if dist.get_rank() == 0 else ["it was raised on another rank"]
    except RuntimeError as error:
        return [] if "rank 0 could not do this: KeyboardInterrupt" in str(error) else [str(error)]
    return [f"no error, but the result {found}"]


def adapters_that_read_weights(folder: Path) -> list[str]:
    wrong = []
    shard = dist.get_world_size()
    bases = [read(folder, s, dtype="float32") for s in (None, shard)]
    for settings in (
        dict(use_dora=True),
        dict(init_lora_weights="pissa"),
        dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
        dict(modules_to_save=["lm_head"]),
        dict(trainable_token_indices=[3, 4]),
    ):
        whole, sharded = (fastlora.lora(m, r=2, **settings) for m in bases)
        if not same_bits(step(sharded), step(whole)):
            wrong.append(f"{settings}: other bits")
    whole, sharded = (fastlora.initialize(fastlora.lora(m, r=2), [BATCH], "corda") for m in bases)
    return wrong if same_bits(step(sharded), step(whole)) else [*wrong, "corda: other bits"]


def each_rank_reads_only_its_bytes(folder: Path) -> list[str]:
    reads: list[int] = []
    real = tensors_file.RowReader.rows

    def rows(self: Any, *args: Any) -> Tensor:
        found = real(self, *args)
        reads.append(found.nbytes)
        return found

    tensors_file.RowReader.rows = rows
    whole: list[str] = []
    entries = tensors_file.entry_tensors

    def spy(given: Any, **more: Any) -> Any:
        whole.extend(given)
        return entries(given, **more)

    tensors_file.entry_tensors = spy
    try:
        sharded = read(folder, dist.get_world_size())
    finally:
        tensors_file.RowReader.rows, tensors_file.entry_tensors = real, entries
    base = fastlora.gathered(sharded).base
    total = sum(x.nbytes for x in tree_leaves(base)) - base["norm"].nbytes
    wrong = [] if [name for name in whole] == ["model.norm.weight"] else [f"read whole: {whole}"]
    # Rows at the border of two parts are read by both.
    allowed = total / dist.get_world_size() + 2 * 3 * 64 * len(base["layers"]) * 8
    return wrong if sum(reads) <= allowed else [*wrong, f"{sum(reads)} of {total} bytes read"]


def quantized_folders_are_read(folder: Path) -> list[str]:
    """In bitsandbytes' formats, of which each rank reads its rows."""
    wrong, kinds = [], {"int8": Weight8bit, "NF4 sharded": Weight4bit}  # the second is a merged one
    for name, kind in kinds.items():
        whole, sharded = (read(folder, s, name) for s in (None, dist.get_world_size()))
        if type(whole.base["layers"][0]["q_proj"]["weight"]) is not kind:
            wrong.append(f"{name}: not quantised")
        if not same_bits(fastlora.gathered(sharded).base, whole.base):
            wrong.append(f"{name}: other weights")
    return wrong


def refusals(folder: Path) -> list[str]:
    wrong = []
    world = dist.get_world_size()
    sharded = read(folder, world)
    adapted = with_adapter(sharded)
    graphed = fastlora.value_and_grad(
        lambda a, base: FL.loss(a, base, adapted.spec, BATCH), cuda_graph=True
    )
    for call, words in (
        (lambda: read(folder, world + 1), "do not divide"),
        (lambda: read(folder, "gpu"), "shard='gpu'"),
        (lambda: read(folder, world, "mixtral"), "mixture of experts"),
        (lambda: fastlora.lora(sharded, qat_scheme="int8"), "qat_scheme"),
        (lambda: fastlora.lora(sharded, bias="all"), "sharded layer"),
        (lambda: fastlora.quantize(sharded), "load_in_4bit"),
        (lambda: sharded.to("meta"), "gathered"),
        (lambda: graphed(adapted.adapter, adapted.base), "cannot be recorded"),
        (lambda: fastlora.generate_many(sharded, [[1, 2]]), "not supported"),
    ):
        try:
            call()
            wrong.append(f"{words}: accepted")
        except ValueError as error:
            if words not in str(error):
                wrong.append(f"{words}: {error}")
    return wrong


def not_a_number_on_one_rank_ends_all(folder: Path) -> list[str]:
    """Matrix 1 is dealt to rank 1."""
    try:
        read(folder, dist.get_world_size(), "broken", load_in_4bit=True)
    except fastlora.CheckpointError as error:
        return [] if "k_proj" in str(error) else [str(error)]
    return ["no error"]


TWO = {
    law.__name__: law
    for law in (
        same_bits_at_every_level,
        same_bits_and_no_new_graph_when_compiled,
        torch_func_works,
        generation_is_rank_0s,
        merged_folders_have_the_same_bytes,
        an_error_of_rank_0_ends_all,
        ctrl_c_on_rank_0_ends_all,
        adapters_that_read_weights,
        each_rank_reads_only_its_bytes,
        quantized_folders_are_read,
        refusals,
        not_a_number_on_one_rank_ends_all,
    )
}


def hybrid_meshes(folder: Path) -> list[str]:
    """Two groups of two ranks, each rank with a row of other length, and rank 0's four rows."""
    from torch.distributed.device_mesh import init_device_mesh

    wrong = []
    rows = token_ids(4, 12, vocab_size=90)
    labels = rows.clone()
    labels[1, :5] = -100
    labels[3, :9] = -100
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    rank, count = dist.get_rank(), (labels[:, 1:] != -100).sum()
    for shard in (2, mesh):
        whole, sharded = pair(folder, shard, dtype="float32")
        if sharded.base["layers"].shards.ranks != 2:
            wrong.append(f"{shard}: not two ranks")

        def summed(m: Model, ids: Tensor, to: Tensor) -> Any:
            batch = {"input_ids": ids, "labels": to}
            loss = lambda a: FL.loss_sum(a, m.base, m.spec, batch)[0] / count
            return fastlora.value_and_grad(loss)(m.adapter)

        part = slice(rank, rank + 1)
        got = tree_map(torch.clone, summed(sharded, rows[part], labels[part]))
        for leaf in tree_leaves(got):
            dist.all_reduce(leaf)
        if not relative_error(got, summed(whole, rows, labels)) < 2e-5:
            wrong.append(f"{shard}: other gradients")
    return wrong


def every_value_of_shard(folder: Path) -> list[str]:
    """4 ranks that keep 4, 4, 4 and 1 parts."""
    from torch.distributed.device_mesh import init_device_mesh

    whole = with_adapter(read(folder, None))
    want, wrong = step(whole), []
    one = init_device_mesh("cpu", (4, 1), mesh_dim_names=("replicate", "shard"))
    for shard, ranks in (("auto", 4), ("node", 4), ("host", 4), (one, 1)):
        sharded = with_adapter(read(folder, shard))
        if sharded.base["layers"].shards.ranks != ranks or not same_bits(step(sharded), want):
            wrong.append(f"{shard}: other bits, or not {ranks} parts")
    if type(read(folder, 1).base["layers"]) is not tuple:
        wrong.append("groups of one rank do not keep the base as shard=None does")
    return wrong


def dtensors(folder: Path) -> list[str]:
    """The bytes as DTensors: the full tensor is what a rank gathers."""
    from torch.distributed.device_mesh import init_device_mesh

    layers = read(folder, 4).base["layers"]
    mesh = init_device_mesh("cpu", (4,))
    (first, *_), flat = layers.as_dtensors(mesh), layers.begin(0).wait()
    return [] if torch.equal(first.full_tensor(), flat) else ["other bytes"]


FOUR = {law.__name__: law for law in (hybrid_meshes, every_value_of_shard, dtensors)}
