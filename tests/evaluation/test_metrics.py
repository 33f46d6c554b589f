import numpy as np
import prdc
import pytest
import scipy.linalg
from sklearn.datasets import load_digits
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import metrics as m
from ddil_jax.evaluation import pairs


def draw(n, d, seed=0, scale=1.0, shift=0.0):
  rng = np.random.default_rng(seed)
  return scale * rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + shift


def exact_moments(n, mean, cov, seed=0):
  """Samples whose empirical mean and covariance are exactly the given ones."""
  x = np.random.default_rng(seed).standard_normal((n, len(mean)))
  x -= x.mean(axis=0)
  x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
  return x @ np.linalg.cholesky(cov).T + mean


# Frechet distance


def test_frechet_equals_scipys_matrix_root():
  a, b = draw(300, 7, 1), draw(411, 7, 2, 1.4, 0.3)
  ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
  expected = (np.sum((a.mean(0) - b.mean(0))**2) + np.trace(ca) + np.trace(cb)
              - 2 * np.trace(scipy.linalg.sqrtm(ca @ cb)).real)
  np.testing.assert_allclose(m.frechet_distance(a, b), expected, rtol=1e-10)


def test_frechet_of_known_gaussians():
  # Commuting covariances: |dm|^2 + sum (s_a - s_b)^2.
  s_a, s_b, shift = np.array([1.0, 2.0, 0.5]), np.array([0.5, 2.0, 3.0]), np.array([0.3, -1.0, 2.0])
  a = exact_moments(200, np.zeros(3), np.diag(s_a**2), 1)
  b = exact_moments(150, shift, np.diag(s_b**2), 2)
  expected = np.sum(shift**2) + np.sum((s_a - s_b)**2)
  np.testing.assert_allclose(m.frechet_distance(a, b), expected, rtol=1e-10)


@pytest.mark.parametrize("n", [500, 12])  # 12 samples of 20 features: rank deficient
def test_frechet_invariances(n):
  a, shift = draw(n, 20), np.linspace(-1, 1, 20)
  scale = np.trace(np.cov(a, rowvar=False))
  assert m.frechet_distance(a, a) < 1e-12 * scale
  assert m.frechet_distance(a, a[::-1]) < 1e-12 * scale
  np.testing.assert_allclose(m.frechet_distance(a, a + shift), np.sum(shift**2), rtol=1e-9)
  b = draw(n + 5, 20, 3)
  rotation = np.linalg.qr(draw(20, 20, 4))[0]
  distance = m.frechet_distance(a, b)
  np.testing.assert_allclose(m.frechet_distance(a @ rotation, b @ rotation), distance, rtol=1e-9)
  np.testing.assert_allclose(m.frechet_distance(b, a), distance, rtol=1e-9)


def test_frechet_in_blocks_and_in_float32(monkeypatch):
  a, b = draw(300, 7, 1).astype(np.float32), draw(411, 7, 2, 1.4, 0.3).astype(np.float32)
  whole = m.frechet_distance(a.astype(np.float64), b.astype(np.float64))
  monkeypatch.setattr(m, "_ROWS", 64)
  np.testing.assert_allclose(m.frechet_distance(a, b), whole, rtol=1e-12)


def test_frechet_rank_deficient_has_its_exact_value():
  # Two sets on orthogonal lines: C_a C_b = 0, so the distance is tr C_a + tr C_b + |dm|^2.
  line = np.random.default_rng(0).standard_normal(50)
  a, b = np.zeros((50, 30)), np.zeros((50, 30))
  a[:, 0], b[:, 1] = line, 2 * line + 1
  expected = 5 * line.var(ddof=1) + line.mean()**2 + (2 * line.mean() + 1)**2
  np.testing.assert_allclose(m.frechet_distance(a, b), expected, rtol=1e-12)


# Kernel distance


def naive_kid(a, b):
  kernel = lambda x, y: polynomial_kernel(x, y, degree=3, gamma=1 / x.shape[1], coef0=1)  # noqa: E731
  off = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))  # noqa: E731
  return off(kernel(a, a)) + off(kernel(b, b)) - 2 * kernel(a, b).mean()


