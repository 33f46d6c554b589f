"""The classifier of the metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddil_jax.models.classifier import Classifier


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
def test_shapes(shape):
  net = Classifier(num_classes=7)
  x = jnp.zeros((2, *shape))
  params = jax.eval_shape(net.init, jax.random.key(0), x)
  logits, features = jax.eval_shape(net.apply, params, x)
  assert logits.shape == (2, 7) and features.shape == (2, 32)
  assert logits.dtype == features.dtype == jnp.float32


def test_it_can_tell_random_images_apart():
  net = Classifier(num_classes=4)
  x = jax.random.uniform(jax.random.key(0), (16, 8, 8, 1), minval=-1, maxval=1)
  y = jnp.arange(16) % 4
  params = jax.jit(net.init)(jax.random.key(1), x)
  optimizer = optax.adam(1e-2)

  def loss(params):
    logits, _ = net.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  @jax.jit
  def step(params, state):
    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  for _ in range(60):
    params, state = step(params, state)
  logits, features = jax.jit(net.apply)(params, x)
  np.testing.assert_array_equal(jnp.argmax(logits, -1), y)
  # An example's features do not depend on its neighbours in the batch.
  np.testing.assert_allclose(jax.jit(net.apply)(params, x[3:5])[1], features[3:5], atol=1e-4)
