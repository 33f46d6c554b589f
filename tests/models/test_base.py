"""Parameter dicts: counting, comparing, and starting a student from a teacher."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax.errors import UsageError
from ddil_jax.models.base import count_params, describe_mismatch, init_from, layers_of

TEACHER = {"conv": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "old": jnp.ones(4)}
STUDENT = {"conv": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(5)},
           "guidance": {"kernel": jnp.zeros((2, 2))}}


def test_count_params():
  assert count_params(TEACHER) == 12
  assert count_params(jax.eval_shape(lambda: TEACHER)) == 12


def test_describe_mismatch_names_each_difference():
  assert describe_mismatch(TEACHER, TEACHER) == []
  assert describe_mismatch(jax.eval_shape(lambda: TEACHER), STUDENT) == [
      "missing: old (4,)",
      "unexpected: guidance/kernel (2, 2)",
      "shape of conv/bias: (2,) expected, (5,) found",
  ]


def test_init_from_copies_what_agrees_and_says_so():
  params, report = init_from(STUDENT, TEACHER)
  assert report == (("conv/kernel",), ("conv/bias", "guidance/kernel"), ("conv/bias", "old"))
  assert str(report) == "1 parameters copied, 2 kept, 2 unused"
  assert jax.tree.structure(params) == jax.tree.structure(STUDENT)
  np.testing.assert_array_equal(params["conv"]["kernel"], TEACHER["conv"]["kernel"])
  np.testing.assert_array_equal(params["conv"]["bias"], np.zeros(5))


def test_init_from_shares_no_buffer():
  teacher = jax.tree.map(jnp.array, TEACHER)
  student = jax.tree.map(jnp.array, STUDENT)
  params, _ = init_from(student, teacher)
  for leaf in jax.tree.leaves(params):
    leaf.delete()  # what donation does
  for leaf in jax.tree.leaves((teacher, student)):
    assert np.all(np.isfinite(leaf))


def test_layers_of_a_module():
  """What its submodules gave on the way, those within others too; vectors as maps of one pixel."""
  class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Conv(3, (1, 1), name="first")(x)
      return nn.Dense(2, name="second")(x.reshape(len(x), -1))

  class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
      return Pair(name="pair")(2 * x)

  x, module = jnp.ones((4, 2, 2, 1)), Outer()
  params = module.init(jax.random.key(0), x)["params"]
  found = layers_of(module, params, x, ("pair.second", "pair.first"))
  first = params["pair"]["first"]
  expected = 2 * x @ first["kernel"][0, 0] + first["bias"][None, None, None]
  np.testing.assert_allclose(found["pair.first"], expected, rtol=1e-6)
  np.testing.assert_allclose(found["pair.second"], module.apply({"params": params}, x)[:, None, None], rtol=1e-6)
  with pytest.raises(UsageError, match="layer of Outer 'pair.third'; .*pair.first, pair.second"):
    layers_of(module, params, x, ("pair.third",))