def test_kernel_distance_equals_sklearns_kernel(monkeypatch):
  monkeypatch.setattr(pairs, "COLUMNS", 37)  # tiles that do not divide the sets
  a, b = draw(120, 6, 1), draw(95, 6, 2, 1.1, 0.2)
  np.testing.assert_allclose(m.kernel_distance(a, b), naive_kid(a, b), rtol=1e-10)


def test_kernel_distance_is_unbiased_where_the_biased_one_is_not():
  rng = np.random.default_rng(0)
  sets = rng.standard_normal((400, 2, 20, 4))
  values = np.array([m.kernel_distance(a, b) for a, b in sets])
  assert abs(values.mean()) < 3 * values.std(ddof=1) / np.sqrt(len(values))
  kernel = lambda x, y: polynomial_kernel(x, y, degree=3, gamma=1 / 4, coef0=1)  # noqa: E731
  biased = np.array([kernel(a, a).mean() + kernel(b, b).mean() - 2 * kernel(a, b).mean() for a, b in sets])
  assert biased.mean() > 10 * values.std(ddof=1) / np.sqrt(len(values))


def test_kernel_distance_of_classes_in_equal_numbers_is_low():
  """By (k within classes - k over all) / (N - 1), as the docstring says: for such samples it is not unbiased."""
  rng = np.random.default_rng(0)
  labels = np.arange(20) % 2
  of = lambda labels: rng.standard_normal((len(labels), 3)) + 3.0 * labels[:, None]  # noqa: E731
  iid = lambda n: of(rng.integers(0, 2, n))  # noqa: E731
  values = [m.kernel_distance(of(labels), iid(200)) for _ in range(300)]
  free = [m.kernel_distance(iid(20), iid(200)) for _ in range(300)]
  kernel = m.cubic_kernel(*2 * (of(np.arange(2000) % 2),))
  same = np.equal.outer(np.arange(2000) % 2, np.arange(2000) % 2)
  expected = -(kernel[same].mean() - kernel.mean()) / 19
  error = lambda x: np.std(x) / np.sqrt(len(x))  # noqa: E731
  assert abs(np.mean(values) - expected) < 4 * error(values) < 0.5 * abs(expected)
  assert abs(np.mean(free)) < 4 * error(free)


def test_kernel_distance_in_blocks():
  a, b = draw(60, 4, 1), draw(60, 4, 2) + 3
  whole = m.kernel_distance(a, b)
  np.testing.assert_allclose(m.kernel_distance(a, b, block=60, num_blocks=2), whole, rtol=1e-9)
  blocks = m.kernel_distance(a, b, block=30, num_blocks=400)
  np.testing.assert_allclose(blocks, whole, rtol=0.1)
  assert blocks == m.kernel_distance(a, b, block=30, num_blocks=400)
  with pytest.raises(UsageError, match="blocks of 61"):
    m.kernel_distance(a, b, block=61)


# Precision, recall, density, coverage


def naive_prdc(real, fake, k):
  neighbours = NearestNeighbors(n_neighbors=k + 1, algorithm="brute")
  real_radii, fake_radii = (neighbours.fit(x).kneighbors(x)[0][:, k] for x in (real, fake))
  d = np.linalg.norm(real[:, None] - fake[None], axis=2)
  return {"precision": np.mean((d < real_radii[:, None]).any(axis=0)),
          "recall": np.mean((d < fake_radii).any(axis=1)),
          "density": np.mean((d < real_radii[:, None]).sum(axis=0)) / k,
          "coverage": np.mean(d.min(axis=1) < real_radii)}


@pytest.mark.parametrize("k", [1, 5])
def test_prdc_equals_brute_force(monkeypatch, k):
  monkeypatch.setattr(pairs, "COLUMNS", 41)
  real, fake = draw(150, 5, 1), 0.8 * draw(130, 5, 1)[::-1] + 0.4
  expected = naive_prdc(real, fake, k)
  assert 0 < expected["precision"] < 1 and 0 < expected["coverage"] < 1
  assert m.prdc(real, fake, k) == pytest.approx(expected, abs=1e-12)


