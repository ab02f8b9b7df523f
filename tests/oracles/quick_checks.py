"""Makes jaxtyping's checks of arguments and results several times faster, with the same verdicts.

Under the import hook, tests of small shapes spend three quarters of their time in jaxtyping 0.3.11:
it binds every call to its signature with `inspect`, and copies four dicts for every array. Here a
check that passes takes a short way. A check that fails, or that the short way does not know, goes
to jaxtyping itself, which decides and writes the message.
tests/test_quick_checks.py compares the verdicts and the axes that they bind.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jaxtyping
import torch
from jaxtyping import _array_types as arrays
from jaxtyping import _decorator as decorator
from jaxtyping import _storage as storage
from jaxtyping._errors import AnnotationError, TypeCheckError
from jaxtyping._import_hook import _JaxtypingFinder

TENSORS = (torch.Tensor, torch.nn.Parameter)  # others, such as fake tensors, go the long way
DTYPES = frozenset(x for x in vars(torch).values() if isinstance(x, torch.dtype))


class Shape(NamedTuple):
    """The demands of an annotation such as Float[Tensor, "b *n d"]."""

    dtypes: frozenset[torch.dtype]
    before: tuple[str | int | None, ...]  # a name, a size, or None for any size
    variadic: str | None  # the name of the axes in the middle
    after: tuple[str | int | None, ...]
    has_variadic: bool


def shape_of(annotation: Any) -> Shape | None:
    """None for kinds that the short way does not know, such as "#n", "n+1" and arrays of NumPy."""
    if annotation.array_type is not torch.Tensor or annotation._skip_instancecheck:
        return None
    middle = annotation.index_variadic
    dims = [_dim(x) for x in annotation.dims]
    if _UNKNOWN in dims:
        return None
    dtypes = frozenset(x for x in DTYPES if _allows(annotation.dtypes, x))
    if middle is None:
        return Shape(dtypes, tuple(dims), None, (), False)
    return Shape(dtypes, tuple(dims[:middle]), dims[middle], tuple(dims[middle + 1 :]), True)


_UNKNOWN = object()


def _dim(dim: Any) -> Any:
    if dim is arrays._anonymous_dim or dim is arrays._anonymous_variadic_dim:
        return None
    if isinstance(dim, arrays._FixedDim) and not dim.broadcastable:
        return dim.size
    named = isinstance(dim, arrays._NamedDim | arrays._NamedVariadicDim)
    return dim.name if named and not dim.broadcastable and not dim.treepath else _UNKNOWN


def _allows(allowed: Any, dtype: torch.dtype) -> bool:
    name = str(dtype).removeprefix("torch.")
    return allowed is arrays._any_dtype or any(
        x == name if isinstance(x, str) else bool(x.match(name)) for x in allowed
    )


def fits(shape: Shape, x: torch.Tensor, axes: dict, variadic: dict) -> bool:
    """Whether the tensor fits. Its axes are bound only if it does."""
    if x.dtype not in shape.dtypes:
        return False
    sizes, known = x.shape, len(axes)
    if not shape.has_variadic:
        good = _binds(shape.before, sizes, axes)
    else:
        first, last = len(shape.before), len(sizes) - len(shape.after)
        good = first <= last and _binds(
            shape.before + shape.after, sizes[:first] + sizes[last:], axes
        )
        if good and shape.variadic is not None:
            middle = (False, sizes[first:last])
            good = variadic.setdefault(shape.variadic, middle) == middle
    while not good and len(axes) > known:
        axes.popitem()
    return good


def _binds(dims: tuple[str | int | None, ...], sizes: tuple[int, ...], axes: dict) -> bool:
    """Whether the sizes fit. Names that are not in `axes` yet are added to it."""
    if len(sizes) != len(dims):
        return False
    for dim, size in zip(dims, sizes):  # noqa: B905  (`strict` costs a tenth of a check)
        if dim is not None and size != (axes.setdefault(dim, size) if type(dim) is str else dim):
            return False
    return True


SHAPES: dict[Any, Shape | None] = {}
_long_instancecheck = arrays._MetaAbstractArray.__instancecheck__


def instancecheck(annotation: Any, x: Any) -> bool:
    """isinstance(x, annotation), for jaxtyping's annotations of arrays."""
    if type(x) in TENSORS:
        try:
            shape = SHAPES[annotation]
        except KeyError:
            shape = SHAPES[annotation] = shape_of(annotation)
        stack = getattr(storage._shape_storage, "memo_stack", None)
        if shape is not None and stack and fits(shape, x, stack[-1][0], stack[-1][1]):
            return True
    elif x is None and annotation.array_type is not Any:
        return annotation._skip_instancecheck
    return _long_instancecheck(annotation, x)


