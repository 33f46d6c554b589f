"""Embeddings, group normalisation and dropout against plain numpy and flax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax.models import layers


@pytest.mark.parametrize("dim", [7, 8, 32])
def test_sinusoidal_embedding_is_the_formula(dim):
  values = np.array([0.0, 0.5, 3.0, 12.0])
  half = dim // 2
  angles = 1000 * values[:, None] * np.exp(-np.arange(half) * np.log(1e4) / (half - 1))
  expected = np.zeros((4, dim))
  expected[:, :half], expected[:, half:2 * half] = np.sin(angles), np.cos(angles)
  # 1000 w reaches 12,000, where a float32 angle is off by up to 5e-4.
  single = layers.guidance_embedding(jnp.array(values, jnp.float32), dim)
  np.testing.assert_allclose(single, expected, atol=2e-3)
  with jax.enable_x64(True):
    np.testing.assert_allclose(layers.guidance_embedding(jnp.array(values), dim), expected, atol=1e-9)
    plain = layers.sinusoidal_embedding(jnp.array(1000 * values), dim)
    np.testing.assert_allclose(plain, expected, atol=1e-9)


def test_sinusoidal_embedding_takes_integers_and_the_smallest_widths():
  out = layers.sinusoidal_embedding(jnp.array([0, 999]), 16)
  np.testing.assert_allclose(out, layers.sinusoidal_embedding(jnp.array([0.0, 999.0]), 16))
  assert layers.sinusoidal_embedding(jnp.array([1, 2]), 3).shape == (2, 3)
  assert np.all(np.isfinite(layers.sinusoidal_embedding(jnp.array([1, 2]), 2)))


@pytest.mark.parametrize("channels", [1, 7, 8, 10, 24, 48, 320, 1280])
def test_number_of_groups_divides(channels):
  groups = layers.num_groups(channels)
  assert channels % groups == 0 and 1 <= groups <= 32
  assert channels < 4 or channels // groups >= 4


def test_group_norm_is_flax_group_norm_then_scale_and_shift():
  key = jax.random.key(0)
  x = 3 + 2 * jax.random.normal(key, (3, 5, 4, 24))
  film = jax.random.normal(jax.random.key(1), (3, 48))
  gain, bias = jax.random.normal(jax.random.key(2), (2, 24))
  params = {"params": {"scale": gain, "bias": bias}}
  plain = nn.GroupNorm(layers.num_groups(24), epsilon=1e-5).apply(params, x)
  np.testing.assert_allclose(layers.GroupNorm().apply(params, x), plain, atol=2e-5)
  scale, shift = film[:, None, None, :24], film[:, None, None, 24:]
  out = layers.GroupNorm().apply(params, x, film)
  np.testing.assert_allclose(out, plain * (1 + scale) + shift, atol=5e-5)


def test_group_norm_survives_a_constant_map():
  value, grad = jax.value_and_grad(
      lambda x: layers.GroupNorm().apply({"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}, x).sum())(
          jnp.full((1, 4, 4, 8), 1e3))
  assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_dropout_keeps_the_mean_and_drops_the_rate():
  keys = jax.random.split(jax.random.key(0), 4)
  out = layers.dropout(jnp.ones((4, 40, 40, 4)), 0.25, keys)
  np.testing.assert_allclose(np.mean(np.asarray(out) == 0), 0.25, atol=0.01)  # 25,600 draws: 3.7 sigma
  np.testing.assert_allclose(np.unique(out), [0, 4 / 3], rtol=1e-6)
  assert not np.array_equal(out[0], out[1])


def test_dropout_of_an_example_depends_on_its_key_only():
  keys = jax.random.split(jax.random.key(0), 6)
  x = jax.random.normal(jax.random.key(1), (6, 3, 3, 2))
  order = jnp.array([4, 0, 5])
  picked = layers.dropout(x, 0.5, keys)[order]
  np.testing.assert_array_equal(picked, layers.dropout(x[order], 0.5, keys[order]))
  assert layers.dropout(x, 0.5, None) is x and layers.dropout(x, 0.0, keys) is x
