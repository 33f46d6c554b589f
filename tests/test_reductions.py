"""What must hold exactly: DDIL reduces to its base methods, and the losses vanish where theory says so."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddil_jax import keys as keys_lib
from ddil_jax import registry
from ddil_jax.diffusion import distance, grids, process, solvers, transforms, weighting
from ddil_jax.diffusion.rollout import prior, rollout
from ddil_jax.models import exact
from ddil_jax.objectives import cd, dmd2, pd
from ddil_jax.objectives.base import bind
from ddil_jax.states.mixture import mixture
from ddil_jax.states.replay import on_policy, replay
from ddil_jax.training.step import init_state, make_train_step
from tests import building, toys
from tests.contract.test_sources import context

METHODS = {"pd": {}, "cd": dict(num_scales=9, target_decay=0.9), "lcm": dict(num_scales=16),
           "dmd2": dict(gan_weight=0.1, period=2, critic_weight="snr_trunc", weight_cap=100.0)}


def trained(name, parts, distribution_of, optimizer):
  objective = registry.load("objectives", name).make(parts, **METHODS[name])
  state, _ = building.run(objective, distribution_of(objective), toys.toy_init(jax.random.key(7)), optimizer=optimizer)
  return state


@pytest.mark.parametrize("name", METHODS)
def test_priors_one_zero_zero_is_the_base_method(name):
  """Through the mixture's switch too, with buffers that exist and are never drawn from.

  To rounding here: the compiler fuses the two programs differently. What a config builds is the
  same program, bit for bit: tests/test_build.py.
  """
  parts, sgd = toys.toy_parts(), optax.sgd(1e-2)
  base = trained(name, parts, lambda o: on_policy(building.sources(parts, o)["forward"]), sgd)
  mixed = trained(name, parts, lambda o: building.ddil(parts, o, priors=(1.0, 0.0, 0.0)), sgd)
  for a, b in zip(jax.tree.leaves((base.params, base.ema)), jax.tree.leaves((mixed.params, mixed.ema)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_identity_reflection_is_the_base_method_bit_for_bit(name):
  forward = lambda parts: lambda o: on_policy(building.sources(parts, o)["forward"])  # noqa: E731
  plain, off = toys.toy_parts(), toys.toy_parts(reflect=transforms.reflect(transforms.identity()))
  a = trained(name, plain, forward(plain), optax.adam(1e-2))
  b = trained(name, off, forward(off), optax.adam(1e-2))
  for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("source", ["forward", "student", "teacher", "dagger"])
def test_pd_loss_is_zero_for_the_two_step_student(source):
  """A student that is two teacher DDIM steps has no loss at any source; DDIM with x~ lands on z''."""
  p = process.cosine()
  teacher = exact.mixture(p, means=np.array([-0.6, 0.1, 0.7]), std=0.2, weights=np.array([0.3, 0.3, 0.4]))
  denoise = bind(teacher, teacher.params)
  fine = grids.uniform(8, p)
  grid = fine[::2]

  def times(k):
    fine_, grid_ = jnp.asarray(fine), jnp.asarray(grid)
    return grid_[k], fine_[2 * k + 1], grid_[k + 1]

  def two_steps(params, x_t, t, cond, keys=None, features=()):
    k = jnp.argmin(jnp.abs(jnp.asarray(grid)[None] - t[:, None]), axis=1)
    return pd.x_target(p, denoise, x_t, *times(k), cond)[0]

  parts = toys.toy_parts(p, teacher=teacher, student=two_steps)
  objective = pd.make(parts, num_steps=4)
  states = building.sources(parts, objective)[source].fresh(context()._replace(teacher=teacher.params))
  with jax.enable_x64(True):  # the inversion loses digits; here its algebra is tested
    x_t, (t, mid, s) = states.x_t.astype(jnp.float64), times(states.k)
    loss = pd.pd_loss(p, bind(two_steps, None), denoise, x_t, t, mid, s, {}, weighting.make("snr_trunc"))
    np.testing.assert_array_equal(loss, 0)
    target, found = pd.x_target(p, denoise, x_t, t, mid, s, {})
    np.testing.assert_allclose(solvers.ddim_step(p, x_t, target, t, s), found["x_s"], atol=1e-8)


@pytest.mark.parametrize("solver,order", [("ddim", 2), ("heun", 3)])
def test_cd_residual_of_the_exact_consistency_function(solver, order):
  """On Gaussian data the residual of one step is O(dt^2) under Euler and O(dt^3) under Heun."""
  with jax.enable_x64(True):
    p, std, mean = process.edm(), 0.5, 0.2
    exact_f = lambda x, t, cond: exact.gaussian_flow(p, mean, std, x, t, jnp.zeros_like(t))  # noqa: E731
    teacher = lambda x, t, cond: mean + std**2 / (std**2 + process.expand(t, x) ** 2) * (x - mean)  # noqa: E731
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 2, 1))) * 1.5
    t = jnp.full((4,), 1.0)
    errors = []
    for dt in (0.02, 0.01, 0.005):
      loss, _ = cd.consistency_loss(p, exact_f, exact_f, teacher, solvers.make(solver), x, t, t - dt, {},
                                    distance.make("l2"))
      errors.append(float(jnp.sqrt(loss).max()))
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
  assert abs(rates[-1] - order) < 0.15, (errors, rates)


def test_dmd2_gradient_is_the_normalised_difference():
  """dL/dx = grad / numel per sample; zero where fake is real; each sample has its own normaliser."""
  rng = np.random.default_rng(0)
  x, d_real, d_fake = (jnp.asarray(rng.standard_normal((3, 4, 4, 2)), jnp.float32) for _ in range(3))
  gradient = dmd2.dm_gradient(x, d_real, d_fake)
  by_x = jax.grad(lambda v: dmd2.carry_gradient(v, gradient).sum())(x)
  np.testing.assert_allclose(by_x, gradient / (4 * 4 * 2), atol=1e-7)
  np.testing.assert_array_equal(dmd2.dm_gradient(x, d_real, d_real), 0)
  scaled = dmd2.dm_gradient(x.at[0].multiply(50.0), d_real, d_fake)
  np.testing.assert_array_equal(scaled[1:], gradient[1:])
  assert float(jnp.abs(scaled[0]).max()) < float(jnp.abs(gradient[0]).max())
  same = dmd2.dm_gradient(d_real, d_real, d_real)
  np.testing.assert_array_equal(same, 0)  # 0/0


def test_dmd2_gradient_vanishes_for_a_perfect_generator():
  """With critic = teacher the matching gradient is zero on any image."""
  p = process.cosine()
  denoise = exact.gaussian(p, 0.1, 0.5)
  x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 4, 4, 2)), jnp.float32)
  bound = bind(denoise, denoise.params)
  loss, found = dmd2.dm_loss(p, bound, bound, x, jnp.array([0.2, 0.5, 0.9]), x * 0.5, {})
  np.testing.assert_array_equal(found["gradient"], 0)
  np.testing.assert_array_equal(loss, 0)


def test_student_states_correct_covariate_shift():
  """DDIL's claim where it can be computed: the second step of a student is wrong exactly where a
  faulty first step leads. Trained on forward data it stays wrong there; with student states it mends.
  """
  p = process.flow()
  mean, std, shape, n = 0.0, 0.3, (1, 1, 1), 512
  denoise = exact.gaussian(p, mean, std)
  teacher_params = denoise.params

  def student(params, x_t, t, cond, keys=None, features=()):
    """Exact at the first time but for an injected error; learned (one bias per region of x) at the second."""
    first = denoise(teacher_params, x_t, t, cond) + 6.0
    away = jax.nn.sigmoid(20 * (x_t - 2.0))  # forward data hardly ever comes here
    second = params["near"] * (1 - away) * x_t + away * params["far"]
    return jnp.where(process.expand(t, x_t) > 0.75, first, second)

  parts = toys.toy_parts(p, teacher=denoise, student=student)._replace(
      image_shape=shape, init_student=lambda key, teacher: {"near": jnp.zeros(()), "far": jnp.zeros(())})
  objective = pd.make(parts, num_steps=2, weight="constant")
  images = mean + std * np.random.default_rng(0).standard_normal((n,) + shape).astype(np.float32)
  batch = {"image": images, "lane": np.arange(n, dtype=np.int32)}
  available = building.sources(parts, objective)
  keys = keys_lib.per_example(jax.random.key(9), batch["lane"])

  def label_error_on_own_rollout(distribution):
    optimizers = {"student": optax.adam(5e-2)}
    step = jax.jit(make_train_step(objective, distribution, optimizers, {}, n), static_argnums=4)
    state = init_state(objective, distribution, optimizers, {}, jax.random.key(0), teacher_params, batch)
    for _ in range(150):
      state, _ = step(state, {"teacher": teacher_params}, batch, jax.random.key(1), ("student",))
    params = state.params["student"]
    policy = solvers.ddim()(p, bind(student, params))
    x_T = prior(p, keys, jnp.zeros((n,) + shape))
    visited = rollout(policy, x_T, objective.grid, {}, keys, path=True)[1]
    full = lambda t: jnp.full((n,), t, jnp.float32)  # noqa: E731
    return float(pd.pd_loss(p, bind(student, params), bind(denoise, teacher_params), visited, full(0.5), full(0.25),
                            full(0.0), {}, weighting.make("constant")).mean())

  base = label_error_on_own_rollout(on_policy(available["forward"]))
  ddil = label_error_on_own_rollout(mixture((on_policy(available["forward"]), replay(available["student"], 2, 1)),
                                            lambda s: jnp.array([0.5, 0.5])))
  assert ddil < 0.2 * base, (base, ddil)
