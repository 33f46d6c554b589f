import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax.diffusion import prediction, weighting
from ddil_jax.diffusion import process as processes
from ddil_jax.errors import UsageError

T = jnp.array([0.2, 0.5, 0.9])


@pytest.mark.parametrize("name, head", [("snr", "eps"), ("v_mse", "v"), ("constant", "x0")])
def test_weights_turn_the_error_of_x0_into_that_of_a_head(name, head):
  process, parameterisation = processes.cosine(), prediction.make(head)
  alpha, sigma = (f(T).reshape(-1, 1, 1, 1) for f in (process.alpha, process.sigma))
  rng = np.random.default_rng(0)
  x0, eps, error = (jnp.asarray(rng.normal(size=(3, 4, 4, 2)), jnp.float32) for _ in range(3))
  x_t = alpha * x0 + sigma * eps
  estimate = x0 + error
  out = parameterisation.from_x0(estimate, (x_t - alpha * estimate) / sigma, alpha, sigma)
  head_error = jnp.mean((out - parameterisation.from_x0(x0, eps, alpha, sigma)) ** 2, axis=(1, 2, 3))
  x0_error = jnp.mean(error**2, axis=(1, 2, 3))
  np.testing.assert_allclose(head_error, weighting.make(name)(process, T) * x0_error, rtol=1e-4)


def test_truncation_takes_the_larger_error():
  process = processes.cosine()
  both = jnp.maximum(weighting.make("snr")(process, T), weighting.make("constant")(process, T))
  np.testing.assert_array_equal(weighting.make("snr_trunc")(process, T), both)


def test_edm_weight_is_one_over_c_out_squared():
  process = processes.edm()
  _, c_out, _ = prediction.edm_scalings(T)
  np.testing.assert_allclose(weighting.make("edm")(process, T), c_out**-2, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(weighting.WEIGHTINGS))
def test_a_cap_bounds_and_changes_nothing_below_it(name):
  process = processes.cosine()
  plain, capped = (weighting.make(name, cap=cap)(process, T) for cap in (None, 0.5))
  assert plain.shape == (3,) and np.all(capped <= 0.5)
  np.testing.assert_array_equal(capped, jnp.minimum(plain, 0.5))


def test_errors_name_what_exists():
  with pytest.raises(UsageError, match="unknown weighting 'min'; there are: constant, edm"):
    weighting.make("min")
  with pytest.raises(UsageError, match="cap 0 must be positive"):
    weighting.make("snr", cap=0)
