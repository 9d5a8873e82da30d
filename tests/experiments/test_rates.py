"""The experiments on rate and distortion run, in small."""

import numpy as np
import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "states", "most"), [(4.05, 0, 0.30), (2.05, 128, 0.15)]
)
def test_the_gap_of_the_hardest_covariance(experiment, rate, states, most):
    """With half of its spectrum under the water at 2 bits; the full size, one seed."""
    module = experiment("rate_distortion.gaussian_bound")
    x = np.random.default_rng(1).standard_normal((192, 2048)).astype(np.float32)
    found = module.beside_the_bound(
        x,
        module.covariances(192)["rotated"],
        rate=rate,
        states=states,
        damping=1e-6,
        prior=0.5,
    )
    assert found["bits_per_weight"] == pytest.approx(rate, rel=0.005)
    assert 0 < found["gap"] < most
