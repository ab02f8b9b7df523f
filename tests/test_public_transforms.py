"""Every public function under grad, vmap, jvp, linearize and compile: one table.

A function is in one of three groups. VALUES: it is a function of tensors, and each transform gives
what plain calls and finite differences give. REFUSED: it works on models, files or data, and says
by name that no transform may be active. CONSTANT: its arguments are not tensors to differentiate,
and it returns the same as outside. A public function that is in no group fails the first test.
"""

import ast
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp, linearize, vmap
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL
from fastlora import losses, research
from fastlora.model import Model
from oracles.batches import batch_of

grad = torch.func.grad
BATCH = batch_of(2, 6)
IDS, LABELS = BATCH["input_ids"], BATCH["labels"]
LOGPS = -torch.rand(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASK = torch.tensor([[True, True, False]]).expand(4, 3)


def public() -> set[str]:
    """ "fastlora.lora", "functional.loss", "losses.dpo", ...; modules are not functions."""
    module = ast.parse(inspect.getsource(FL))
    kept = {  # `from ... import stack as stack`
        a.asname
        for node in module.body
        if isinstance(node, ast.ImportFrom)
        for a in node.names
        if a.asname == a.name
    }
    own = {n.name for n in module.body if isinstance(n, ast.FunctionDef) if n.name[0] != "_"}
    named = {"fastlora": fastlora.__all__, "losses": losses.__all__, "research": research.__all__}
    names = {f"{module}.{name}" for module, names in named.items() for name in names}
    return (names - {"fastlora.functional", "fastlora.losses", "fastlora.research"}) | {
        f"functional.{name}" for name in own | kept
    }


# ── functions of tensors ──────────────────────────────────────────────────────────────────


def with_b(m: Model, b: Tensor) -> Any:
    """The adapter of a model of one layer with another B of v_proj."""
    (layer,) = m.adapter["layers"]
    return {"layers": (layer | {"v_proj": layer["v_proj"]._replace(b=b)},)}


def flat(tree: Any) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tree_leaves(tree)])


def args(m: Model, b: Tensor) -> tuple:
    return with_b(m, b), m.base, m.spec


def loss(m: Model) -> Callable[[Any], Tensor]:
    return lambda a: FL.loss(a, m.base, m.spec, BATCH)


def teacher(m: Model) -> Model:
    # Not random: torch.func.linearize would draw again for every product.
    return replace(m, adapter=tree_map(lambda x: -0.5 * x, m.adapter))


def twice(m: Model, b: Tensor) -> Any:
    """A stack of two adapters."""
    return tree_map(lambda x: torch.stack([x, 2 * x]), with_b(m, b))


def curved(tree: Any) -> Tensor:
    """A function with derivatives of all orders. tests/research has those of models."""
    return (tree["b"].sin() * LOGPS).sum().square()


DIRECTION = {"b": LOGPS.flip(0)}

# A function of (model, x). x is a B [8, 2], or log-probabilities [4, 3].
OF_ADAPTER: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "functional.forward": lambda m, x: FL.forward(*args(m, x), IDS)[..., :3],
    "functional.token_logprobs": lambda m, x: FL.token_logprobs(*args(m, x), IDS, LABELS),
    "functional.loss": lambda m, x: FL.loss(*args(m, x), BATCH, seed=3),
    "functional.loss_sum": lambda m, x: FL.loss_sum(*args(m, x), BATCH)[0],
    "functional.row_losses": lambda m, x: FL.row_losses(*args(m, x), BATCH)[0],
    "functional.stack": lambda m, x: flat(FL.stack([replace(m, adapter=with_b(m, x)), m])[0]),
    "functional.unstack": lambda m, x: flat(FL.unstack(twice(m, x), [m, m])[1]),
    "fastlora.value_and_grad": lambda m, x: flat(fastlora.value_and_grad(loss(m))(with_b(m, x))),
    "fastlora.Model": lambda m, x: replace(m, adapter=with_b(m, x)).loss(BATCH),
    "losses.row_logprobs": lambda m, x: losses.row_logprobs(*args(m, x), BATCH)[0],
    "losses.distill": lambda m, x: losses.distill(*args(m, x), BATCH, teacher(m))[0],
}
OF_LOGPS: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "losses.dpo": lambda m, x: losses.dpo(x[:, 0], x[:, 1], x[:, 2], LOGPS[:, 0]),
    "losses.orpo": lambda m, x: losses.orpo(x[:, 0], x[:, 1]),
    "losses.simpo": lambda m, x: losses.simpo(x[:, 0], x[:, 1]),
    "losses.kto": lambda m, x: losses.kto(x[:, 0], LOGPS[:, 1], MASK[0].new_tensor([1, 0, 1, 0])),
    "losses.dft": lambda m, x: losses.dft(x),
    "losses.grpo": lambda m, x: losses.grpo(x, LOGPS - 0.1, LOGPS[:, 0], MASK),
    "losses.group_advantages": lambda m, x: losses.group_advantages(x),
    "losses.divergence": lambda m, x: losses.divergence(x, LOGPS.flip(0)),
    "research.hvp": lambda m, x: research.hvp(curved, {"b": x})(DIRECTION)["b"],
    "research.ggnvp": lambda m, x: research.ggnvp(lambda a: a["b"].sin(), {"b": x})(DIRECTION)["b"],
    "research.sam_value_and_grad": lambda m, x: flat(
        research.sam_value_and_grad(curved, rho=0.3)({"b": x})
    ),
    "research.Laplace": lambda m, x: research.Laplace(
        mean={"b": x}, fisher={"b": x**2}, examples=1, prior_precision=2.0
    ).predict(lambda a: a["b"].sin(), samples=2),
    "research.ravel": lambda m, x: research.ravel({"a": x, "b": 2 * x}),
    "research.unravel": lambda m, x: research.unravel(x.reshape(-1), {"a": LOGPS})["a"],
}
VALUES = OF_ADAPTER | OF_LOGPS
# dft's p is a constant in its gradient, so a finite difference of its value is not the gradient.
STOPPED: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "losses.dft": lambda m, x: -LOGPS.exp() * x,
}


