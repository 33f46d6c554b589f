"""The embedding loss: its estimate and gradient, what it is on average, and which images it compares."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax import keys as keys_lib
from ddil_jax.errors import UsageError
from ddil_jax.models.base import layers_of
from ddil_jax.models.classifier import Classifier
from ddil_jax.objectives import embedding_loss
from ddil_jax.objectives.base import IMAGES, FeatureNet, View, make_objective
from ddil_jax.states.base import Context
from tests import building, toys


def test_estimate_and_gradient_are_those_of_the_double_sum():
  rng = np.random.default_rng(0)
  fake, real = (jnp.asarray(rng.standard_normal((5, 3)), jnp.float32) for _ in range(2))

  def double_sum(fake):
    gap = fake - real
    return sum(gap[i] @ gap[j] for i in range(5) for j in range(5) if i != j) / 20

  expected, slope = jax.value_and_grad(double_sum)(fake)
  found, found_slope = jax.value_and_grad(lambda v: embedding_loss.mmd_loss(v, real).mean())(fake)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  np.testing.assert_allclose(found_slope, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_on_average_it_is_the_distance_of_the_means(shift):
  """Over 40,000 batches of 4: |E psi(x) - E psi(y)|^2, also where that is 0 and batches vary."""
  rng = np.random.default_rng(1)
  fake, real = (jnp.asarray(rng.standard_normal((40_000, 4, 2)), jnp.float32) for _ in range(2))
  found = np.asarray(jax.vmap(embedding_loss.mmd_loss)(fake + shift, real)).mean(axis=1)
  assert abs(found.mean() - 2 * shift**2) < 3 * found.std() / len(found) ** 0.5 < 0.03
  assert (found < 0).mean() > 0.1


def test_products_of_embeddings_are_means_over_entries():
  rng = np.random.default_rng(2)
  a, b = (jnp.asarray(rng.standard_normal((3,) + toys.IMAGE), jnp.float32) for _ in range(2))
  net = FeatureNet(None, None, lambda params, x, names: {"map": params * x, "pixel": (params * x)[:, :1, :1]})
  params = jnp.array([1.0, 2.0])
  x, y = (embedding_loss.embed(net, params, images, ("map", "pixel")) for images in (a, b))
  expected = np.mean([[(p * p * u * v).mean((1, 2, 3)) for u, v in ((a, b), (a[:, :1, :1], b[:, :1, :1]))]
                      for p in (1, 2)], axis=(0, 1))
  # Two networks in one map: the mean over both of them too.
  np.testing.assert_allclose((x * y).sum(axis=1), expected, rtol=1e-5)


def test_random_networks_tell_images_apart():
  """The gradient by a shift of all images: towards the real ones from either side, none where they agree."""
  module, n, batch = Classifier(num_classes=3, channels=8), 100, 8
  rng = np.random.default_rng(3)
  fake, real = (jnp.asarray(rng.uniform(-0.5, 0.5, (n, batch, 8, 8, 1)), jnp.float32) for _ in range(2))
  net = FeatureNet(lambda key: module.init(key, fake[0])["params"], None, functools.partial(layers_of, module))

  def loss(shift, fake, real, key):
    params = jax.vmap(net.init)(jax.random.split(key, 2))
    x, y = (embedding_loss.embed(net, params, v, ("conv_0", "features")) for v in (fake + shift, real))
    return embedding_loss.mmd_loss(x, y).mean()

  @jax.jit
  def slopes(shift):
    draws = (fake, real, jax.random.split(jax.random.key(0), n))
    return jax.lax.map(lambda each: jax.grad(loss)(shift, *each), draws)

  below, same, above = (np.asarray(slopes(shift)) for shift in (-0.3, 0.0, 0.3))
  error = same.std() / n**0.5
  assert abs(same.mean()) < 3 * error
  assert below.mean() < -10 * error and above.mean() > 10 * error


def graded(options, teacher):
  """Loss and metrics of the student on forward states."""
  parts = toys.toy_parts()
  objective = make_objective("embedding_loss", parts, options)
  batch = toys.toy_batch(4)
  keys = keys_lib.per_example(jax.random.key(3), batch["lane"])
  params = objective.init(jax.random.key(0), teacher)
  ctx = Context(jnp.zeros((), jnp.int32), jax.random.key(3), keys, batch, params["student"], teacher, 4)
  states = building.sources(parts, objective)["forward"].fresh(ctx)
  view = View(params, {}, teacher, ctx.step, key=ctx.key)
  return jax.jit(lambda own: objective.players[0].loss(own, view, states, batch, keys))(params["student"])


def test_with_one_step_the_walk_is_the_jump():
  """With two it is not."""
  teacher = toys.toy_init(jax.random.key(7))
  found = {(base, steps, images): np.asarray(graded(dict(base=base, num_steps=steps, images=images), teacher)[1]["embedding"])
           for base in ("dmd2", "pd") for steps in (1, 2) for images in IMAGES}
  for base in ("dmd2", "pd"):
    np.testing.assert_allclose(found[base, 1, "walk"], found[base, 1, "jump"], rtol=1e-4, atol=1e-6)
    assert np.abs(found[base, 2, "walk"] - found[base, 2, "jump"]).max() > 1e-4


@pytest.mark.parametrize("base", [pytest.param("dmd2", marks=pytest.mark.slow), "pd"])
def test_it_is_added_to_the_base_method(base):
  """Weight 0 is the method itself, bit for bit; another weight adds the metric so often."""
  parts, teacher = toys.toy_parts(), toys.toy_init(jax.random.key(7))
  none = make_objective("embedding_loss", parts, dict(base=base, num_steps=2, embedding_weight=0.0))
  alone = make_objective(base, parts, dict(num_steps=2))
  found, expected = (building.run(each, building.ddil(parts, each), teacher)[0] for each in (none, alone))
  jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
  small, large = (graded(dict(base=base, num_steps=2, embedding_weight=w), teacher) for w in (0.5, 2.0))
  np.testing.assert_allclose(large[0] - small[0], 1.5 * large[1]["embedding"], rtol=1e-3, atol=1e-5)
  assert float(jnp.abs(large[1]["embedding"]).min()) > 1e-4


@pytest.mark.parametrize("options, message", [
    (dict(images="all"), "images 'all'"), (dict(embedding_weight=-1.0), "embedding_weight -1"),
    (dict(networks=0), "networks 0"), (dict(embedding_layers=()), "embedding_layers"), (dict(base="denoising"), "base 'denoising'"),
    (dict(num_scales=3), "option of objective embedding_loss: 'num_scales'")])
def test_mistakes_are_named(options, message):
  with pytest.raises(UsageError, match=message):
    make_objective("embedding_loss", toys.toy_parts(), options)
