"""Training times [B] in [low, high] from one standard draw per example: u uniform in [0, 1), n normal."""

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri

from ddil_jax.types import Array


def uniform(u: Array, low: float, high: float) -> Array:
  """`low + (high - low) u`."""
  return low + (high - low) * u


def lognormal(u: Array, low: float, high: float, mean: float = -1.2, std: float = 1.2) -> Array:
  """Noise levels `exp(mean + std n)` that lie between the two, by the inverse of their distribution.

  Source: EDM (arXiv 2206.00364, table 1), which does not bound them; a bound by clipping would draw the ends
  themselves now and then.
  """
  first, last = (ndtr((jnp.log(jnp.asarray(bound, u.dtype)) - mean) / std) for bound in (low, high))
  # By rounding the outermost draws may lie outside.
  return jnp.clip(jnp.exp(mean + std * ndtri(uniform(u, first, last))), low, high)


def logit_normal(n: Array, low: float, high: float, mean: float = 0.0, std: float = 1.0) -> Array:
  """`low + (high - low) sigmoid(mean + std n)`: times of the middle more often (arXiv 2403.03206, section 3.1)."""
  return uniform(jax.nn.sigmoid(mean + std * n), low, high)


def shifted(u: Array, low: float, high: float, shift: float = 1.0) -> Array:
  """`s t / (1 + (s - 1) t)` of a uniform t: noisier for s > 1, as large images need (arXiv 2403.03206, eq. 23).

  Moves the times of [0, 1] and keeps both of its ends, `low` and `high` only if they are these.
  """
  t = uniform(u, low, high)
  return shift * t / (1 + (shift - 1) * t)
