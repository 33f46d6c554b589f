"""Selection, priors and replay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax import registry
from ddil_jax.errors import UsageError
from ddil_jax.states import priors
from ddil_jax.states.base import SOURCES
from ddil_jax.states.mixture import mixture
from ddil_jax.states.replay import Replay, draw, on_policy, push, replay
from ddil_jax.states.base import States
from tests import building, toys
from tests.contract.test_sources import context


def pd():
  parts = toys.toy_parts()
  return parts, registry.load("objectives", "pd").make(parts)


def test_per_example_split_is_exact():
  parts, objective = pd()
  distribution = building.ddil(parts, objective, priors=(0.5, 0.25, 0.25), selection="per_example")
  ctx = context(16)
  for step in range(3):
    states, _ = distribution.sample(distribution.init(ctx), context(16, step))
    assert np.bincount(states.source, minlength=3)[:3].tolist() == [8, 4, 4]


def test_per_example_rounding_is_unbiased():
  """Proportions that do not divide the batch hold on average, and each batch is within one example."""
  parts, objective = pd()
  forward = on_policy(building.sources(parts, objective)["forward"])
  relabel = lambda i: forward._replace(sample=lambda d, c: (lambda s: (s[0]._replace(source=s[0].source * 0 + i), s[1]))(  # noqa: E731
      forward.sample(d, c)))
  distribution = mixture((relabel(0), relabel(1), relabel(2)), lambda step: jnp.array([0.45, 0.33, 0.22]), "per_example")
  sample = jax.jit(lambda step: distribution.sample(((), (), ()), context(6, step))[0].source)
  counts = np.array([np.bincount(sample(step), minlength=3) for step in range(300)])
  assert np.abs(counts - 6 * np.array([0.45, 0.33, 0.22])).max() < 1 + 1e-6
  np.testing.assert_allclose(counts.mean(0) / 6, [0.45, 0.33, 0.22], atol=0.02)


def test_per_step_frequencies():
  parts, objective = pd()
  forward = on_policy(building.sources(parts, objective)["forward"])
  relabel = lambda i: forward._replace(sample=lambda d, c: (lambda s: (s[0]._replace(source=s[0].source * 0 + i), s[1]))(  # noqa: E731
      forward.sample(d, c)))
  distribution = mixture((relabel(0), relabel(1), relabel(2)), lambda step: jnp.array([0.5, 0.3, 0.2]))
  sample = jax.jit(lambda step: distribution.sample(((), (), ()), context(2, step))[0].source)
  drawn = np.array([sample(step) for step in range(600)])
  assert (drawn[:, 0] == drawn[:, 1]).all()  # one source for the whole batch
  np.testing.assert_allclose(np.bincount(drawn[:, 0]) / 600, [0.5, 0.3, 0.2], atol=0.06)


def stored(value, count):
  """States [1, count] whose k counts up from `value`."""
  k = jnp.arange(value, value + count, dtype=jnp.int32)[None]
  return States(k.astype(jnp.float32)[..., None, None, None], k.astype(jnp.float32), k, {}, k * 0, None)


def test_ring_buffer():
  """Oldest states go first; draws are uniform over what is filled."""
  empty = jax.tree.map(lambda v: jnp.zeros((1, 5) + v.shape[2:], v.dtype), stored(0, 1))
  buffer = Replay(empty, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
  buffer = push(buffer, stored(10, 3))
  draws = jax.jit(lambda buffer, keys: jax.vmap(lambda key: draw(buffer, key).k[0])(keys))
  keys = jax.random.split(jax.random.key(0), (500, 1))
  assert set(np.asarray(draws(buffer, keys[:60])).tolist()) == {10, 11, 12}
  buffer = push(push(buffer, stored(20, 3)), stored(30, 1))
  assert sorted(np.asarray(buffer.states.k[0]).tolist()) == [12, 20, 21, 22, 30]
  counts = np.bincount(draws(buffer, keys), minlength=31)
  assert (counts[[12, 20, 21, 22, 30]] > 60).all()


def test_refresh_interval():
  """A rollout at the first use, then every `refresh_every` steps; on-policy with 1 and no spare room."""
  parts, objective = pd()
  source = building.sources(parts, objective)["student"]
  distribution = replay(source, slots=8, refresh_every=3)
  state = distribution.init(context())
  sample = jax.jit(distribution.sample)
  pushed = []
  for step in range(8):
    _, state = sample(state, context(step=step))
    pushed.append(int(state.pushed))
  assert pushed == [4, 4, 4, 8, 8, 8, 12, 12]
  on = replay(source, slots=4, refresh_every=1)
  states, state = jax.jit(on.sample)(on.init(context()), context(step=5))
  path = jax.jit(source.path)(context(step=5))
  for b in range(6):  # each drawn state is one of the path just walked
    assert any(np.allclose(states.x_t[b], path.x_t[b, j]) for j in range(4))
  assert states.x0.shape == states.x_t.shape


def test_priors_schedules():
  linear = priors.schedule(("linear", 1.0, 0.5, 0.5), 100)
  assert [float(linear(s)) for s in (0, 25, 50, 99)] == [1.0, 0.75, 0.5, 0.5]
  cosine = priors.schedule(("cosine", 0.0, 0.4, 1.0), 100)
  np.testing.assert_allclose([cosine(0), cosine(50), cosine(100)], [0, 0.2, 0.4], atol=1e-6)
  piecewise = priors.schedule(("piecewise", 1.0, 0.5, 0.0), 100)
  assert float(piecewise(10)) == 1 and float(piecewise(60)) == 0
  beta = priors.normalised({"forward": linear, "student": piecewise})(jnp.asarray(60))
  np.testing.assert_allclose(beta, [1, 0])
  assert priors.is_never_drawn(0.0) and not priors.is_never_drawn(("linear", 0.0, 0.5, 1.0))


@pytest.mark.parametrize("call", [
    lambda: priors.schedule(-0.1, 10), lambda: priors.schedule(("linear", 1.0, -1.0, 0.5), 10),
    lambda: priors.schedule(("ramp", 1.0, 0.0, 0.5), 10), lambda: mixture((), lambda s: s),
    lambda: mixture((1, 2), lambda s: s, selection="per_epoch")])
def test_bad_input(call):
  with pytest.raises(UsageError):
    call()


def test_replay_needs_room_and_rollouts():
  parts, objective = pd()
  available = building.sources(parts, objective)
  with pytest.raises(UsageError, match="capacity"):
    replay(available["student"], slots=3, refresh_every=1).init(context())
  with pytest.raises(UsageError, match="no rollouts"):
    replay(available["forward"], slots=3, refresh_every=1)
  assert [s.name for s in available.values()] == list(SOURCES)
