"""Compiled regions: the number of graphs, and when a new one is made."""

import itertools
import logging
from collections import namedtuple
from functools import cache
from typing import Any, ClassVar
from uuid import uuid4

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map

from fastlora import functional as FL
from fastlora import value_and_grad
from fastlora.model import Model
from fastlora.models.levels import layer_levels
from fastlora.runtime import compiled
from fastlora.runtime.compiled import compiles
from oracles.pairs import adapted, read_pair
from oracles.trees import relative_error, token_ids

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def batch_of(b: int, t: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = token_ids(b, t, vocab_size=96)
    return {"input_ids": ids, "labels": ids, **more}


def step(model: Model, batch: dict[str, torch.Tensor], seed: int | None = None) -> torch.Tensor:
    return value_and_grad(FL.loss)(model.adapter, model.base, model.spec, batch, seed=seed)[0]


@pytest.fixture(scope="session")
def deep(tmp_path_factory):
    """deep(n): n layers of llama2 with LoRA, compiled."""

    @cache
    def base(n: int) -> Model:
        return read_pair("llama2", tmp_path_factory.mktemp("deep"), num_hidden_layers=n).model

    def of(n: int, **settings: Any) -> Model:
        settings = {"r": 4, "lora_dropout": 0.1} | settings
        return adapted(base(n), **settings).with_spec(compile=True)

    return of


def facts(**changes: Any) -> tuple:
    """The facts of a small tree with some of its arguments changed."""
    tree = {"w": torch.ones(3, 4), "lora": (torch.ones(2, 4), torch.ones(3, 2)), "mask": None}
    tree |= changes
    return compiled._facts((tree.pop("x", torch.ones(2, 4)), tree))


PAIR = torch.ones(2, 4), torch.ones(3, 2)
Named = namedtuple("Named", "a b")
CHANGES: dict[str, dict[str, Any]] = {
    "dtype": {"w": torch.ones(3, 4, dtype=torch.float64)},
    "device": {"x": torch.ones(2, 4, device="meta")},
    "gradient": {"w": torch.ones(3, 4, requires_grad=True)},
    "gradient of an inner leaf": {"lora": (PAIR[0], PAIR[1].clone().requires_grad_())},
    "gradient of another inner leaf": {"lora": (PAIR[0].clone().requires_grad_(), PAIR[1])},
    "class of a tensor": {"w": torch.nn.Parameter(torch.ones(3, 4), requires_grad=False)},
    "class of a tuple": {"lora": Named(*PAIR)},
    "list": {"lora": [*PAIR]},
    "length": {"lora": (*PAIR, torch.ones(3))},
    "another key": {"bias": torch.ones(3)},
    "presence": {"mask": torch.ones(3, 4)},
    "absence": {"w": None},
    "a first size of 1": {"lora": (torch.ones(1, 4), PAIR[1])},
    "a second size of 1": {"lora": (torch.ones(2, 1), PAIR[1])},
    "dimensions": {"w": torch.ones(3, 4, 2)},
    "layout": {"w": torch.ones(4, 3).t()},
    "one tensor twice": {"lora": (PAIR[0], PAIR[0])},
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_key_of_a_region_knows_what_dynamo_guards_on(name):
    others = [facts(), *(facts(**changes) for n, changes in CHANGES.items() if n != name)]
    assert facts(**CHANGES[name]) == facts(**CHANGES[name])
    assert facts(**CHANGES[name]) not in others


def test_sizes_are_not_in_the_key_of_a_region():
    assert facts(w=torch.ones(7, 9), lora=(torch.ones(5, 9), torch.ones(7, 5))) == facts()


def test_torchs_modes_are_in_the_key_of_a_region():
    modes = [compiled._modes("cpu")]
    for mode in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.autocast("cpu", torch.float16),
    ):
        with mode:
            modes.append(compiled._modes("cpu"))
    assert len({*modes}) == len(modes)


def scaled_sum(x: torch.Tensor, tree: dict[str, torch.Tensor]) -> torch.Tensor:
    return x + sum(tree[name].square().sum() for name in tree)


@pytest.mark.compile
def test_any_set_of_trained_leaves_is_compiled(graphs):
    """Of 5 leaves, all 32 subsets."""
    for trained in itertools.product((False, True), repeat=5):
        tree = {str(i): torch.ones(2, requires_grad=t) for i, t in enumerate(trained)}
        y = compiled.compiled(scaled_sum, (torch.zeros(3), tree))
        assert y.tolist() == [10.0] * 3 and y.requires_grad == any(trained)
    assert len(graphs) == 32


@pytest.mark.compile
def test_sizes_that_change_one_by_one_do_not_reach_dynamos_limit(graphs):
    """Each of 12 sizes that changes for the first time makes one more graph, beyond the limit of
    8 of one code object."""
    sizes = {str(i): 4 for i in range(12)}
    for name in sizes:
        sizes[name] = 6 + int(name)
        tree = {k: torch.ones(n) for k, n in sizes.items()}
        y = compiled.compiled(scaled_sum, (torch.zeros(3), tree))
        assert y.tolist() == [float(sum(sizes.values()))] * 3
    assert 8 < len(graphs) <= 12


def test_auto_compiles_on_cuda_only():
    assert compiles("auto", CUDA) and not compiles("auto", CPU)
    for device in (CPU, CUDA):
        assert compiles(True, device) and not compiles(False, device)


@pytest.mark.compile
def test_more_layers_make_no_more_graphs(deep, graphs):
    counts = []
    for n in (2, 4):
        before = len(graphs)
        step(deep(n), batch_of(2, 8))
        counts.append(len(graphs) - before)
    # decoder layer, final norm, loss chunk; four layers need nothing that two did not make.
    assert counts == [3, 0]


@pytest.mark.compile
def test_layers_that_differ_get_separate_graphs(deep, graphs):
    step(deep(4, layers_to_transform=[1, 3]), batch_of(2, 8))
    # adapted layers, plain ones before the first gradient, plain ones after, norm, loss chunk
    assert len(graphs) == 5


@pytest.mark.compile
@pytest.mark.parametrize("vary", ["length", "batch", "both"])
def test_new_shapes_recompile_at_most_once(vary, deep, graphs):
    model = deep(2)
    shape = {
        "length": lambda k: (2, 8 + 3 * k),
        "batch": lambda k: (2 + k, 8),
        "both": lambda k: (2 + k, 8 + 3 * k),
    }[vary]
    counts = []
    for k in range(6):
        batch = batch_of(*shape(k))
        value = step(model, batch)
        torch.testing.assert_close(value, step(model.with_spec(compile=False), batch))
        counts.append(len(graphs))
    regions = counts[0]
    assert counts[1] <= 2 * regions and counts[-1] == counts[1]


@pytest.mark.compile
def test_no_mix_of_batches_reaches_dynamos_limit(deep, graphs):
    """Dropout on and off, packed and padded or not, batches of 1, 2 and 3 in one process."""
    model = deep(2)
    for b, t, mask, seed in itertools.product(
        (2, 3, 1), (8, 9, 11), (None, "pad", "pack"), (None, 1)
    ):
        batch = batch_of(b, t)
        if mask == "pad":
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if mask == "pack":
            batch["segment_ids"] = (torch.arange(t) > 5).long().expand(b, t)
        step(model, batch, seed)
        model.loss(batch)
    made = len(graphs)
    step(model, batch_of(3, 11), 1)
    assert len(graphs) == made


@pytest.mark.compile
def test_many_models_share_a_process(deep, graphs):
    for r in range(1, 6):
        for dtype in (torch.float32, torch.bfloat16):
            model = deep(2, r=r, target_modules=["q_proj", "up_proj"][: 1 + r % 2])
            base = tree_map(lambda x, d=dtype: x.to(d), model.base)
            value, _ = value_and_grad(FL.loss)(model.adapter, base, model.spec, batch_of(2, 8 + r))
            assert value.isfinite()


@pytest.mark.compile
def test_inference_is_compiled_without_a_backward(deep, graphs):
    model, ids = deep(2), token_ids(2, 8, vocab_size=96)
    torch.testing.assert_close(model(ids), model.with_spec(compile=False)(ids))
    assert graphs and not model(ids).requires_grad


@pytest.mark.compile
def test_inside_the_callers_torch_compile_regions_are_plain_functions(deep, graphs, fresh_dynamo):
    """The caller's torch.compile gets one graph for everything, without our regions."""
    model, batch = deep(2), batch_of(2, 8)
    outer: list[Any] = []

    def keep(module: Any, _: Any) -> Any:
        outer.append(module)
        return module.forward

    loss = torch.compile(
        lambda adapter: FL.loss(adapter, model.base, model.spec, batch),
        fullgraph=True,
        backend=keep,
    )
    torch.testing.assert_close(loss(model.adapter), step(model.with_spec(compile=False), batch))
    assert len(outer) == 1 and not graphs


@pytest.mark.compile
def test_torch_func_over_a_compiled_spec_takes_the_reference(deep, graphs):
    model, batch = deep(2), batch_of(2, 8)
    grads = torch.func.grad(FL.loss)(model.adapter, model.base, model.spec, batch)
    assert not graphs
    expected = value_and_grad(FL.loss)(
        model.adapter, model.base, model.with_spec(compile=False).spec, batch
    )[1]
    assert relative_error(grads, expected) <= 1e-4


@pytest.mark.compile
def test_models_that_differ_in_a_float_compile_side_by_side(tmp_path, region_backend):
    region_backend("aot_eager")
    ids = token_ids(2, 9)
    batch = {"input_ids": ids, "labels": ids}
    for eps in (1e-5, 1e-6):
        model = read_pair("llama2", tmp_path / str(eps), rms_norm_eps=eps).model
        model = adapted(model, r=2, recompute=0.4)
        assert "mlp" in layer_levels(model.spec.config, 0.4)  # one checkpoint inside another
        run = lambda m: value_and_grad(FL.loss)(m.adapter, m.base, m.spec, batch)
        assert relative_error(run(model.with_spec(compile=True)), run(model)) < 1e-5


@pytest.mark.compile
def test_cached_graphs_are_used_only_with_the_same_source_of_our_ops(monkeypatch, fresh_dynamo):
    """A graph contains only an op's name, so the cache key must contain the source of the ops."""

    def compile(source: str) -> dict[str, int]:
        monkeypatch.setattr(compiled, "_source_of_ops", lambda: source)
        torch._dynamo.reset()
        counters.clear()
        torch.compile(lambda x: x.sin() + 2, backend=compiled.backend)(torch.ones(3))
        return {k: n for k, n in counters["aot_autograd"].items() if k.endswith(("hit", "miss"))}

    before = torch.compiler.config.cache_key_tag
    one, other = str(uuid4()), str(uuid4())
    assert compile(one) == {"autograd_cache_miss": 1}
    assert compile(one) == {"autograd_cache_hit": 1}
    assert compile(other) == {"autograd_cache_miss": 1}
    assert torch.compiler.config.cache_key_tag == before


@pytest.mark.compile
def test_inductors_settings_hold_for_the_backward_graph_and_only_while_it_compiles(fresh_dynamo):
    """Inductor compiles it in the first backward pass. A pass of the user's runs as before.

    The tag is part of the key of a kernel's best tile, which compiler processes use without ours.
    """
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    def settings() -> tuple[Any, ...]:
        tag = torch.compiler.config.cache_key_tag
        return config.dynamic_scale_rblock, "fastlora.ops" in config.aot_inductor.metadata, tag

    class Users(CustomGraphPass):
        seen: ClassVar[list[tuple[Any, ...]]] = []

        def __call__(self, graph: torch.fx.Graph) -> None:
            self.seen.append(settings())

        def uuid(self) -> str:
            return str(uuid4())

    before = settings()
    assert not before[1]
    with config.patch(post_grad_custom_post_pass=Users()):
        x = torch.ones(3, requires_grad=True)
        y = torch.compile(lambda x: x.sin() + 2, backend=compiled.backend)(x)
        assert settings() == before
        y.sum().backward()
    assert Users.seen == [(False, True, before[2])] * 2 and settings() == before


def test_the_cache_key_changes_with_a_file_in_a_sub_folder(tmp_path):
    """A graph that was compiled before a kernel changed must not be used after it."""
    nested = tmp_path / "attention" / "flash_kernel.py"
    nested.parent.mkdir()
    nested.write_text("BLOCK = 64")
    key = lambda: compiled._source_of_ops.__wrapped__(tmp_path)
    before = key()
    assert key() == before
    nested.write_text("BLOCK = 128")
    assert key() != before


@pytest.mark.compile
def test_torch_gives_no_advice_about_our_checkpoints(deep, fresh_dynamo, caplog):
    """Nor does a filter stay on torch's logger."""
    logger = logging.getLogger("torch._higher_order_ops.wrap")
    torch._logging.warning_once.cache_clear()
    logger.addHandler(caplog.handler)  # torch's loggers do not propagate
    filters = [*logger.filters]
    with torch._functorch.config.patch(enable_autograd_cache=False):  # a hit traces nothing
        step(deep(1).with_spec(recompute="selective"), batch_of(2, 11))
    logger.removeHandler(caplog.handler)
    assert not [x for x in caplog.records if x.name == logger.name]
    assert logger.filters == filters
