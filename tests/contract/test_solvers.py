"""Every solver in the table: exactness, order of convergence, the clean end, the scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import grids, process, solvers
from ddil_jax.diffusion.rollout import prior, rollout
from ddil_jax.errors import UsageError

ALL = sorted(solvers.SOLVERS)
DETERMINISTIC = {"ddim": 1, "heun": 2, "dpmpp_2m": 2}
STOCHASTIC = [n for n in ALL if n not in DETERMINISTIC]
SHAPE = (6, 2, 2, 1)


def keys(n=6):
  return keys_lib.per_example(jax.random.key(0), jnp.arange(n))


def gaussian(p, std, mean=0.3):
  """E[x0 | x_t] for data N(mean, std^2)."""
  def denoise(x, t, cond):
    a, s = process.expand(p.alpha(t), x), process.expand(p.sigma(t), x)
    return mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
  return denoise


def exact_end(p, std, x_t, t, s, mean=0.3):
  """Where the probability-flow ODE of that data leads from t to s."""
  scale = lambda f, u: float(f(jnp.asarray(u)))  # noqa: E731
  spread = lambda u: np.sqrt((scale(p.alpha, u) * std) ** 2 + scale(p.sigma, u) ** 2)  # noqa: E731
  return scale(p.alpha, s) * mean + (x_t - scale(p.alpha, t) * mean) * spread(s) / spread(t)


@pytest.mark.parametrize("name", ALL)
def test_a_known_image_is_reached(name):
  """With a denoiser that knows x0, every solver ends at x0 exactly."""
  p = process.cosine()
  x0 = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, SHAPE), jnp.float32)
  x_T = prior(p, keys(), x0)
  end = rollout(solvers.make(name)(p, lambda x, t, cond: x0), x_T, grids.uniform(5, p), {}, keys())
  np.testing.assert_allclose(end, x0, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("p", [process.cosine(), process.flow()], ids=["cosine", "flow"])
def test_scan_equals_the_loop_of_steps(name, p):
  """The path of the rollout from single steps with the same keys, to rounding; and every stop index."""
  if name == "heun" and p.name == "cosine":
    grid = np.linspace(0.9, 0.0, 5)
  else:
    grid = np.linspace(0.98, 0.0, 5)
  policy = solvers.make(name)(p, gaussian(p, 0.5))
  x = x_T = prior(p, keys(), jnp.zeros(SHAPE))
  path = rollout(policy, x_T, grid, {}, keys(), path=True)
  step = jax.jit(policy.step)
  carry, walked = policy.init(x), [x]
  for i, (t, s) in enumerate(zip(grid[:-1], grid[1:])):
    noise = keys_lib.normal_like(keys_lib.numbered(keys(), i), x)
    full = functools.partial(jnp.full, (6,), dtype=jnp.float32)
    x, carry = step(carry, x, full(t), full(s), {}, noise)
    walked.append(x)
  np.testing.assert_allclose(path, jnp.stack(walked), rtol=0, atol=2e-6)
  stops = jnp.array([0, 1, 2, 3, 4, 2], jnp.int32)
  stopped = rollout(policy, x_T, grid, {}, keys(), stop=stops)
  np.testing.assert_allclose(stopped, np.stack([path[k, b] for b, k in enumerate(stops)]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name,order", DETERMINISTIC.items())
def test_order_of_convergence(name, order):
  """The error on the exact flow of Gaussian data falls with the solver's order."""
  with jax.enable_x64(True):
    p, std, first, last = process.flow(), 0.5, 0.9, 0.1
    x_t = jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE))
    truth = exact_end(p, std, np.asarray(x_t), first, last)
    errors = []
    for n in (16, 32, 64):
      grid = np.linspace(first, last, n + 1)
      end = rollout(solvers.make(name)(p, gaussian(p, std)), x_t, grid, {}, keys())
      errors.append(float(jnp.abs(end - truth).max()))
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
  assert rates[-1] > order - 0.3, (errors, rates)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_solvers_keep_the_marginal(name):
  """On Gaussian data with its exact denoiser the end has the data's mean; ancestral keeps the spread too."""
  n = 4000
  p, std = process.cosine(), 0.5
  many = keys_lib.per_example(jax.random.key(1), jnp.arange(n))
  x_T = prior(p, many, jnp.zeros((n, 1, 1, 1)))
  end = rollout(solvers.make(name)(p, gaussian(p, std)), x_T, grids.uniform(64, p), {}, many)
  assert abs(float(end.mean()) - 0.3) < 0.04
  if name == "ancestral":
    assert abs(float(end.std()) - std) < 0.05
  again = rollout(solvers.make(name)(p, gaussian(p, std)), x_T, grids.uniform(64, p), {}, many)
  np.testing.assert_array_equal(end, again)


def test_ddim_eta_one_is_ancestral():
  p = process.cosine()
  x, t, s = prior(p, keys(), jnp.zeros(SHAPE)), jnp.full((6,), 0.7), jnp.full((6,), 0.4)
  noise = keys_lib.normal_like(keys(), x)
  step = lambda solver: solver(p, gaussian(p, 0.5)).step((), x, t, s, {}, noise)[0]  # noqa: E731
  np.testing.assert_allclose(step(solvers.ddim(eta=1.0)), step(solvers.ancestral()), atol=2e-6)


def test_visit_leaves_the_walk_on_the_grid():
  """A visit between grid times is one step aside; at a grid time it is the state itself."""
  p = process.cosine()
  policy = solvers.ddim()(p, gaussian(p, 0.5))
  grid = grids.uniform(4, p)
  x_T = prior(p, keys(), jnp.zeros(SHAPE))
  path = rollout(policy, x_T, grid, {}, keys(), path=True)
  same = rollout(policy, x_T, grid, {}, keys(), visit=jnp.broadcast_to(jnp.asarray(grid[:-1, None], jnp.float32), (4, 6)))
  np.testing.assert_allclose(same, path[:-1], rtol=0, atol=1e-6)
  aside = jnp.asarray(grid[:-1, None] - 0.1, jnp.float32) + jnp.zeros((4, 6))
  moved = rollout(policy, x_T, grid, {}, keys(), visit=aside)
  full = jnp.full((6,), 0.75)
  expected, _ = policy.step((), path[1], full, aside[1], {}, x_T)
  np.testing.assert_allclose(moved[1], expected, atol=1e-6)


def test_mixed_policy():
  """Probability 0 and 1 are the two policies themselves; between, each step is one of them."""
  p = process.cosine()
  student = solvers.renoise()(p, gaussian(p, 0.5))
  teacher = solvers.ddim()(p, gaussian(p, 0.5))
  grid, x_T = grids.uniform(4, p), prior(p, keys(), jnp.zeros(SHAPE))
  walk = lambda policy: rollout(policy, x_T, grid, {}, keys(), path=True)  # noqa: E731
  key = jax.random.key(5)
  np.testing.assert_allclose(walk(solvers.mixed(student, teacher, 0.0, key)), walk(student), rtol=0, atol=2e-6)
  np.testing.assert_allclose(walk(solvers.mixed(student, teacher, 1.0, key)), walk(teacher), rtol=0, atol=2e-6)
  half = walk(solvers.mixed(student, teacher, 0.5, key))
  assert not np.allclose(half, walk(student), atol=1e-3) and not np.allclose(half, walk(teacher), atol=1e-3)


def test_bad_input():
  with pytest.raises(UsageError, match="ddim"):
    solvers.make("dimm")
  with pytest.raises(UsageError, match="edm"):
    solvers.heun(churn=10)(process.cosine(), lambda x, t, c: x)
