"""Tiles, threads and neighbours against whole matrices."""

import numpy as np
import pytest
import threadpoolctl
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from ddil_jax.evaluation import pairs
from ddil_jax.evaluation.pairs import Points


def points(n, d=5, seed=0):
  return Points.of(np.random.default_rng(seed).standard_normal((n, d)))


@pytest.fixture(params=[(64, 2048), (7, 11), (3, 1)], ids=str)
def tiles(request, monkeypatch):
  monkeypatch.setattr(pairs, "ROWS", request.param[0])
  monkeypatch.setattr(pairs, "COLUMNS", request.param[1])


def test_tiles_make_up_the_matrix(tiles):
  a, b = points(23), points(40, seed=1)
  whole = np.full((23, 40), np.nan)

  def block(rows):
    for cols, d2 in pairs.squared_distance_tiles(a, b, rows):
      whole[rows, cols] = d2
    return rows.start

  starts = pairs.over_rows(block, a.x)
  assert starts == sorted(starts)
  np.testing.assert_allclose(whole, cdist(a.x, b.x, "sqeuclidean"), atol=1e-13)


def test_diagonal(tiles):
  a, seen = points(23), np.zeros((23, 23))

  def block(rows):
    for cols, d2 in pairs.squared_distance_tiles(a, a, rows):
      pairs.set_diagonal(d2, rows, cols, -1)
      seen[rows, cols] = d2

  pairs.over_rows(block, a.x)
  assert (np.diag(seen) == -1).all() and (seen[~np.eye(23, dtype=bool)] >= 0).all()


@pytest.mark.parametrize("k", [1, 4, 22])
def test_neighbours_equal_sklearns(tiles, k):
  a, b = points(23), points(40, seed=1)
  distance, index = NearestNeighbors(algorithm="brute").fit(a.x).kneighbors(n_neighbors=k)
  np.testing.assert_allclose(pairs.neighbour_distance2(a, k), distance[:, -1]**2, rtol=1e-12)
  own = pairs.nearest(a, a, k)
  np.testing.assert_allclose(own[0], distance**2, rtol=1e-12)
  np.testing.assert_array_equal(own[1], index)
  distance, index = NearestNeighbors(algorithm="brute").fit(b.x).kneighbors(a.x, n_neighbors=k)
  other = pairs.nearest(a, b, k)
  np.testing.assert_allclose(other[0], distance**2, rtol=1e-12)
  np.testing.assert_array_equal(other[1], index)


def test_neighbours_by_scale_and_fewer_than_asked_for(tiles):
  a, b = points(9), points(6, seed=1)
  scale = np.array([1.0, 4.0, 0.1, 9.0, 1.0, 2.0])
  d2 = cdist(a.x, b.x, "sqeuclidean")
  order = np.argsort(d2 / scale, axis=1)
  found, index = pairs.nearest(a, b, 3, scale)
  np.testing.assert_array_equal(index, order[:, :3])
  np.testing.assert_allclose(found, np.take_along_axis(d2, order[:, :3], 1), rtol=1e-12)
  assert pairs.nearest(a, b, 50)[1].shape == (9, 6)
  assert pairs.nearest(b, b, 50)[1].shape == (6, 5)


def test_threads_have_one_blas_thread_each_and_errors_come_out():
  threads = lambda _: {i["num_threads"] for i in threadpoolctl.threadpool_info() if i["user_api"] == "blas"}  # noqa: E731
  before = threads(0)
  assert pairs.in_threads(threads, range(3)) == [{1}] * 3
  assert threads(0) == before
  with pytest.raises(ZeroDivisionError):
    pairs.in_threads(lambda i: 1 / i, [1, 0])
  assert threads(0) == before


def test_squared_distances_are_exact_per_chunk(monkeypatch):
  a, b = points(23, 3).x, points(17, 3, 2).x
  monkeypatch.setattr(pairs, "_ENTRIES", 5 * 17)
  chunks = list(pairs.squared_distances(a, b))
  assert [len(d2) for _, d2 in chunks] == [5, 5, 5, 5, 3]
  np.testing.assert_allclose(np.concatenate([d2 for _, d2 in chunks]), cdist(a, b, "sqeuclidean"), atol=1e-10)
