"""The quick checks of shapes give jaxtyping's verdicts and bind the axes that it binds."""

from typing import Any

import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import AnnotationError, Bool, Float, Int, Num, Shaped, TypeCheckError
from jaxtyping import _array_types as arrays
from jaxtyping import _storage as storage
from torch import Tensor

from oracles import quick_checks

CHECKER = beartype(conf=BeartypeConf(is_pep484_tower=True))
DIMS = ["b", "t", "3", "_", "*n", "*n", "*m", "...", "#b", "#3", "*#n", "b+1"]
KINDS = [Float, Shaped, Shaped, Int, Bool, Num]
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@st.composite
def annotations(draw) -> Any:
    dims = draw(st.lists(st.sampled_from(DIMS), max_size=4))
    while sum(x[0] in "*." for x in dims) > 1:
        dims.remove(next(x for x in dims if x[0] in "*."))
    return draw(st.sampled_from(KINDS))[Tensor, " ".join(dims)]


values = st.builds(
    lambda dtype, sizes: torch.zeros(sizes, dtype=dtype),
    st.sampled_from(DTYPES),
    st.lists(st.sampled_from([2, 3, 1]), max_size=4),
) | st.sampled_from([None, 1.0, torch.nn.Parameter(torch.ones(2, 3))])


def verdicts(check: Any, pairs: list[tuple[Any, Any]]) -> list[Any]:
    """For each pair: isinstance or the error, and all axes that are bound then."""
    found = []
    storage.push_shape_memo({})
    try:
        for annotation, x in pairs:
            try:
                verdict = check(annotation, x)
            except (AnnotationError, AttributeError) as error:
                verdict = type(error)
            axes, variadic, _, _ = storage.get_shape_memo()
            found.append((verdict, dict(axes), dict(variadic)))
    finally:
        storage.pop_shape_memo()
    return found


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.tuples(annotations(), values), min_size=1, max_size=4))
def test_verdicts_and_bound_axes_are_jaxtypings(pairs):
    long = verdicts(quick_checks._long_instancecheck, pairs)
    assert verdicts(quick_checks.instancecheck, pairs) == long


def test_the_quick_way_decides_most_of_them():
    """Otherwise the law above would compare jaxtyping with itself."""
    for text in ("b t d", "*n d", "b ... 3", "_ t", ""):
        assert quick_checks.shape_of(Float[Tensor, text]) is not None
    installed = arrays._MetaAbstractArray.__instancecheck__ is quick_checks.instancecheck
    assert installed == quick_checks.hook_is_installed()


def product(
    x: Float[Tensor, "b d"], w: Float[Tensor, "f d"], *, scale: float = 1.0, wrong: Any = None
) -> Float[Tensor, "b f"]:
    return scale * x @ w.T if wrong is None else wrong


X, W = torch.ones(2, 3), torch.ones(4, 3)
CALLS: list[tuple[tuple, dict[str, Any]]] = [
    ((X, W), {}),
    ((X, W), {"scale": 2}),  # an integer where a float is declared
    ((X,), {"w": W}),
    ((X, W[:, :2]), {}),
    ((X, W.int()), {}),
    ((X, None), {}),
    ((X, W), {"scale": "2"}),
    ((X,), {}),
    ((X, W, W), {}),
    ((X, W), {"other": 1}),
    ((X, W), {"wrong": torch.ones(4, 2)}),
    ((X, W), {"wrong": torch.ones(2, 4, dtype=torch.int64)}),
    ((X, W), {"wrong": "no tensor"}),
]


def outcome(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    try:
        return function(*args, **kwargs).tolist()
    except TypeCheckError as error:
        return TypeCheckError, "product" in str(error), "b=2" in str(error)
    except TypeError as error:
        return TypeError, str(error)


@pytest.mark.parametrize("args, kwargs", CALLS)
def test_calls_end_as_with_jaxtyping(args, kwargs):
    long = quick_checks._long_jaxtyped(product, typechecker=CHECKER)
    quick = quick_checks.jaxtyped(product, typechecker=CHECKER)
    assert outcome(quick, args, kwargs) == outcome(long, args, kwargs)


def test_axes_of_a_call_end_with_it():
    quick = quick_checks.jaxtyped(product, typechecker=CHECKER)
    before = len(getattr(storage._shape_storage, "memo_stack", []))
    for rows in (1, 2, 3):
        assert quick(torch.ones(rows, 3), W).shape == (rows, 4)
        with pytest.raises(TypeCheckError):
            quick(torch.ones(rows, 2), W)
    assert len(storage._shape_storage.memo_stack) == before


def test_an_error_of_the_function_stays_what_it_is():
    def fail(x: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        quick_checks.jaxtyped(fail, typechecker=CHECKER)(torch.ones(2))


def test_hints_written_as_text_and_computed_axes_are_checked():
    def text(n: int, x: "Float[Tensor, 'b']") -> "Float[Tensor, '{n} b']":
        return x.expand(n + 1, -1)

    with pytest.raises(TypeCheckError):
        quick_checks.jaxtyped(text, typechecker=CHECKER)(1, torch.ones(2))
    with pytest.raises(TypeCheckError):
        quick_checks.jaxtyped(text, typechecker=CHECKER)(1, torch.ones(2, 2))
