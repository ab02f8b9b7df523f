"""scripts/examples/: examples that end in a figure draw it, and their claims hold in a few steps.

The figures of scripts/examples/README.md come from the full runs.
"""

import re
from pathlib import Path

import evolution
import figures
import hypernetwork
import linearised
import maml
import merge_coefficients
import mode_connectivity
import pytest
import rank_curve
import sweep

EXAMPLES = Path(figures.__file__).parent
SCRIPTS = sorted(p for p in EXAMPLES.glob("*.py") if "\n    fig.run(main)\n" in p.read_text())


def test_higher_ranks_memorise_more(quick):
    losses = quick(rank_curve)["final_losses"]
    assert losses[-1] < 0.9 * losses[0]


def test_halving_keeps_a_good_run_for_fewer_steps(quick):
    found = quick(sweep)
    assert found["place_of_kept"] <= 2 and found["share_of_steps"] < 0.8


def test_the_middle_of_two_runs_is_better_than_both(quick):
    found = quick(mode_connectivity)
    for path in (found["updates"], found["factors"]):
        assert max(path) == max(path[0], path[-1])
        assert path[len(path) // 2] < min(path[0], path[-1])
    assert found["updates"][0] == pytest.approx(found["factors"][0], abs=1e-5)


def test_the_tangent_model_is_the_real_one_at_first_and_leaves_it(quick):
    found = quick(linearised)
    assert found["real"][0] == pytest.approx(found["tangent"][0], abs=1e-5)
    gaps = [abs(r - t) for r, t in zip(found["real"], found["tangent_in_real"], strict=True)]
    assert gaps[0] < 1e-5 and gaps == sorted(gaps)
    assert found["real"][-1] < found["tangent_in_real"][-1]


def test_learned_coefficients_are_better_than_one_for_all(quick):
    found = quick(merge_coefficients)
    assert found["learned"] < found["one"]


def test_the_second_order_gradient_learns_to_adapt_faster(quick):
    found = quick(maml)
    assert found["second_order"][-1] < found["second_order"][0]
    assert found["second_order"][-1] < found["first_order"][-1]


def test_a_hypernetwork_interpolates_lengths(quick):
    found = quick(hypernetwork)
    assert found["means"][-1] > found["means"][0] + 3  # 9 words and 1 word are requested


def test_a_population_finds_a_better_reward(quick):
    found = quick(evolution)
    assert found["rewards"][-1] > found["rewards"][0]


def test_scripts_are_short_and_on_the_page_with_small_pictures():
    page = (EXAMPLES / "README.md").read_text()
    for script in SCRIPTS:
        assert len(script.read_text().splitlines()) < 120, script
        assert script.name in page
    pictures = re.findall(r"]\((pictures/\w+\.png)\)", page)
    assert len(pictures) >= 8
    assert all((EXAMPLES / picture).stat().st_size < 60_000 for picture in pictures)
