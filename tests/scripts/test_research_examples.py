"""scripts/examples/: the examples over fastlora.research draw their figures, with a few steps."""

import math

import hessian_spectrum
import laplace_calibration
import private_finetuning
import select_data


def test_influence_tells_right_replies_from_wrong_ones(quick):
    found = quick(select_data)
    assert found["auc"] > 0.7
    losses = {name: sum(x) / len(x) for name, x in found["losses"].items()}
    assert losses["most influence"] < min(losses["random"], found["before"])


def test_the_gauss_newton_matrix_has_no_negative_eigenvalue(quick):
    found = quick(hessian_spectrum)
    for own in (found["before"], found["after"]):
        assert min(own["gauss_newton"]) > 0
        assert own["hessian"] == sorted(own["hessian"])
    assert found["after"]["loss"] < found["before"]["loss"]


def test_a_posterior_is_fitted_and_its_prior_chosen(quick):
    found = quick(laplace_calibration)
    assert found["prior"] in laplace_calibration.PRIORS
    for own in (found["adapter"], found["posterior"]):
        assert 0 <= own["ece"] <= 1 and math.isfinite(own["nll"])


def test_private_runs_spend_less_with_more_noise(quick):
    found = quick(private_finetuning)
    little, much = (found["epsilon"][noise] for noise in private_finetuning.NOISES[1:])
    assert found["epsilon"][0.0] == math.inf and 0 < much < little < 8
    assert all(math.isfinite(loss) for loss in found["after"].values())
