"""The discriminator head: one logit per example from maps of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax.models.base import by_path
from ddil_jax.models.head import DiscriminatorHead


@pytest.mark.parametrize("size, stages", [
    ((8, 8), ["down_0_conv", "rest_conv"]), ((7, 7), ["down_0_conv", "rest_conv"]), ((4, 4), ["rest_conv"]),
    ((2, 2), ["rest_conv"]), ((1, 1), []), ((2, 9), ["down_0_conv", "down_1_conv", "rest_conv"])])
def test_every_feature_matters_and_only_to_its_own_example(size, stages):
  head = DiscriminatorHead()
  features = jax.random.normal(jax.random.key(0), (3, *size, 16))
  params = jax.jit(head.init)(jax.random.key(1), features)
  assert sorted(k for k in params["params"] if k.endswith("_conv")) == stages
  logits = jax.jit(head.apply)(params, features)
  assert logits.shape == (3,) and logits.dtype == jnp.float32
  assert np.std(logits) > 1e-3
  jacobian = np.asarray(jax.jit(jax.jacrev(lambda f: head.apply(params, f)))(features))
  for i in range(3):
    assert np.all(jacobian[i, i] != 0)
    assert np.all(np.delete(jacobian[i], i, axis=0) == 0)


def test_the_shape_of_dmd2s_head_on_an_8x8_bottleneck():
  shapes = jax.eval_shape(DiscriminatorHead().init, jax.random.key(0), jnp.zeros((1, 8, 8, 768)))["params"]
  kernels = {k: v.shape for k, v in by_path(shapes).items() if k.endswith("kernel")}
  assert kernels == {"down_0_conv/kernel": (4, 4, 768, 768), "rest_conv/kernel": (4, 4, 768, 768),
                     "out/kernel": (1, 1, 768, 1)}


def test_every_parameter_gets_a_gradient_in_bfloat16_too():
  head = DiscriminatorHead(channels=24, dtype=jnp.bfloat16)
  features = jax.random.normal(jax.random.key(0), (4, 4, 4, 16), jnp.bfloat16)
  params = jax.jit(head.init)(jax.random.key(1), features)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  loss = lambda p: jnp.mean(jax.nn.softplus(head.apply(p, features)))  # noqa: E731
  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  assert value.dtype == jnp.float32
  assert all(np.any(g) for g in jax.tree.leaves(grads))
