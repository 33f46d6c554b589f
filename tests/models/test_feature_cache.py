"""Caches of a UNet's deep features: the same network where nothing is old, less work elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import feature_cache, prediction, process, solvers, transforms
from ddil_jax.diffusion.rollout import rollout
from ddil_jax.errors import UsageError
from ddil_jax.models.base import as_net_fn
from ddil_jax.models.unet import UNet
from tests.models.test_unet import noisy

MODULE = UNet(out_channels=1, channels=8, channel_mult=(1, 2), num_res_blocks=2, num_classes=10)
STEPS = 8


@pytest.fixture(scope="module")
def network():
  """(apply, params, x, t, cond) on odd maps."""
  net = as_net_fn(MODULE)
  params = noisy(net.init(jax.random.key(0), (7, 7, 1)))
  x = jax.random.normal(jax.random.key(1), (3, 7, 7, 1))
  return net.apply, params, x, jnp.array([900.0, 500.0, 20.0]), {"label": jnp.array([1, 2, 3])}


@pytest.mark.parametrize("name", MODULE.cache_names())
def test_features_of_the_same_input_give_the_same_output_for_less_work(network, name):
  apply, params, x, t, cond = network
  out, found = apply(params, x, t, cond, None, (name,))
  np.testing.assert_allclose(apply(params, x, t, cond, None, (), found), out, atol=1e-5)
  other = apply(params, x + 1, t, cond)
  taken = apply(params, x + 1, t, cond, None, (), found)
  assert np.abs(taken - other).max() > 1e-3  # the old features are read

  def operations(*reuse):
    return jax.jit(apply, static_argnums=5).lower(params, x, t, cond, None, (), *reuse).cost_analysis()["flops"]

  assert operations(found) < 0.97 * operations()


def walk(network, name, full, scale):
  """The end of 8 DDIM steps, with a cache or (full=None) without."""
  apply, params, _, _, cond = network
  p = process.cosine()
  denoiser = prediction.make_denoiser(apply, p, prediction.v())
  guide = transforms.guidance(scale, lambda cond: {**cond, "label": jnp.full_like(cond["label"], 10)})
  policy = lambda denoise: solvers.ddim()(p, transforms.reflect(transforms.clip())(guide(denoise)))  # noqa: E731
  keys = keys_lib.per_example(jax.random.key(2), jnp.arange(3))
  x = jax.random.normal(jax.random.key(3), (3, 7, 7, 1))

  @jax.jit
  def run(params, x):
    chosen = policy(lambda x_t, t, cond: denoiser(params, x_t, t, cond))
    if full is not None:
      chosen = feature_cache.cached_policy(policy, denoiser, params, (name,), full, STEPS, cond)
    return rollout(chosen, x, np.linspace(1, 0, STEPS + 1), cond, keys)

  return run(params, x)


@pytest.mark.parametrize("name, scale", [("deep0", 3.0), ("skips", 1.0)])
def test_every_step_full_is_the_sampler_itself_and_rarer_ones_are_further_off(network, name, scale):
  """Guidance keeps the features of both of its calls."""
  exact = walk(network, name, None, scale)

  def error(interval):
    return float(jnp.abs(walk(network, name, feature_cache.every(STEPS, interval), scale) - exact).max())

  assert error(1) < 1e-6
  assert 1e-3 < error(2) < error(4) < error(8)


@pytest.mark.parametrize("make, said", [
    (lambda: feature_cache.around(10, 10, 5, 1.2), "no 10 of 10 steps"),
    (lambda: feature_cache.keys("4", 50), "there are: 100ls"),
    (lambda: feature_cache.cached_policy(None, None, None, ("deep0",), [1, 3], 4, {}), "the first is 0"),
    (lambda: feature_cache.cached_policy(None, None, None, ("deep0",), [0, 4], 4, {}), "the last below 4")])
def test_mistakes_are_named(make, said):
  with pytest.raises(UsageError, match=said):
    make()


def test_a_feature_that_cannot_be_taken_is_named(network):
  apply, params, x, t, cond = network
  with pytest.raises(UsageError, match="'deep4'; there are: .*deep3"):
    apply(params, x, t, cond, None, (), {"deep4": x})
