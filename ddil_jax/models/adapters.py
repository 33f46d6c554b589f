"""Small networks beside a frozen one: what guidance scale, time and class add to the output of its blocks.

    offset = P(E_g(m g) + E_t(t) + W c)          one vector for each example, added to every pixel
    E(s)   = LayerNorm(MLP(cos(2 pi (f s + p)))) frequencies f ~ N(0, 1) and phases p ~ U[0, 1] do not learn
    MLP    = dense, ReLU, LayerNorm, dense

P is an MLP whose last layer starts at 0, so that an adapter starts as no change.

Source: adapter guidance distillation (arXiv 2503.07274) and the authors' code, the additive adapter; golden
vectors `agd_*`.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp

from ddil_jax.types import Array

_INIT = nn.initializers.variance_scaling(2.0, "fan_avg", "uniform")  # Xavier's with a gain of sqrt(2)
_ZEROS = nn.initializers.zeros_init()
# The statistics in two passes: in one, the difference of two large numbers loses digits.
_LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)


class MLP(nn.Module):
  """Dense, ReLU, layer norm, dense: [B, n] -> [B, features]."""
  hidden: int
  features: int
  last_init: nn.initializers.Initializer = _INIT

  @nn.compact
  def __call__(self, x: Array) -> Array:
    h = nn.relu(nn.Dense(self.hidden, kernel_init=_INIT, name="in")(x))
    return nn.Dense(self.features, kernel_init=self.last_init, name="out")(_LayerNorm(name="norm")(h))


class ScalarEncoder(nn.Module):
  """Embedding [B, hidden] of numbers [B] by random cosines and an MLP."""
  hidden: int

  @nn.compact
  def __call__(self, values: Array) -> Array:
    frequencies = self.param("frequencies", nn.initializers.normal(1.0), (self.hidden,))
    phases = self.param("phases", nn.initializers.uniform(1.0), (self.hidden,))
    waves = jnp.cos(2 * jnp.pi * (frequencies[None] * values[:, None] + phases[None]))
    return _LayerNorm(name="norm")(MLP(4 * self.hidden, self.hidden, name="mlp")(waves))


class Adapter(nn.Module):
  """What one block's output gets added.

  Attributes:
    features: channels of the block.
    hidden: width.
    scale_factor: m, by which the guidance scale is multiplied before its embedding.
  """
  features: int
  hidden: int
  scale_factor: float = 1.0

  @nn.compact
  def __call__(self, guidance_scale: Array, time: Array | None = None, label: Array | None = None) -> Array:
    """The offset [B, features].

    Args:
      guidance_scale: [B].
      time: [B], in a unit in which it has a size of about 1; None where the adapter does not read it.
      label: [B, K], one-hot or any embedding of the class; likewise.
    """
    h = ScalarEncoder(self.hidden, name="guidance_scale")(self.scale_factor * guidance_scale)
    if time is not None:
      h = h + ScalarEncoder(self.hidden, name="time")(time)
    if label is not None:
      h = h + nn.Dense(self.hidden, name="label")(label)
    return MLP(self.hidden, self.features, _ZEROS, name="out")(h)


def learns(path: str) -> bool:
  """Whether a parameter of an adapter, by its path, is trained: all but frequencies and phases."""
  return path.rpartition("/")[2] not in ("frequencies", "phases")
