"""scripts/examples/steering.py: a word's probability follows the strength of a vector."""

from pathlib import Path

import steering


def test_steering_moves_the_first_word(tmp_path):
    found = steering.main(True, tmp_path / "figure.png")
    shares = found["shares"]
    for name in ("difference of means", "trained, of the same norm"):
        assert shares[name] == sorted(shares[name]), name
    gain = {name: share[-1] - share[0] for name, share in shares.items()}
    assert gain["trained, of the same norm"] > 0.2
    assert gain["trained, of the same norm"] > gain["difference of means"] > 0.05
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_the_script_is_short():
    assert len(Path(steering.__file__).read_text().splitlines()) < 120