_long_jaxtyped = jaxtyping.jaxtyped


def jaxtyped(fn: Any = None, *, typechecker: Any = None) -> Any:
    """jaxtyping.jaxtyped; plain functions get a wrapper that binds no signature."""
    if fn is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if typechecker is None or not inspect.isfunction(fn) or getattr(fn, "__no_type_check__", False):
        return _long_jaxtyped(fn, typechecker=typechecker)
    signature = _with_hints(fn)
    if "{" in str(signature):  # axes that are computed from arguments
        return _long_jaxtyped(fn, typechecker=typechecker)
    return _checked(fn, signature, typechecker)


def _with_hints(fn: Callable) -> inspect.Signature:
    """The signature, with hints that are written as text evaluated."""
    given = inspect.signature(fn)

    def hint(x: Any) -> Any:
        return decorator._destring_annotation(x, fn.__globals__)

    parameters = [x.replace(annotation=hint(x.annotation)) for x in given.parameters.values()]
    returned = hint(given.return_annotation)
    return given.replace(parameters=parameters, return_annotation=returned)


def _checked(fn: Callable, signature: inspect.Signature, typechecker: Callable) -> Callable:
    named = fn.__name__, fn.__qualname__, fn.__module__
    of_arguments = signature.replace(return_annotation=Any)
    check_arguments = typechecker(
        decorator._make_fn_with_signature(*named, of_arguments, output=False)
    )
    check_result, output = decorator._make_fn_with_signature(*named, signature, output=True)
    check_result = typechecker(check_result)
    has_hint = signature.return_annotation is not inspect.Signature.empty

    @functools.wraps(fn)
    def checked(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        memos = storage.push_shape_memo({})
        try:
            try:
                check_arguments(*args, **kwargs)
            except AnnotationError:
                raise
            except Exception as error:  # noqa: BLE001
                _refuse_arguments(fn, of_arguments, typechecker, args, kwargs, memos, error)
            result = fn(*args, **kwargs)
            if has_hint:
                try:
                    check_result(*args, **kwargs, **{output: result})
                except AnnotationError:
                    raise
                except Exception as error:  # noqa: BLE001
                    _refuse_result(fn, signature, result, memos, error)
            return result
        finally:
            storage.pop_shape_memo()

    return checked


def _refuse_arguments(fn, signature, typechecker, args, kwargs, memos, error) -> None:
    bound = signature.bind(*args, **kwargs)  # Python's own TypeError, if the call is wrong
    bound.apply_defaults()
    try:
        decorator._get_problem_arg(
            signature, args, kwargs, bound.arguments, fn.__module__, typechecker
        )
    except TypeCheckError as problem:
        where = f"{fn.__module__}.{fn.__qualname__}"
        values = decorator._pformat(bound.arguments, short_self=True)
        raise TypeCheckError(
            f"Type-check error whilst checking the parameters of {where}.{problem}\n"
            f"Called with parameters: {values}\n{storage.shape_str(memos)}"
        ) from error


def _refuse_result(fn, signature, result, memos, error) -> None:
    hint = decorator._remove_typing(signature.return_annotation)
    raise TypeCheckError(
        f"Type-check error whilst checking the return value of {fn.__module__}.{fn.__qualname__}.\n"
        f"Actual value: {decorator._pformat(result, short_self=False)}\n"
        f"Expected type: {hint}.\n{storage.shape_str(memos)}"
    ) from error


def hook_is_installed() -> bool:
    """Whether pytest was called with --jaxtyping-packages."""
    return any(isinstance(x, _JaxtypingFinder) for x in sys.meta_path)


def install() -> None:
    """Replace jaxtyping's checks until the process ends. Call it before fastlora is imported."""
    arrays._MetaAbstractArray.__instancecheck__ = instancecheck
    jaxtyping.jaxtyped = decorator.jaxtyped = jaxtyped
