"""Every projection in the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax.diffusion import process, transforms
from ddil_jax.diffusion.process import eps_from_x0
from ddil_jax.errors import UsageError

NAMES = sorted(transforms.PROJECTIONS)


@pytest.mark.parametrize("name", NAMES)
def test_inside_the_box_nothing_changes(name):
  x = jnp.asarray(np.random.default_rng(0).uniform(-0.99, 0.99, (3, 4, 4, 2)), jnp.float32)
  np.testing.assert_array_equal(transforms.projection(name)(x), x)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "identity"])
def test_outside_lands_in_the_box(name):
  x = jnp.asarray(4 * np.random.default_rng(1).standard_normal((3, 4, 4, 2)), jnp.float32)
  out = transforms.projection(name)(x)
  assert float(jnp.abs(out).max()) <= 1 + 1e-6
  assert float(jnp.abs(out - x).max()) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_pair_of_x0_and_eps_stays_consistent(name):
  """x_t = alpha x0 + sigma eps after the transform, with eps recomputed."""
  p = process.cosine()
  t = jnp.array([0.2, 0.6, 0.9])
  x_t = jnp.asarray(np.random.default_rng(2).standard_normal((3, 4, 4, 2)), jnp.float32)
  denoise = transforms.reflect(transforms.projection(name))(lambda x, t, cond: 3 * x)
  x0 = denoise(x_t, t, {})
  rebuilt = process.add_noise(p, x0, eps_from_x0(p, x_t, x0, t), t)
  np.testing.assert_allclose(rebuilt, x_t, atol=1e-5)


@pytest.mark.parametrize("name,outside", [("identity", 1.0), ("clip", 0.0), ("fold", -1.0)])
def test_gradient_outside_the_box(name, outside):
  project = transforms.projection(name)
  slope = lambda f: jax.grad(lambda v: f(v).sum())(jnp.full((1, 1, 1, 1), 1.5))  # noqa: E731
  assert float(slope(project)[0, 0, 0, 0]) == outside
  through = transforms.straight_through(project)
  assert float(slope(through)[0, 0, 0, 0]) == 1.0
  np.testing.assert_array_equal(through(jnp.full((1, 1, 1, 1), 1.5)), project(jnp.full((1, 1, 1, 1), 1.5)))


@pytest.mark.parametrize("name", ["clip", "dynamic", "fold"])
def test_per_channel_bounds(name):
  x = jnp.asarray([[[[-3.0, -3.0]]], [[[3.0, 3.0]]]])
  out = transforms.projection(name, lo=(-1.0, -2.0), hi=(1.0, 2.5))(x)
  assert float(out[..., 0].min()) >= -1 and float(out[..., 0].max()) <= 1
  assert float(out[..., 1].min()) >= -2 and float(out[..., 1].max()) <= 2.5


def test_fold_is_periodic():
  x = jnp.linspace(-0.9, 0.9, 7).reshape(1, 7, 1, 1)
  fold = transforms.fold()
  np.testing.assert_allclose(fold(x + 4), x, atol=1e-6)  # period 2 on the unit scale is 4 on [-1, 1]
  np.testing.assert_allclose(fold(2 - x), x, atol=1e-6)


def test_dynamic_keeps_the_quantile():
  """A sample far out is scaled by its own quantile, another in the same batch is untouched."""
  x = jnp.stack([jnp.linspace(-4, 4, 16).reshape(4, 4, 1), jnp.linspace(-0.5, 0.5, 16).reshape(4, 4, 1)])
  out = transforms.dynamic(percentile=1.0)(x)
  np.testing.assert_allclose(out[0], x[0] / 4, atol=1e-6)
  np.testing.assert_array_equal(out[1], x[1])


def test_guidance_convention():
  """u + g (c - u); g = 1 costs one call; per-sample scales are read from the condition and hidden."""
  calls = []

  def denoise(x, t, cond):
    calls.append(sorted(cond))
    return jnp.full_like(x, 3.0) if int(cond["label"][0]) == 1 else jnp.full_like(x, 1.0)

  x, t, cond = jnp.zeros((2, 1, 1, 1)), jnp.ones(2), {"label": jnp.array([1, 1])}
  null = lambda c: {**c, "label": jnp.zeros_like(c["label"])}  # noqa: E731
  assert float(transforms.guidance(2.5, null)(denoise)(x, t, cond)[0, 0, 0, 0]) == 1 + 2.5 * 2
  assert len(calls) == 2
  transforms.guidance(1.0, null)(denoise)(x, t, cond)
  assert len(calls) == 3
  out = transforms.guidance(None, null)(denoise)(x, t, cond | {"guidance_scale": jnp.array([0.0, 3.0])})
  np.testing.assert_array_equal(out[:, 0, 0, 0], [1.0, 7.0])
  assert calls[-1] == ["label"]


@pytest.mark.parametrize("make", [lambda: transforms.projection("klip"), lambda: transforms.clip(1.0, -1.0),
                                  lambda: transforms.dynamic(percentile=1.5)])
def test_bad_input(make):
  with pytest.raises(UsageError):
    make()