def start(name: str, m: Model) -> Tensor:
    return m.adapter["layers"][0]["v_proj"].b if name in OF_ADAPTER else LOGPS.clone()


def slope(fn: Callable[[Tensor], Tensor], x: Tensor, d: Tensor, step: float = 1e-4) -> Tensor:
    """Fourth-order central difference of plain calls."""
    at = lambda k: fn(x + k * step * d)
    return (at(-2) - at(2) + 8 * (at(1) - at(-1))) / (12 * step)


def near(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1e-3))


def numbers(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", VALUES)
def test_transforms_give_the_plain_values_and_slopes(name, shallow):
    fn, x = lambda x: VALUES[name](shallow, x), start(name, shallow)
    d = numbers(x.shape, 4)
    plain, other = fn(x), fn(x + 0.1 * d)
    moved = slope(lambda x: STOPPED.get(name, VALUES[name])(shallow, x), x, d)
    assert moved.abs().max() > 1e-6  # or nothing would be shown
    w = numbers(plain.shape, 5)
    assert near((grad(lambda x: (fn(x) * w).sum())(x) * d).sum(), (moved * w).sum())
    value, tangent = jvp(fn, (x,), (d,))
    assert near(value, plain) and near(tangent, moved)
    value, push = linearize(fn, x)
    assert near(value, plain) and near(push(d), moved)
    assert near(vmap(fn)(torch.stack([x, x + 0.1 * d])), torch.stack([plain, other]))


# What dynamo says of functions that it does not trace whole. It breaks the graph and runs them
# plainly, which fullgraph=True refuses.
BROKEN = {
    "functional.stack": "max",
    "functional.unstack": "TypedDict",
    "fastlora.value_and_grad": "torch.autograd.grad",
    "research.sam_value_and_grad": "torch.autograd.grad",
    "research.Laplace": "numpy",
}


@pytest.mark.compile
@pytest.mark.parametrize("name", VALUES)
def test_compiled_values_and_gradients_are_the_plain_ones(name, shallow, fresh_dynamo):
    if name == "fastlora.value_and_grad":  # a function of one tensor: a model takes 10 s
        fn = lambda x: flat(fastlora.value_and_grad(curved)({"b": x}))
        x = LOGPS.clone().requires_grad_()
    else:
        fn, x = lambda x: VALUES[name](shallow, x), start(name, shallow).clone().requires_grad_()
    plain = fn(x)
    w = numbers(plain.shape, 5)
    whole = name not in BROKEN
    if not whole:
        with pytest.raises(torch._dynamo.exc.Unsupported, match=BROKEN[name]):
            torch.compile(fn, fullgraph=True, backend="eager")(x)
        torch._dynamo.reset()
    if name == "research.Laplace":  # its linearised function does not survive a broken graph
        return
    found = torch.compile(fn, fullgraph=whole, backend="aot_eager" if whole else "eager")(x)
    assert near(found, plain)
    if plain.requires_grad:  # value_and_grad's result is detached
        (expected,) = torch.autograd.grad((plain * w).sum(), x)
        assert near(torch.autograd.grad((found * w).sum(), x)[0], expected)


# ── functions that refuse transforms ──────────────────────────────────────────────────────

REFUSED: dict[str, Callable[..., Any]] = {
    "fastlora.add_tokens": fastlora.add_tokens,
    "fastlora.combine": fastlora.combine,
    "fastlora.context_group": fastlora.context_group,
    "fastlora.find_learning_rate": fastlora.find_learning_rate,
    "fastlora.gathered": fastlora.gathered,
    "fastlora.generate_many": fastlora.generate_many,
    "fastlora.initialize": fastlora.initialize,
    "fastlora.load": fastlora.load,
    "fastlora.load_adapter": fastlora.load_adapter,
    "fastlora.lora": fastlora.lora,
    "fastlora.merge": fastlora.merge,
    "fastlora.quantize": fastlora.quantize,
    "fastlora.train": fastlora.train,
    "research.as_linear_operator": research.as_linear_operator,
    "research.fisher_diagonal": research.fisher_diagonal,
    "research.influence": research.influence,
    "research.laplace": research.laplace,
    "research.training_points": research.training_points,
}
METHODS: dict[str, Callable[[Model], Any]] = {
    "Model.generate": lambda m: m.generate(IDS, max_new_tokens=1),
    "Model.save_pretrained": lambda m: m.save_pretrained("never"),
    "Model.save_pretrained_merged": lambda m: m.save_pretrained_merged("never"),
}
ONE = torch.ones(1, dtype=torch.float64)
RUNS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda fn: grad(lambda x: fn(x).sum())(ONE),
    "vmap": lambda fn: vmap(fn)(ONE),
    "jvp": lambda fn: jvp(fn, (ONE,), (ONE,)),
    "linearize": lambda fn: linearize(fn, ONE),
}


