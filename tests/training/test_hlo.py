"""Counted operations: those of XLA where there is no loop; loops and branches as they run."""

import jax
import jax.numpy as jnp
import pytest

from ddil_jax.training import hlo


def of(fn, *arguments) -> hlo.Range:
  return hlo.operations(jax.jit(fn).lower(*arguments).compile().as_text())


def convolve(x, w, **options):
  return jax.lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"),
                                      **{"window_strides": (1, 1), "padding": "SAME"} | options)


@pytest.mark.parametrize("options, channels", [
    ({}, 16), ({"window_strides": (2, 2)}, 16), ({"padding": "VALID", "rhs_dilation": (2, 1)}, 16),
    ({"lhs_dilation": (2, 2), "padding": ((1, 2), (1, 2))}, 16), ({"feature_group_count": 4}, 4)],
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
  x, w, product = jnp.ones((4, 64, 64)), jnp.ones((4, 64, 64)), 2 * 4 * 64 * 64 * 64
  multiply = lambda x, w: jnp.einsum("bij,bjk->bik", x, w)  # noqa: E731
  assert of(multiply, x, w) == (product, product)
  loop = lambda x, w: jax.lax.scan(lambda x, _: (jnp.sin(multiply(x, w)), None), x, length=5)[0]  # noqa: E731
  assert of(loop, x, w) == (5 * product, 5 * product)
  # Forward, and backward the gradients by x and w, in each round.
  assert of(jax.grad(lambda w: loop(x, w).sum()), w).least == 15 * product
  chosen = lambda x, w, due: jax.lax.cond(due, loop, multiply, x, w)  # noqa: E731
  assert of(chosen, x, w, True) == (product, 5 * product)
  # What is written twice is computed once.
  assert of(lambda x, w: multiply(x, w) + jnp.cos(multiply(x, w)), x, w).least == product


TPU = """
%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %x = f32[8,8]{1,0:T(8,128)S(1)} parameter(0)
  %y = f32[8,8]{1,0:T(8,128)} convolution(%x, %x), dim_labels=bf_io->bf, metadata={op_name="jit(step)/dot"}
}
%condition (p: (s32[], f32[8,8])) -> pred[] {
  %constant.1.clone = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1.clone), direction=LT, backend_config={"flag_configs":[]}
}
ENTRY %main (p: f32[8,8]) -> f32[8,8] {
  %w = (s32[], f32[8,8]) while(%t), condition=%condition, body=%body, metadata={op_name="jit(step)/while"}
  %v = (s32[], f32[8,8]) while(%t), condition=%unknown, body=%body
}
"""


def test_loops_of_tpu_programs_are_as_long_as_their_conditions_say():
  """And run once where that is not known; a product may be written as a convolution without a window."""
  assert hlo.operations(TPU).least == (7 + 1) * 2 * 8 * 8 * 8
