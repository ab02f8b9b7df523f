"""transforms_active and needs_reference: when an op runs its reference."""

import pytest
import torch

from fastlora.ops.dispatch import needs_reference, transforms_active

X = torch.ones(2)

TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f)(X),
    "vjp": lambda f: torch.func.vjp(f, X),
    "jvp": lambda f: torch.func.jvp(f, (X,), (X,)),
    "vmap": lambda f: torch.vmap(f)(X[None]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_active_inside_each_transform_only(name):
    seen = []

    def probe(x):
        seen.append(transforms_active())
        return x.sum()

    assert not transforms_active()
    TRANSFORMS[name](probe)
    assert seen == [True] and not transforms_active()


@pytest.mark.compile
@pytest.mark.parametrize("name", ["grad", "vmap"])
def test_compiled_code_sees_active_transforms(name, fresh_dynamo):
    probe = lambda x: (x * (3.0 if transforms_active() else 2.0)).sum()
    run = torch.compile(lambda: TRANSFORMS[name](probe), fullgraph=True, backend="eager")
    assert run().flatten()[0].item() == {"grad": 3.0, "vmap": 6.0}[name]


def test_frozen_argument_that_requires_a_gradient_needs_the_reference():
    assert not needs_reference(X, None)
    assert needs_reference(None, X.clone().requires_grad_())
