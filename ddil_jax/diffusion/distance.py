"""Distances between two batches of images, per example: mean over pixels and channels, [B]."""

from collections.abc import Callable

import jax.numpy as jnp

from ddil_jax.errors import UsageError
from ddil_jax.types import Array

Distance = Callable[[Array, Array], Array]


def per_example(values: Array) -> Array:
  """Mean over all axes but the first: [B, ...] -> [B]."""
  return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def l2() -> Distance:
  """mean (a - b)^2."""
  return lambda a, b: per_example((a - b) ** 2)


def l1() -> Distance:
  """mean |a - b|."""
  return lambda a, b: per_example(jnp.abs(a - b))


def pseudo_huber(c: float = 1e-3) -> Distance:
  """Pseudo-Huber, mean (sqrt((a - b)^2 + c^2) - c), element by element (arXiv 2310.04378)."""
  if not c > 0:
    raise UsageError(f"distance pseudo_huber: c {c} must be positive")
  return lambda a, b: per_example(jnp.sqrt((a - b) ** 2 + c**2) - c)


DISTANCES = {"l2": l2, "l1": l1, "pseudo_huber": pseudo_huber}


def make(name: str, **options) -> Distance:
  """A distance by name. Raises UsageError with the names that exist."""
  if name not in DISTANCES:
    raise UsageError(f"unknown distance '{name}'; there are: {', '.join(sorted(DISTANCES))}")
  return DISTANCES[name](**options)