def test_prdc_on_hand_made_sets():
  real = np.arange(10.0)[:, None]  # radii to the first neighbour: 1
  # Fake points in the balls of 0 and 1, in those of 4 and 5 twice, and in none.
  fake = np.array([[0.5], [4.5], [4.25], [20.0]])
  got = m.prdc(real, fake, k=1)
  assert got["precision"] == 3 / 4
  assert got["density"] == 6 / 4  # each of three is in two balls
  assert got["coverage"] == 4 / 10  # 0, 1, 4, 5
  # Balls of the fakes: 0.5 with radius 3.75 (holds 0..4), 4.5 and 4.25 with 0.25 (4.25 misses 4 and
  # 4.5 misses 5, being at the boundary), 20 with 15.5 (holds 5..9).
  assert got["recall"] == 1
  assert m.prdc(real, fake[:3], k=1)["recall"] == 5 / 10


def test_prdc_of_a_copy_and_of_strangers():
  x = draw(200, 8)
  copy = m.prdc(x, x[::-1], 5)
  assert copy == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}
  assert m.prdc(x, x + 1e4, 5) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
  collapsed = np.tile(x[:1], (50, 1)) + 1e-6 * draw(50, 8)
  got = m.prdc(x, collapsed, 5)
  assert got["precision"] == 1 and got["recall"] < 0.05 and got["coverage"] < 0.1


@pytest.mark.parametrize("k", [1, 3, 10])
def test_prdc_equals_the_authors_package(k):
  # Features of an untrained map of digits: real images, near ones and far ones.
  images = load_digits().data
  features = np.tanh(images @ np.random.default_rng(0).standard_normal((64, 16)) / 40)
  real, fake = features[:900], 0.9 * features[900:] + 0.02
  expected = prdc.compute_prdc(real, fake, k)
  assert all(0.1 < value < 1.2 for value in expected.values())
  assert m.prdc(real, fake, k) == pytest.approx(expected, abs=1e-12)


# Classes and pixels


def test_class_accuracy():
  logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
  assert m.class_accuracy(logits, np.array([0, 1, 1, 1])) == 0.75
  with pytest.raises(UsageError, match=r"labels lie in 0..2; expected 0..1"):
    m.class_accuracy(logits, np.array([0, 1, 2, 1]))
  with pytest.raises(UsageError, match="expected 4 integers"):
    m.class_accuracy(logits, np.array([0, 1]))


def test_saturation():
  images = np.array([-1.0, -1.2, 0.9995, 0.99, 0.0, 1.0, 0.5, -0.5]).reshape(2, 2, 2, 1)
  assert m.saturation(images) == 4 / 8
  assert m.saturation(images, bound=1.1) == 1 / 8
  assert m.saturation(images, tol=0.02) == 5 / 8
  assert m.saturated(images).tolist() == [3 / 4, 1 / 4]


# Bad input


def test_bad_input_is_named():
  a = draw(10, 3)
  bad = a.copy()
  bad[4, 1] = np.nan
  for metric in (m.frechet_distance, m.kernel_distance, m.prdc):
    with pytest.raises(UsageError, match=r"features.* has non-finite numbers in 1 of 10 rows, first row 4"):
      metric(a, bad)
    with pytest.raises(UsageError, match=r"unlike: samples of shape \(3,\) and \(2,\)"):
      metric(a, a[:, :2])
  for metric in (m.frechet_distance, m.kernel_distance):
    with pytest.raises(UsageError, match="features b has 1 samples; at least 2"):
      metric(a, a[:1])
  with pytest.raises(UsageError, match="fake features has 5 samples; at least 6"):
    m.prdc(a, a[:5], k=5)
  with pytest.raises(UsageError, match="k is 0"):
    m.prdc(a, a, k=0)
  with pytest.raises(UsageError, match=r"expected \[N,H,W,C\]"):
    m.saturation(a)
  with pytest.raises(UsageError, match="expected floats"):
    m.saturation(np.zeros((1, 2, 2, 1), np.uint8))
