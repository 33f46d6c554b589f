import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import process, times
from ddil_jax.errors import UsageError
from ddil_jax.objectives import denoising
from tests import toys

U = (jnp.arange(10_000) + 0.5) / 10_000  # quantiles


def test_lognormal_levels_have_their_moments_within_the_bounds():
  log = jnp.log(times.lognormal(U, 0.002, 80.0, -1.2, 1.2))
  assert float(log.mean()) == pytest.approx(-1.2, abs=0.01) and float(log.std()) == pytest.approx(1.2, abs=0.01)
  narrow = times.lognormal(jnp.array([0.0, 0.5, 1.0]), 1.0, 2.0, -1.2, 1.2)
  np.testing.assert_allclose(narrow[jnp.array([0, 2])], [1, 2], rtol=1e-4)
  assert 1 < float(narrow[1]) < 1.5  # the density falls there


def test_logit_normal_and_shift():
  assert float(times.logit_normal(jnp.zeros(1), 0.0, 1.0, 0.0)[0]) == 0.5
  np.testing.assert_allclose(times.shifted(U, 0.0, 1.0, 1.0), U, rtol=1e-6)
  np.testing.assert_allclose(times.shifted(jnp.array([0.0, 0.5, 1.0]), 0.0, 1.0, 3.0), [0, 0.75, 1], rtol=1e-6)


@pytest.mark.parametrize("name", denoising.TIME_DISTRIBUTIONS)
def test_a_teacher_trains_at_such_times(name):
  p = process.edm() if name == "lognormal" else process.flow()
  parts = toys.toy_parts(p, grid="karras" if name == "lognormal" else "uniform")
  keys = keys_lib.per_example(jax.random.key(0), jnp.arange(256))
  _, t = denoising.make(parts, times=name, mean=0.0, std=1.0, sampler_steps=4).draw(keys)
  assert t.shape == (256,) and float(t.min()) >= p.t_min and float(t.max()) <= p.t_max and float(t.std()) > 0.1


@pytest.mark.parametrize("options, said", [(dict(times="normal"), "there are: uniform"), (dict(std=0.0), "std 0.0"),
                                           (dict(times="lognormal"), "edm process, not of 'stable_diffusion'"),
                                           (dict(times="shifted"), "go to 999")])
def test_mistakes_are_named(options, said):
  with pytest.raises(UsageError, match=said):
    denoising.make(toys.toy_parts(process.stable_diffusion()), **options)
