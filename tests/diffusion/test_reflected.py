import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax.diffusion import reflected


def grid(n=41):
  x = jnp.linspace(0.01, 0.99, n).reshape(n, 1)
  return x, jnp.full_like(x, 0.3)


def test_reflect_is_the_identity_inside_and_has_period_two():
  x = jnp.linspace(-5, 5, 101)
  inside = jnp.linspace(0, 1, 11)
  np.testing.assert_array_equal(reflected.reflect(inside), inside)
  np.testing.assert_allclose(reflected.reflect(x + 2), reflected.reflect(x), atol=2e-6)
  np.testing.assert_allclose(reflected.reflect(-x), reflected.reflect(x), atol=2e-6)
  np.testing.assert_allclose(reflected.reflect(2 * x - 1, -1, 1), 2 * reflected.reflect(x) - 1, atol=4e-6)


def test_both_forms_of_the_score_agree_near_the_switch():
  x, x0 = grid()
  for tau in (0.008, 0.01, 0.02):
    with jax.enable_x64(True):
      args = x.astype(jnp.float64), x0.astype(jnp.float64), jnp.full((41,), (2 * tau) ** 0.5, jnp.float64)
      images, series = reflected.score_images(*args), reflected.score_eigenfunctions(*args)
      np.testing.assert_allclose(images, series, atol=1e-5 * float(jnp.max(jnp.abs(images))))


def test_the_score_is_the_gradient_of_the_log_density():
  """Against the derivative of the log of the summed Gaussians, in every regime of `score`."""
  def log_density(x, x0, sigma):
    k = 2.0 * np.arange(-12, 13)
    offsets = jnp.concatenate([x - x0 - k, x + x0 - k])
    return jax.nn.logsumexp(-0.5 * (offsets / sigma) ** 2)

  x, x0 = grid()
  for level in (0.05, 0.14, 0.15, 0.6, 2.0):
    with jax.enable_x64(True):
      x64, y64 = x.astype(jnp.float64), x0.astype(jnp.float64)
      expected = jax.vmap(jax.grad(log_density), (0, 0, None))(x64[:, 0], y64[:, 0], level)
      got = reflected.score(x64, y64, jnp.full((41,), level, jnp.float64))[:, 0]
      np.testing.assert_allclose(got, expected, atol=1e-6 * float(jnp.max(jnp.abs(expected))) + 1e-12)


def test_the_score_vanishes_at_the_walls():
  """No flux leaves the box: the normal derivative of the density is zero there."""
  walls, x0 = jnp.array([[0.0], [1.0]]), jnp.full((2, 1), 0.3)
  for level in (0.1, 0.5):
    # Two images pull with |x - x0| / sigma^2 each (up to 70) and cancel.
    score = reflected.score(walls, x0, jnp.full((2,), level))
    np.testing.assert_allclose(score, 0, atol=1e-5 * 0.7 / level**2)


def test_samples_follow_the_kernel():
  rng = np.random.default_rng(0)
  x0, noise = jnp.full((20_000, 1), 0.3), jnp.asarray(rng.normal(size=(20_000, 1)), jnp.float32)
  x = reflected.sample_kernel(x0, jnp.full((20_000,), 0.4), noise)
  assert float(x.min()) >= 0 and float(x.max()) <= 1
  # E cos(pi x) = exp(-pi^2 tau) cos(pi x0): the first eigenfunction decays at its rate.
  expected = np.exp(-np.pi**2 * 0.08) * np.cos(np.pi * 0.3)
  assert float(jnp.mean(jnp.cos(jnp.pi * x))) == pytest.approx(expected, abs=0.02)


def test_density_floor_takes_far_scores_to_zero():
  x, x0, sigma = jnp.full((1, 1), 0.9), jnp.full((1, 1), 0.1), jnp.full((1,), 0.05)
  exact, floored = (reflected.score_images(x, x0, sigma, density_floor=floor) for floor in (0.0, 1e-12))
  assert float(exact[0, 0]) == pytest.approx(-0.8 / 0.05**2, rel=1e-4) and abs(float(floored[0, 0])) < 1e-30
