"""Random keys: root -> fold_in(step) -> fold_in(global example) -> fold_in(name).

No key lives in the training state, so a resumed run and a run on another number of devices
draw the same numbers. Every draw of a batch is made with one key per example.
"""

import zlib

import jax
import jax.numpy as jnp

from ddil_jax.types import Array


def named(key: Array, name: str) -> Array:
  """A key for one purpose; works on a single key and on keys [B]."""
  fold = lambda k: jax.random.fold_in(k, zlib.crc32(name.encode()) & 0x7FFFFFFF)  # noqa: E731
  return fold(key) if key.ndim == 0 else jax.vmap(fold)(key)


def numbered(keys: Array, i: Array) -> Array:
  """Keys [B] for the i-th draw of a loop."""
  return jax.vmap(lambda k: jax.random.fold_in(k, i))(keys)


def per_example(key: Array, lane: Array) -> Array:
  """One key per example from its global position `lane` int32 [B]."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(lane)


def normal_like(keys: Array, x: Array) -> Array:
  """Standard normals of the shape and dtype of x [B, ...], row b from keys[b]."""
  return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)


def uniform(keys: Array, low: float = 0.0, high: float = 1.0) -> Array:
  """Uniform float32 [B] in [low, high)."""
  return jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float32, low, high))(keys)


def randint(keys: Array, low: int | Array, high: int | Array) -> Array:
  """Uniform int32 [B] in {low, ..., high - 1}; low and high are scalars or [B]."""
  axes = (0, *(0 if jnp.ndim(bound) else None for bound in (low, high)))
  return jax.vmap(lambda k, a, b: jax.random.randint(k, (), a, b), axes)(keys, low, high)
