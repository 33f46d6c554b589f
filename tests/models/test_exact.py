"""Closed-form teachers against numerical integration, and the flow map against many DDIM steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.solvers import ddim_step
from ddil_jax.errors import UsageError
from ddil_jax.models import exact

PROCESSES = {"cosine": processes.cosine(), "edm": processes.edm(), "flow": processes.flow()}
TIMES = {"cosine": [0.02, 0.3, 0.7, 0.95], "edm": [0.01, 0.3, 2.0, 40.0], "flow": [0.02, 0.3, 0.7, 1.0]}


def quadrature(process, density, x_t, t):
  """E[x0 | x_t] of scalar data by the trapezoidal rule; x_t, t [B] numpy."""
  x0 = np.linspace(-8, 8, 160_001)
  out = []
  for x, time in zip(x_t, t, strict=True):
    alpha, sigma = float(process.alpha(jnp.float32(time))), float(process.sigma(jnp.float32(time)))
    log_likelihood = -0.5 * ((x - alpha * x0) / sigma) ** 2
    weight = density(x0) * np.exp(log_likelihood - log_likelihood.max())
    out.append(np.trapezoid(weight * x0, x0) / np.trapezoid(weight, x0))
  return np.array(out)


def normal(x, mean, std):
  return np.exp(-0.5 * ((x - mean) / std) ** 2) / std


def states(process, times, seed=0):
  """Plausible scalar states, 3 at each time, as [B, 1, 1, 1] and [B]."""
  t = np.repeat(times, 3)
  rng = np.random.default_rng(seed)
  alpha, sigma = (np.asarray(f(jnp.array(t, jnp.float32))) for f in (process.alpha, process.sigma))
  x = alpha * rng.normal(0.3, 0.8, t.size) + sigma * rng.standard_normal(t.size)
  return x.astype(np.float32).reshape(-1, 1, 1, 1), t.astype(np.float32)


@pytest.mark.parametrize("name", PROCESSES)
def test_gaussian_is_the_posterior_mean(name):
  process = PROCESSES[name]
  teacher = exact.gaussian(process, 0.4, 0.6)
  x, t = states(process, TIMES[name])
  expected = quadrature(process, lambda v: normal(v, 0.4, 0.6), x.ravel(), t)
  np.testing.assert_allclose(teacher(teacher.params, x, t, {}).ravel(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", PROCESSES)
def test_mixture_is_the_posterior_mean_of_all_and_of_each_class(name):
  process = PROCESSES[name]
  means, std = np.array([-1.0, 0.2, 0.9]), 0.15
  weights, labels = np.array([1.0, 2.0, 3.0]), np.array([0, 1, 0])
  teacher = exact.mixture(process, means, std, weights, labels)
  x, t = states(process, TIMES[name])
  for label in (0, 1, 2, None):
    inside = (labels == label) | (label in (2, None))
    parts = list(zip(weights[inside], means[inside], strict=True))
    density = lambda v, parts=parts: sum(w * normal(v, m, std) for w, m in parts)  # noqa: E731
    expected = quadrature(process, density, x.ravel(), t)
    cond = {} if label is None else {"label": jnp.full(t.shape, label)}
    np.testing.assert_allclose(teacher(teacher.params, x, t, cond).ravel(), expected, rtol=1e-4, atol=1e-4)


def test_mixture_of_images_agrees_with_its_parts():
  process = PROCESSES["cosine"]
  rng = np.random.default_rng(0)
  x, t = rng.standard_normal((5, 4, 3, 2)).astype(np.float32), np.linspace(0.1, 0.9, 5, dtype=np.float32)
  mean = rng.standard_normal((4, 3, 2))
  one = exact.gaussian(process, mean, 0.5)
  two = exact.mixture(process, np.stack([mean, mean]), 0.5, [1.0, 4.0])
  np.testing.assert_allclose(two(two.params, x, t, {}), one(one.params, x, t, {}), atol=1e-5)
  # Per example labels: each class alone is its own Gaussian.
  means = np.stack([mean, -mean])
  classes = exact.mixture(process, means, 0.5, labels=[0, 1])
  out = classes(classes.params, x, t, {"label": jnp.array([0, 1, 0, 1, 1])})
  for i, k in enumerate([0, 1, 0, 1, 1]):
    alone = exact.gaussian(process, means[k], 0.5)
    np.testing.assert_allclose(out[i:i + 1], alone(alone.params, x[i:i + 1], t[i:i + 1], {}), atol=1e-5)


def test_mixture_is_stable_where_the_densities_underflow():
  process = PROCESSES["edm"]
  teacher = exact.mixture(process, np.stack([np.full((8, 8, 1), m) for m in (-1.0, 1.0)]), 1e-3)
  x, t = jnp.full((2, 8, 8, 1), 0.9), jnp.array([1e-3, 2e-3])  # |x - m|^2 / 2v is about 1e7
  f = lambda x: teacher(teacher.params, x, t, {})  # noqa: E731
  np.testing.assert_allclose(f(x)[0], (1.0 + 0.9) / 2, atol=1e-5)
  assert np.all(np.isfinite(jax.grad(lambda x: f(x).sum())(x)))


def test_clean_states_are_returned_and_pure_noise_gives_the_mean():
  teacher = exact.gaussian(PROCESSES["flow"], [0.1, 0.4], 0.5)
  x = jax.random.normal(jax.random.key(0), (2, 3, 3, 2))
  out = teacher(teacher.params, x, jnp.array([0.0, 1.0]), {})
  np.testing.assert_allclose(out[0], x[0], atol=1e-6)
  np.testing.assert_allclose(out[1], np.broadcast_to([0.1, 0.4], (3, 3, 2)), atol=1e-6)


@pytest.mark.parametrize("name, start, end", [("cosine", 0.95, 0.05), ("edm", 20.0, 0.1), ("flow", 1.0, 0.0)])
def test_gaussian_flow_is_the_limit_of_ddim(name, start, end):
  process, mean, std = PROCESSES[name], 0.4, 0.6
  teacher = exact.gaussian(process, mean, std)
  x = jnp.linspace(-2, 2, 5).reshape(5, 1, 1, 1) * float(process.sigma(jnp.float32(start)))

  @jax.jit
  def run(x, grid):
    def step(x, ts):
      t, s = (jnp.broadcast_to(v, (5,)) for v in ts)
      return ddim_step(process, x, teacher(teacher.params, x, t, {}), t, s), None
    return jax.lax.scan(step, x, (grid[:-1], grid[1:]))[0]

  spaced = jnp.geomspace if name == "edm" else jnp.linspace
  grids = [spaced(start, end, n + 1) for n in (50, 400)]
  exact_end = exact.gaussian_flow(process, mean, std, x, jnp.full(5, start), jnp.full(5, end))
  coarse, fine = (float(np.abs(run(x, grid) - exact_end).max()) for grid in grids)
  assert fine < 5e-3
  assert 5 < coarse / fine < 12  # first order: 8 times the steps


def test_gaussian_flow_carries_the_marginals_and_composes():
  process = PROCESSES["cosine"]

  def flow(x, t, s):
    return exact.gaussian_flow(process, 0.4, 0.6, x, jnp.full(3, t), jnp.full(3, s))

  x = jnp.array([-1.0, 0.3, 2.0]).reshape(3, 1, 1, 1)
  np.testing.assert_allclose(flow(flow(x, 0.9, 0.5), 0.5, 0.1), flow(x, 0.9, 0.1), atol=1e-6)
  np.testing.assert_allclose(flow(flow(x, 0.9, 0.2), 0.2, 0.9), x, atol=1e-5)
  alpha, sigma = (float(f(jnp.float32(0.9))) for f in (process.alpha, process.sigma))
  marginal_std = np.sqrt((0.6 * alpha) ** 2 + sigma**2)
  z = np.array([-1.5, 0.0, 1.5], np.float32).reshape(3, 1, 1, 1)
  np.testing.assert_allclose(flow(0.4 * alpha + marginal_std * z, 0.9, 0.0), 0.4 + 0.6 * z, atol=1e-5)


def test_parameters_are_learnable():
  process = PROCESSES["cosine"]
  teacher = exact.gaussian(process, 0.4, 0.6)
  x, t = states(process, TIMES["cosine"])
  target = teacher(teacher.params, x, t, {})
  loss = lambda p: jnp.mean((teacher(p, x, t, {}) - target) ** 2)  # noqa: E731
  assert loss(teacher.params) == 0
  # The estimate is monotone in each of the two, so that the slope points back from either side.
  for name, value, slope in [("mean", 0.0, -1), ("mean", 0.8, 1), ("std", 0.4, -1), ("std", 0.9, 1)]:
    grads = jax.grad(loss)({**teacher.params, name: jnp.array(value)})
    assert np.sign(grads[name]) == slope


@pytest.mark.parametrize("make, message", [
    (lambda p: exact.gaussian(p, 0.0, 0.0), "std 0.0 must be positive"),
    (lambda p: exact.mixture(p, [0.0, 1.0], [0.1, 0.2]), "std must be a scalar"),
    (lambda p: exact.mixture(p, [0.0, 1.0], 0.1, [1.0, 0.0]), "must be 2 positive numbers"),
    (lambda p: exact.mixture(p, [0.0, 1.0], 0.1, labels=[0, 2]), "each of 0..n-1 at least once"),
])
def test_mistakes_are_named(make, message):
  with pytest.raises(UsageError, match=message):
    make(PROCESSES["cosine"])


def test_features_do_not_exist():
  teacher = exact.gaussian(PROCESSES["cosine"], 0.0, 1.0)
  with pytest.raises(UsageError, match="unknown feature 'bottleneck'"):
    teacher(teacher.params, jnp.zeros((1, 2, 2, 1)), jnp.ones(1), {}, features=("bottleneck",))
