import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax.diffusion import distance
from ddil_jax.errors import UsageError

A = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5, 2)), jnp.float32)
B = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 5, 2)), jnp.float32)


@pytest.mark.parametrize("name", sorted(distance.DISTANCES))
def test_contract(name):
  """Per example, symmetric, zero only for equal images, blind to the other examples."""
  d = distance.make(name)
  value = d(A, B)
  assert value.shape == (3,) and np.all(value > 0)
  np.testing.assert_array_equal(value, d(B, A))
  np.testing.assert_array_equal(d(A, A), 0)
  np.testing.assert_array_equal(d(A[1:2], B[1:2]), value[1:2])


def test_values():
  gap = np.asarray(A - B, np.float64)
  np.testing.assert_allclose(distance.make("l2")(A, B), np.mean(gap**2, (1, 2, 3)), rtol=1e-6)
  np.testing.assert_allclose(distance.make("l1")(A, B), np.mean(np.abs(gap), (1, 2, 3)), rtol=1e-6)
  expected = np.mean(np.sqrt(gap**2 + 0.09) - 0.3, (1, 2, 3))
  np.testing.assert_allclose(distance.make("pseudo_huber", c=0.3)(A, B), expected, rtol=1e-6)


def test_pseudo_huber_goes_from_l2_to_l1():
  np.testing.assert_allclose(distance.pseudo_huber(1e-6)(A, B), distance.l1()(A, B), rtol=1e-5)
  a, b = 100 * A, 100 * B
  np.testing.assert_allclose(distance.pseudo_huber(1e3)(a, b) * 2e3, distance.l2()(a, b), rtol=3e-2)


def test_errors_name_what_exists():
  with pytest.raises(UsageError, match="unknown distance 'lpips'; there are: l1, l2, pseudo_huber"):
    distance.make("lpips")
  with pytest.raises(UsageError, match="c 0 must be positive"):
    distance.pseudo_huber(0)
