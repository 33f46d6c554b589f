"""Shifted time steps: the time is found from x_t alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax import build as build_lib
from ddil_jax import config as config_lib
from ddil_jax import config_checks
from ddil_jax import measure, samplers
from ddil_jax.diffusion import process, transforms
from ddil_jax.errors import UsageError


def seen_times(transform, x, t):
  """The times that the denoiser is asked at."""
  seen = []

  def denoise(x_t, t, cond):
    seen.append(t)
    return x_t

  transform(denoise)(x, t, {})
  return np.asarray(seen[0])


@pytest.mark.parametrize("made, variance", [(process.cosine(), 0.3), (process.edm(), 0.25), (process.flow(), 0.0)])
def test_it_finds_the_time_at_which_a_state_was_made(made, variance):
  """States of Gaussian data at t + d, said to be at t."""
  true = jnp.linspace(0.4, 0.6, 5) * made.t_max
  x0, eps = (jax.random.normal(jax.random.key(i), (5, 200, 200, 1)) for i in range(2))
  x = process.add_noise(made, variance**0.5 * x0, eps, true)
  said, window = jnp.full(5, 0.5 * made.t_max), 0.2 * made.t_max
  found = seen_times(transforms.shift_time(made, window, data_variance=variance), x, said)
  np.testing.assert_allclose(found, true, atol=0.02 * made.t_max)
  assert np.abs(found - said).max() > 0.05 * made.t_max
  # Not below the cutoff, and no farther than the window.
  np.testing.assert_array_equal(seen_times(transforms.shift_time(made, window, cutoff=0.5 * made.t_max), x, said), said)
  near = seen_times(transforms.shift_time(made, 0.01 * made.t_max, data_variance=variance), x, said)
  np.testing.assert_allclose(np.abs(near[[0, -1]] - said[0]), 0.01 * made.t_max, rtol=1e-4)


def test_no_window_is_no_change():
  denoise = lambda x, t, cond: x  # noqa: E731
  assert transforms.shift_time(process.cosine(), 0.0)(denoise) is denoise
  with pytest.raises(UsageError, match="window -1 must be at least 0"):
    transforms.shift_time(process.cosine(), -1.0)


def test_in_a_run():
  """The sampler's first step is moved by its window; the row's name says so."""
  load = lambda **fields: config_lib.load("configs/digits_teacher.py:smoke", {  # noqa: E731
      f"eval.{name}": str(value) for name, value in ({"sampler_steps": ()} | fields).items()})
  built = build_lib.build(load())
  params = jax.tree.map(lambda v: v + 0.1 * jnp.cos(jnp.arange(v.size)).reshape(v.shape),
                        built.parts.init_student(jax.random.key(0), None))
  keys, cond = jax.random.split(jax.random.key(2), 3), {"label": jnp.arange(3)}
  draw = lambda config: np.asarray(samplers.samplers(config, built, 2)[0].sample(params, keys, cond))  # noqa: E731
  plain, moved = draw(load()), draw(load(time_shift=0.1))
  assert np.abs(plain - moved).max() > 1e-3
  np.testing.assert_array_equal(plain, draw(load(time_shift=0.1, time_shift_cutoff=2.0)))
  assert measure.variant(load(time_shift=0.1), built) == "+shifted(0.1)" and measure.variant(load(), built) == ""
  with pytest.raises(UsageError, match="config.eval.time_shift: time shift: window -0.1"):
    config_checks.check_evaluation(load(time_shift=-0.1), built)