# linearize calls the function plainly first, and then under forward mode, which jvp shows.
@pytest.mark.parametrize("run", ["grad", "vmap", "jvp"])
@pytest.mark.parametrize("name", [*REFUSED, *METHODS])
def test_a_verb_refuses_transforms_by_name(name, run, shallow):
    def transformed(x: Tensor) -> Tensor:
        if name in METHODS:
            METHODS[name](shallow)
        else:
            function = REFUSED[name]
            # Below the type hook; the refusal comes before all checks of arguments.
            function = getattr(function, "__wrapped__", function)
            required = inspect.signature(function).parameters.values()
            function(*[None for p in required if p.default is p.empty and p.kind != p.VAR_KEYWORD])
        return x

    with pytest.raises(RuntimeError, match=f"{name} cannot run inside a torch.func transform"):
        RUNS[run](transformed)


# ── functions of other things ─────────────────────────────────────────────────────────────

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
SIDES = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]


def pairs(tokenizer: Any) -> Any:
    return losses.encode_pairs([PAIR], tokenizer, max_seq_length=32)


# Functions of (model, tokenizer), whose results are compared as text.
CONSTANT: dict[str, Callable[[Model, Any], Any]] = {
    "fastlora.CheckpointError": lambda m, tokenizer: fastlora.CheckpointError("text"),
    "fastlora.History": lambda m, tokenizer: fastlora.History.of([]).losses,
    "fastlora.RateRange": lambda m, tokenizer: fastlora.RateRange.__name__,
    "fastlora.Sketch": lambda m, tokenizer: fastlora.Sketch(8, 1),
    "fastlora.Tokenizer": lambda m, tokenizer: tokenizer.encode("def f(x):"),
    "fastlora.disable": lambda m, tokenizer: fastlora.disable(m).adapter,
    "fastlora.plan": lambda m, tokenizer: fastlora.plan(
        m, batch_size=2, seq_length=8, memory="8GB"
    ),
    "functional.trained_labels": lambda m, tokenizer: FL.trained_labels(BATCH).tolist(),
    "research.TrainingPoint": lambda m, tokenizer: (
        research.TrainingPoint(adapter=m.adapter, learning_rate=0.1).step
    ),
    "losses.DFT": lambda m, tokenizer: losses.DFT(),
    "losses.DPO": lambda m, tokenizer: losses.DPO(beta=0.2),
    "losses.Distill": lambda m, tokenizer: losses.Distill(teacher=m).beta,
    "losses.KTO": lambda m, tokenizer: losses.KTO(beta=0.2),
    "losses.ORPO": lambda m, tokenizer: losses.ORPO(beta=0.2),
    "losses.Objective": lambda m, tokenizer: losses.Objective.__name__,
    "losses.SimPO": lambda m, tokenizer: losses.SimPO(beta=0.2),
    "losses.encode_labelled": lambda m, tokenizer: losses.encode_labelled(
        SIDES, tokenizer, max_seq_length=32
    ),
    "losses.encode_pairs": lambda m, tokenizer: pairs(tokenizer),
    "losses.preference_batches": lambda m, tokenizer: (
        next(losses.preference_batches(pairs(tokenizer), 1, seed=0))["input_ids"].shape
    ),
}


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    model, tokenizer = fastlora.load("demo", device="cpu")
    return fastlora.lora(model, r=2), tokenizer


@pytest.mark.parametrize("name", CONSTANT)
def test_a_function_of_other_things_returns_the_same(name, demo):
    expected = str(CONSTANT[name](*demo))

    def transformed(x: Tensor) -> Tensor:
        assert str(CONSTANT[name](*demo)) == expected
        return x

    for run in RUNS.values():
        run(transformed)


def test_every_public_function_is_in_one_group():
    groups = [VALUES, REFUSED, CONSTANT]
    assert set().union(*groups) == public()
    assert sum(map(len, groups)) == len(public())
