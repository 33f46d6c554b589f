"""LPIPS apart from its parity with PyTorch, which tests/interop/test_extractors.py has."""

import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax.models import lpips


def test_unit_vectors_have_finite_gradients():
  f = np.random.default_rng(0).standard_normal((1, 2, 2, 5)).astype(np.float32)
  f[0, 0, 1] = 0
  u = lpips.unit(jnp.asarray(f))
  np.testing.assert_allclose(np.sum(np.square(u), axis=-1).ravel(), [1, 0, 1, 1], atol=1e-6)
  gradient = jax.grad(lambda f: jnp.sum(lpips.unit(f) * jnp.arange(5.0).reshape(1, 1, 1, 5)))(jnp.asarray(f))
  assert np.isfinite(gradient).all() and np.abs(gradient[0, 0, 0]).max() > 0.1


def test_grey_images_are_repeated():
  module = lpips.LPIPS("alex")
  grey = jax.ShapeDtypeStruct((2, 40, 31, 1), jnp.float32)
  (logits, embedding), variables = jax.eval_shape(module.init_with_output, jax.random.key(0), grey)
  assert logits.shape == (2, 0) and embedding.shape == (2, 7 * 9 * 64 + 3 * 4 * 192 + 384 + 256 + 256)
  assert variables["params"]["features"]["0"]["kernel"].shape == (11, 11, 3, 64)
