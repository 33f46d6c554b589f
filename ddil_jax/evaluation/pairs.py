"""Pairs of feature vectors in tiles that stay in the cache, over all cores: nothing of size N x M is held.

All in float64, so that it does not matter which tile a pair falls into.
"""

import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import threadpoolctl

# A tile is ROWS x COLUMNS: 1 MiB. With many features the product takes longer than the passes over its
# tile, and more rows a tile mean fewer readings of the other set.
ROWS, MOST_ROWS, COLUMNS = 64, 512, 2048
_ENTRIES = 1 << 23  # of a chunk of whole rows: 64 MiB


class Points(NamedTuple):
  """Vectors x float64 [N,D] and their squared norms [N]."""

  x: np.ndarray
  norms: np.ndarray

  @classmethod
  def of(cls, x) -> "Points":
    return cls(x, np.einsum("nd,nd->n", x, x))


def over_rows(fn: Callable[[slice], object], x: np.ndarray) -> list:
  """[fn(rows)] for blocks of the rows of x [N,D], on all cores, in order."""
  n, dim = x.shape
  size = min(max(ROWS, dim), MOST_ROWS)
  return in_threads(fn, [slice(i, min(i + size, n)) for i in range(0, n, size)])


def in_threads(fn: Callable, items) -> list:
  """[fn(item)], on all cores, in order. Matrix products inside run on one thread each."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  with one_blas_thread(), concurrent.futures.ThreadPoolExecutor(cores) as pool:
    return list(pool.map(fn, items))


@functools.cache
def _controller() -> threadpoolctl.ThreadpoolController:
  return threadpoolctl.ThreadpoolController()


def one_blas_thread(when: bool = True):
  """A context in which BLAS has one thread: on narrow matrices its threads wait for each other."""
  return _controller().limit(limits=1, user_api="blas") if when else contextlib.nullcontext()


def columns(m: int) -> Iterator[slice]:
  """The columns of the tiles."""
  return (slice(i, min(i + COLUMNS, m)) for i in range(0, m, COLUMNS))


def squared_distance_tiles(a: Points, b: Points, rows: slice) -> Iterator[tuple[slice, np.ndarray]]:
  """Yields (columns, |a_i - b_j|^2 [rows, columns]). Small norms (centred points) keep it precise."""
  for cols in columns(len(b.x)):
    d2 = a.x[rows] @ b.x[cols].T
    d2 *= -2
    d2 += b.norms[cols]
    d2 += a.norms[rows, None]
    yield cols, np.maximum(d2, 0, out=d2)


def set_diagonal(tile: np.ndarray, rows: slice, cols: slice, value: float) -> None:
  """Writes the entries (i, i) of the whole matrix that lie in a tile."""
  i = np.arange(max(rows.start, cols.start), min(rows.stop, cols.stop))
  tile[i - rows.start, i - cols.start] = value


def neighbour_distance2(a: Points, k: int) -> np.ndarray:
  """Squared distance [N] of each point to its k-th nearest other point, N > k."""

  def block(rows):
    best = np.full((rows.stop - rows.start, 0), np.inf)
    for cols, d2 in squared_distance_tiles(a, a, rows):
      set_diagonal(d2, rows, cols, np.inf)
      if d2.shape[1] > k:
        d2.partition(k - 1, axis=1)
      best = np.concatenate([best, d2[:, :k]], axis=1)
      if best.shape[1] > k:
        best.partition(k - 1, axis=1)
        best = best[:, :k]
    return best.max(axis=1)

  return np.concatenate(over_rows(block, a.x))


def nearest(a: Points, b: Points, num: int, scale: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
  """The `num` nearest points of b for each point of a, nearest first; fewer where b has fewer.

  Args:
    a: [N,D]; the same object as b leaves out i = j.
    b: [M,D].
    num: of neighbours.
    scale: [M] of b: nearest means |a_i - b_j|^2 / scale_j.

  Returns:
    Squared distances [N,num] and indices int [N,num].
  """
  within = a is b
  num = min(num, len(b.x) - within)

  def block(rows):
    size = rows.stop - rows.start
    keys, found, index = np.empty((size, 0)), np.empty((size, 0)), np.empty((size, 0), np.int64)
    for cols, d2 in squared_distance_tiles(a, b, rows):
      if within:
        set_diagonal(d2, rows, cols, np.inf)
      key = d2 if scale is None else d2 / scale[cols]
      pick = (np.argpartition(key, num - 1, axis=1)[:, :num] if key.shape[1] > num
              else np.broadcast_to(np.arange(key.shape[1]), key.shape))
      keys, found, index = (np.concatenate([old, new], axis=1) for old, new in (
          (keys, np.take_along_axis(key, pick, 1)), (found, np.take_along_axis(d2, pick, 1)), (index, pick + cols.start)))
      best = np.argsort(keys, axis=1, kind="stable")[:, :num]
      keys, found, index = (np.take_along_axis(v, best, 1) for v in (keys, found, index))
    return found, index

  blocks = over_rows(block, a.x)
  return tuple(np.concatenate([part[i] for part in blocks]) for i in (0, 1))


def squared_distances(a, b) -> Iterator[tuple[slice, np.ndarray]]:
  """Yields (rows, |a_i - b_j|^2 [rows, M]) for chunks of the rows of a [N,D] against all of b [M,D]."""
  norms = np.sum(b**2, axis=1)
  size = max(1, _ENTRIES // len(b))
  for rows in (slice(i, min(i + size, len(a))) for i in range(0, len(a), size)):
    d2 = a[rows] @ b.T
    d2 *= -2
    d2 += np.sum(a[rows]**2, axis=1)[:, None]
    d2 += norms
    yield rows, np.maximum(d2, 0, out=d2)
