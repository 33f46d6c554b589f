"""Low-rank deltas on any parameter tree: `W + scale A B` (LoRA, arXiv 2106.09685).

A kernel [..., n, m] is a matrix of all its axes but the last by the last. Biases and other vectors, and kernels
that are no larger than their delta, have none. B starts at 0, so adapters start as no change.
"""

import jax
import jax.numpy as jnp

from ddil_jax.errors import UsageError
from ddil_jax.types import Array, Params


def _path(entry) -> str:
  return jax.tree_util.keystr(entry, simple=True, separator="/")


def init(key: Array, params: Params, rank: int) -> dict[str, dict[str, Array]]:
  """Adapters {path: {"a" [n, rank], "b" [rank, m]}} of every kernel of a tree; `a` ~ N(0, 1 / rank).

  Raises:
    UsageError: the rank is too large for all of them.
  """
  adapters = {}
  for i, (entry, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(params)[0]):
    if leaf.ndim < 2:
      continue
    m = leaf.shape[-1]
    n = leaf.size // m
    if rank * (n + m) < leaf.size:
      a = jax.random.normal(jax.random.fold_in(key, i), (n, rank), leaf.dtype) / jnp.sqrt(jnp.asarray(rank, leaf.dtype))
      adapters[_path(entry)] = {"a": a, "b": jnp.zeros((rank, m), leaf.dtype)}
  if not adapters:
    raise UsageError(f"lora: rank {rank} is too large, no kernel of the network is larger than its delta")
  return adapters


def merge(params: Params, adapters: dict[str, dict[str, Array]], scale: float = 1.0) -> Params:
  """The tree with the deltas added; params without an adapter are those of the base."""
  def add(entry, leaf):
    delta = adapters.get(_path(entry))
    return leaf if delta is None else leaf + scale * (delta["a"] @ delta["b"]).reshape(leaf.shape)
  return jax.tree_util.tree_map_with_path(add, params)
