"""Several students for one method: what one is, who learns from what, and what two can do that one cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import process
from ddil_jax.errors import UsageError
from ddil_jax.models import exact
from ddil_jax.objectives import msd
from ddil_jax.objectives.base import View, bind, make_objective
from ddil_jax.states.base import Context
from ddil_jax.states.replay import on_policy
from ddil_jax.training.step import init_state, make_train_step
from tests import building, toys

OPTIONS = {"pd": dict(num_steps=4), "dmd2": dict(num_steps=2, period=1, gan_weight=0.1), "ctm": dict(num_scales=9)}


@pytest.mark.parametrize("base", ["pd", *(pytest.param(base, marks=pytest.mark.slow) for base in ("ctm", "dmd2"))])
def test_one_student_is_the_base_method(base):
  """Training, states and sampler."""
  parts, teacher = toys.toy_parts(), toys.toy_init(jax.random.key(7))
  one = msd.make(parts, students=1, base=base, **OPTIONS[base])
  alone = make_objective(base, parts, OPTIONS[base])
  assert (one.name, one.own_source, one.reads) == ("msd", alone.own_source, alone.reads)
  found, expected = (building.run(each, building.ddil(parts, each), teacher)[0].params for each in (one, alone))
  found["student"] = jax.tree.map(lambda v: v[0], found["student"])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_student_learns_from_its_own_conditions(vectorize):
  """Its output is that of its network, and on a batch without its classes it has no gradient."""
  parts, teacher = toys.toy_parts(), toys.toy_init(jax.random.key(7))
  objective = msd.make(parts, students=2, partition=(1, 0, 1), num_steps=2, period=1, vectorize=vectorize)
  batch = toys.toy_batch(4) | {"label": np.array([0, 2, 2, 0], np.int32)}  # of student 1 alone
  keys = keys_lib.per_example(jax.random.key(3), batch["lane"])
  # They start as copies of the teacher, and so does the critic.
  wave = lambda v: v + 0.1 * jnp.cos(jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape)  # noqa: E731
  params = jax.tree.map(wave, objective.init(jax.random.key(0), teacher))
  ctx = Context(jnp.zeros((), jnp.int32), jax.random.key(3), keys, batch, params["student"], teacher, 4)
  states = building.sources(parts, objective)["forward"].fresh(ctx)

  second = jax.tree.map(lambda v: v[1], params["student"])
  found, other = (bind(denoiser, own)(states.x_t, states.t, states.cond)
                  for denoiser, own in ((objective.student, params["student"]), (parts.student, second)))
  np.testing.assert_allclose(found, other, rtol=1e-5, atol=1e-6)

  view = View(params, {}, teacher, jnp.zeros((), jnp.int32))
  gradient = jax.grad(lambda own: objective.players[0].loss(own, view, states, batch, keys)[0].sum())(params["student"])
  for leaf in jax.tree.leaves(gradient):
    np.testing.assert_array_equal(leaf[0], 0)
  assert all(float(jnp.abs(gradient[name][1]).max()) > 1e-6 for name in ("W1", "W2", "time"))


def test_classes_that_follow_each_other_belong_together():
  assert msd.consecutive(10, 4) == (0, 0, 0, 1, 1, 2, 2, 2, 3, 3)
  for students in range(1, 11):
    sizes = np.bincount(msd.consecutive(10, students))
    assert len(sizes) == students and sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("students", [1, 2])
def test_two_students_reach_what_one_cannot(students):
  """Students x = a z + b without an eye for classes, on classes with means -0.6 and 0.6 and deviation 0.3."""
  p, means, std = process.flow(), np.array([-0.6, 0.6]), 0.3
  teacher = exact.mixture(p, means, std, labels=[0, 1])
  critic = exact.mixture(p, -0.2 * means, 0.8, labels=[0, 1])

  def student(params, x_t, t, cond, keys=None, features=()):
    return params["a"] * x_t + params["b"]

  parts = toys.toy_parts(p, teacher=teacher, student=student)._replace(
      critic=teacher, image_shape=(1, 1, 1), num_classes=2, init_critic=lambda key, params: dict(critic.params),
      init_student=lambda key, params: {"a": jnp.asarray(0.8), "b": jnp.asarray(0.1)})
  objective = msd.make(parts, students=students, base="diff_instruct", num_steps=1, critic_weight="constant")
  n = 256
  batch = {"image": np.zeros((n, 1, 1, 1), np.float32), "label": np.arange(n, dtype=np.int32) % 2,
           "lane": np.arange(n, dtype=np.int32)}
  distribution = on_policy(building.sources(parts, objective)["student"])
  rates = {"student": optax.adam(optax.linear_schedule(2e-2, 0, 400)),
           "critic": optax.adam(optax.linear_schedule(5e-2, 0, 400))}
  step = make_train_step(objective, distribution, rates, {}, n)
  state = init_state(objective, distribution, rates, {}, jax.random.key(0), teacher.params, batch)

  @jax.jit
  def train(state):
    def body(i, state):
      return step(state, {"teacher": teacher.params}, batch, jax.random.key(1), ("student", "critic"))[0]
    return jax.lax.fori_loop(0, 400, body, state)

  found = jax.device_get(train(state).params["student"])
  expected = means if students == 2 else means[:1] * 0
  np.testing.assert_allclose(found["b"], expected, atol=0.05)
  if students == 2:
    np.testing.assert_allclose(np.abs(found["a"]), std, atol=0.05)


@pytest.mark.parametrize("options, message", [
    (dict(students=4), "students 4"), (dict(students=0), "students 0"), (dict(partition=(0, 1)), "partition"),
    (dict(partition=(0, 0, 0)), "partition"), (dict(partition=(0, 1, 2)), "partition"),
    (dict(base="agd"), "base 'agd'"), (dict(base="denoising"), "base 'denoising'"), (dict(base="dmd3"), "dmd2"),
    (dict(num_scales=3), "option of objective dmd2: 'num_scales'")])
def test_mistakes_are_named(options, message):
  with pytest.raises(UsageError, match=message):
    msd.make(toys.toy_parts(), **options)


def test_a_mistaken_option_is_looked_for_in_both():
  parts = toys.toy_parts()
  assert make_objective("msd", parts, dict(base="sid", students=3, alpha=1.2)).name == "msd"
  with pytest.raises(UsageError, match="option of objective msd: 'studens'; did you mean students.*critic_scale"):
    make_objective("msd", parts, dict(base="sid", studens=2))


def test_data_without_classes_has_nothing_to_divide():
  with pytest.raises(UsageError, match="number of classes, 0"):
    msd.make(toys.toy_parts()._replace(num_classes=0))
