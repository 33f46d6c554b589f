"""Every state source: what it returns, on fresh states and on whole paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax import keys as keys_lib
from ddil_jax import registry
from ddil_jax.diffusion import process
from ddil_jax.states.base import SOURCES, Context
from tests import building, toys

LCM = dict(num_scales=16, sampler_steps=4, guidance_range=(1.0, 4.0))


def context(batch_size=6, step=0):
  batch = toys.toy_batch(batch_size)
  key = jax.random.fold_in(jax.random.key(0), step)
  teacher = toys.toy_init(jax.random.key(7))
  student = toys.toy_init(jax.random.key(8))
  return Context(jnp.asarray(step), key, keys_lib.per_example(key, batch["lane"]), batch, student, teacher, batch_size)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("method,options", [("pd", {}), ("lcm", LCM)], ids=["pd", "lcm"])
def test_fresh_states(name, method, options):
  parts = toys.toy_parts()
  objective = registry.load("objectives", method).make(parts, **options)
  source = building.sources(parts, objective)[name]
  states = jax.jit(source.fresh)(context())
  assert states.x_t.shape == (6,) + toys.IMAGE and states.x_t.dtype == jnp.float32
  np.testing.assert_allclose(states.t, objective.grid[states.k], rtol=1e-6)
  assert (np.asarray(states.source) == SOURCES.index(name)).all()
  np.testing.assert_array_equal(states.cond["label"], context().batch["label"])
  assert ("guidance_scale" in states.cond) == (method == "lcm")
  again = jax.jit(source.fresh)(context())
  np.testing.assert_array_equal(states.x_t, again.x_t)
  # An example's state depends on its own key only: the second half alone gives the same states.
  ctx = context()
  half = ctx._replace(keys=ctx.keys[3:], batch=jax.tree.map(lambda v: v[3:], ctx.batch))
  if name != "dagger":  # its coins are the step's
    np.testing.assert_allclose(jax.jit(source.fresh)(half).x_t, states.x_t[3:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["student", "teacher", "dagger"])
@pytest.mark.parametrize("method,options,count", [("pd", {}, 4), ("lcm", LCM, {"student": 4, "dagger": 4, "teacher": 16})],
                         ids=["pd", "lcm"])
def test_paths(name, method, options, count):
  """All states of one rollout, at training times only, each interval of the walk once."""
  parts = toys.toy_parts()
  objective = registry.load("objectives", method).make(parts, **options)
  states = jax.jit(building.sources(parts, objective)[name].path)(context())
  expected = count[name] if isinstance(count, dict) else count
  assert states.x_t.shape == (6, expected) + toys.IMAGE
  assert states.cond["label"].shape == (6, expected)
  np.testing.assert_allclose(states.t, objective.grid[states.k], rtol=1e-6)
  assert (np.diff(np.asarray(states.k), axis=1) > 0).all()


def test_pd_student_states_are_the_samplers_states():
  """At index k the student source returns what the sampler visits at grid[k]."""
  from ddil_jax.diffusion.rollout import prior, rollout
  from ddil_jax.objectives.base import bind
  parts = toys.toy_parts()
  objective = registry.load("objectives", "pd").make(parts)
  ctx = context()
  states = building.sources(parts, objective)["student"].fresh(ctx)
  keys = keys_lib.named(ctx.keys, "student")
  policy = objective.solver(parts.process, bind(objective.student, ctx.student))
  path = rollout(policy, prior(parts.process, keys, states.x_t), objective.grid, {"label": ctx.batch["label"]}, keys,
                 path=True)
  expected = np.stack([path[k, b] for b, k in enumerate(states.k)])
  np.testing.assert_allclose(states.x_t, expected, rtol=1e-6, atol=1e-6)


def test_lcm_student_states_renoise_the_preceding_x0():
  """Between two inference times the state is the last x0 of the sampler, noised to the training time."""
  parts = toys.toy_parts(process.flow(), student=lambda params, x, t, cond, keys=None, features=(): jnp.full_like(x, 0.25))
  objective = registry.load("objectives", "lcm").make(parts, **LCM)
  states = building.sources(parts, objective)["student"].path(context(600))
  inside = np.asarray(~np.isclose(np.asarray(states.t), objective.sampler_grid[:-1]))
  t = np.asarray(states.t)[inside]
  x = np.asarray(states.x_t)[inside]
  # x_t = (1 - t) f + t n with f = 0.25 up to the boundary term: mean and spread of the marginal.
  residual = (x - (1 - t)[:, None, None, None] * 0.25) / t[:, None, None, None]
  assert inside.mean() > 0.5
  assert abs(residual.mean()) < 0.02 and abs(residual.std() - 1) < 0.02


def test_forward_prior_first():
  """DMD2's first time is pure noise even where alpha is not 0 there."""
  parts = toys.toy_parts(process.stable_diffusion())
  objective = registry.load("objectives", "dmd2").make(parts)
  ctx = context(64)
  ctx = ctx._replace(batch=ctx.batch | {"image": jnp.full((64,) + toys.IMAGE, 100.0)})
  states = building.sources(parts, objective)["forward"].fresh(ctx)
  first = np.asarray(states.k) == 0
  assert first.any() and (~first).any()
  assert abs(np.asarray(states.x_t)[first].mean()) < 0.2 and np.asarray(states.x_t)[~first].mean() > 5
