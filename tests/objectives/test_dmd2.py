"""DMD2's GAN balance, and what it measures of itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import process
from ddil_jax.errors import UsageError
from ddil_jax.models import exact
from ddil_jax.objectives import dmd2
from ddil_jax.objectives.base import View, time_table
from ddil_jax.states.base import Context
from ddil_jax.training.step import init_state, make_diagnose
from tests import building, toys

SIZE = 4


def images(params, x_t, t, cond, keys=None, features=()):
  """A student whose images are its parameters: gradients by them are gradients at the generated image."""
  return params["image"]


@pytest.fixture(scope="module")
def setting():
  parts = toys.toy_parts(student=images)
  rng = np.random.default_rng(0)
  image = jnp.asarray(rng.uniform(-1, 1, (SIZE,) + toys.IMAGE), jnp.float32)
  parts = parts._replace(init_student=lambda key, teacher: {"image": image})
  batch, key = toys.toy_batch(SIZE), jax.random.key(3)
  keys = keys_lib.per_example(key, batch["lane"])
  objective = dmd2.make(parts, gan_weight=0.5)
  teacher = toys.toy_init(jax.random.key(7))
  params = objective.init(key, teacher)
  params["critic"] = jax.tree.map(lambda v: v + 0.1 * jnp.cos(jnp.arange(v.size).reshape(v.shape)), params["critic"])
  view = View(params, {}, teacher, jnp.zeros((), jnp.int32))
  ctx = Context(view.step, key, keys, batch, params["student"], teacher, SIZE)
  return parts, view, building.sources(parts, objective)["forward"].fresh(ctx), ctx


def by_image(setting, **options):
  """Per sample, the derivative of the loss by the generated image; and the metrics."""
  parts, view, states, ctx = setting
  loss = dmd2.make(parts, **options).players[0].loss
  total = lambda params: (lambda loss, metrics: (loss.sum(), metrics))(*loss(params, view, states, ctx.batch, ctx.keys))  # noqa: E731
  grads, metrics = jax.grad(total, has_aux=True)(view.params["student"])
  return np.asarray(grads["image"], np.float64), metrics


def length(gradient):
  return np.sqrt(np.sum(gradient**2, axis=(1, 2, 3)))


def test_auto_balance_sets_the_length_of_the_gan_gradient(setting):
  matching, _ = by_image(setting, gan_weight=0.0)
  fixed, plain = by_image(setting, gan_weight=0.5)
  auto, metrics = by_image(setting, gan_weight=0.25, gan_balance="auto")
  of_gan = auto - matching
  np.testing.assert_allclose(length(of_gan), 0.25 * length(matching), rtol=1e-4)
  gan = (fixed - matching) / 0.5  # the GAN loss by itself
  cosine = np.sum(of_gan * gan, axis=(1, 2, 3)) / (length(of_gan) * length(gan))
  np.testing.assert_allclose(cosine, 1, rtol=1e-5)
  np.testing.assert_allclose(metrics["gan_balance"], length(matching) / length(gan), rtol=1e-4)
  np.testing.assert_allclose(metrics["gan"], plain["gan"], rtol=1e-6)
  assert "gan_balance" not in plain


def test_auto_balance_is_limited(setting):
  matching, _ = by_image(setting, gan_weight=0.0)
  fixed, _ = by_image(setting, gan_weight=0.5)
  limited, metrics = by_image(setting, gan_weight=0.25, gan_balance="auto", gan_balance_limit=0.05)
  np.testing.assert_array_equal(metrics["gan_balance"], np.float32(0.05))
  np.testing.assert_allclose(limited - matching, 0.25 * 0.05 / 0.5 * (fixed - matching), atol=1e-7)
  same = jnp.ones((2, 1, 1, 1))
  np.testing.assert_array_equal(dmd2.balance(same, 0 * same, 7.0), 7)  # no gradient of the GAN term
  np.testing.assert_array_equal(dmd2.balance(0 * same, same), 0)


def test_auto_balance_does_not_depend_on_the_batch(setting):
  """Each sample has its own weight, so that any split over devices gives the same."""
  parts, view, states, ctx = setting
  loss = dmd2.make(parts, gan_weight=0.25, gan_balance="auto").players[0].loss
  whole, _ = loss(view.params["student"], view, states, ctx.batch, ctx.keys)
  image, states, batch, keys = jax.tree.map(lambda v: v[2:], (view.params["student"], states, ctx.batch, ctx.keys))
  half, _ = loss(image, view, states, batch, keys)
  np.testing.assert_allclose(half, whole[2:], rtol=1e-5)


def test_unknown_balance():
  with pytest.raises(UsageError, match="'atuo'; did you mean auto"):
    dmd2.make(toys.toy_parts(), gan_balance="atuo")


def test_gradient_norms_at_the_generated_image(setting):
  parts, view, states, ctx = setting
  matching, _ = by_image(setting, gan_weight=0.0)
  fixed, _ = by_image(setting, gan_weight=0.5)
  found = dmd2.make(parts, gan_weight=0.5).diagnose(view, states, ctx)
  np.testing.assert_allclose(found["dm_gradient_norm"], length(matching), rtol=1e-5)
  np.testing.assert_allclose(found["gan_gradient_norm"], length(fixed - matching) / 0.5, rtol=1e-4)
  assert "gan_gradient_norm" not in dmd2.make(parts).diagnose(view, states, ctx)


# Critic lag

STD, BIAS, COUNT = 0.5, 3.0, 20_000


def biased(params, x_t, t, cond, keys=None, features=()):
  """Images N(0, c^2) from forward states of data N(0, c^2), but for a bias at the first step."""
  t = process.expand(t, x_t)
  return jnp.where(t > 0.75, STD * x_t + params["bias"], STD * x_t / jnp.sqrt((1 - t) ** 2 * STD**2 + t**2))


def lag(source, bias):
  """Mean scores of the exact critic of N(0, c^2) for the biased student, on training states of a source."""
  p = process.flow()
  critic = exact.gaussian(p, 0.0, STD)
  parts = toys.toy_parts(p, teacher=critic, student=biased)._replace(
      image_shape=(1, 1, 1), critic=critic, init_critic=lambda key, teacher: critic.params,
      init_student=lambda key, teacher: {"bias": jnp.float32(bias)})
  objective = dmd2.make(parts, num_steps=2, critic_weight="constant")
  distribution = building.on_policy(building.sources(parts, objective)[source])
  rng = np.random.default_rng(0)
  batch = {"image": STD * rng.standard_normal((COUNT, 1, 1, 1)).astype(np.float32),
           "lane": np.arange(COUNT, dtype=np.int32)}
  optimizers = {player.name: optax.sgd(0.1) for player in objective.players}
  state = init_state(objective, distribution, optimizers, {}, jax.random.key(0), critic.params, batch)
  found = jax.jit(make_diagnose(objective, distribution, COUNT))(state, {"teacher": critic.params}, batch,
                                                                 jax.random.key(5))
  return {name.removeprefix("diagnose/"): float(m.total / m.count) for name, m in found.items()}


def test_critic_lag_of_a_known_critic():
  """The critic is exact for the images that it is trained on. A bias of the first step moves those that the
  student makes on its way: of half of the fresh states, by b/2 c/sqrt(v) after the second step.
  """
  found = lag("forward", 0.0)
  assert abs(found["critic_lag"]) < 0.02 * found["score_training"]
  found = lag("forward", BIAS)
  t = np.asarray(time_table(process.flow()))
  error = 1 - (1 - t) ** 2 * STD**2 / ((1 - t) ** 2 * STD**2 + t**2)  # of the exact critic on an offset of 1
  offset = BIAS / 2 * STD / np.sqrt(0.25 * STD**2 + 0.25)
  expected = 0.5 * np.mean(error**2) * offset**2
  np.testing.assert_allclose(found["critic_lag"], expected, rtol=0.05)
  np.testing.assert_allclose(found["score_fresh"] - found["score_training"], found["critic_lag"], rtol=1e-4)


def test_no_lag_on_the_students_own_fresh_states():
  assert lag("student", BIAS)["critic_lag"] == 0
