"""Counted operations: those of XLA where there is no loop; loops and branches as they run."""

import jax
import jax.numpy as jnp
import pytest

from ddil_jax.training.operations import Operations, count


def of(fn, *arguments) -> Operations:
  return count(jax.make_jaxpr(fn)(*arguments))


def convolve(x, w, **options):
  return jax.lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"),
                                      **{"window_strides": (1, 1), "padding": "SAME"} | options)


@pytest.mark.parametrize("options, channels", [
    ({}, 16), ({"window_strides": (2, 2)}, 16), ({"padding": "VALID", "rhs_dilation": (2, 1)}, 16),
    ({"lhs_dilation": (2, 2)}, 16), ({"feature_group_count": 4}, 4)],
    ids=["same", "strided", "dilated kernel", "dilated image", "groups"])
def test_convolutions_and_their_gradients_are_those_of_xla(options, channels):
  x, w = jnp.ones((8, 9, 8, 16)), jnp.ones((3, 3, channels, 32))
  forward = lambda x, w: convolve(x, w, **options)  # noqa: E731
  both = jax.grad(lambda x, w: (forward(x, w) * 3.0).sum(), argnums=(0, 1))
  for fn in (forward, both):
    found = of(fn, x, w)
    assert found.least == found.most > 0
    assert found.least == pytest.approx(jax.jit(fn).lower(x, w).cost_analysis()["flops"], rel=0.02)


def test_products_loops_and_branches():
  a, product = jnp.ones((4, 8, 8)), 2 * 4 * 8 * 8 * 8
  multiply = lambda x: jnp.einsum("bij,bjk->bik", x, a)  # noqa: E731
  assert of(multiply, a) == (product, product)
  looped = lambda x: jax.lax.scan(lambda x, _: (multiply(x), None), x, length=5)[0]  # noqa: E731
  assert of(looped, a).least == 5 * product
  # Backward: the gradient by x alone, in each round.
  assert of(jax.grad(lambda x: looped(x).sum()), a).least == 10 * product
  again = jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(multiply(jnp.sin(multiply(x)))))(x).sum())
  assert of(again, a).least in (5 * product, 6 * product)  # what is computed anew counts again
  chosen = lambda x, due: jax.lax.cond(due, looped, multiply, x)  # noqa: E731
  assert of(jax.jit(chosen), a, True) == (product, 5 * product)
