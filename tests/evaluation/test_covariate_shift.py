import time

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.spatial.distance
import scipy.stats
from sklearn.metrics.pairwise import rbf_kernel

from ddil_jax.diffusion import process
from ddil_jax.errors import UsageError
from ddil_jax.evaluation import covariate_shift as cs
from ddil_jax.models import exact


def normal(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


# Sliced Wasserstein


def test_sw2_of_a_mean_shift_is_its_rms_per_pixel():
  # With whole blocks of orthonormal directions mean_theta (theta . delta)^2 = |delta|^2 / D exactly.
  a, delta = normal((200, 4, 4, 1)), np.linspace(-1, 2, 16).reshape(4, 4, 1)
  expected = np.sqrt(np.mean(delta**2))
  shifted = a[::-1] + delta
  np.testing.assert_allclose(cs.sliced_wasserstein2(a, shifted, num_projections=32), expected, rtol=1e-10)
  # With fewer directions than dimensions it scatters about that.
  few = [cs.sliced_wasserstein2(a, a + delta, num_projections=5, seed=s)**2 for s in range(300)]
  np.testing.assert_allclose(np.mean(few), expected**2, rtol=0.1)


def test_sw2_of_a_scaling_of_white_noise():
  # W2(N(0,1), N(0,s^2)) = |s - 1| on every line; a coupling by scaling is exact for samples too.
  a = normal((300, 8))
  theta = cs.directions(8, 64, 0)
  expected = np.sqrt(np.mean((theta @ a.T)**2)) * 0.7
  np.testing.assert_allclose(cs.sliced_wasserstein2(a, 1.7 * a), expected, rtol=1e-10)
  a, b = normal((20000, 8), 1), 1.7 * normal((20000, 8), 2)
  np.testing.assert_allclose(cs.sliced_wasserstein2(a, b), 0.7, rtol=0.02)


@pytest.mark.parametrize("n, m", [(6, 6), (6, 4), (3, 8), (1, 5)])
def test_w2_on_a_line_equals_optimal_assignment(n, m):
  a, b = normal((n, 1), 1), normal((m, 1), 2) + 0.5
  # Equally weighted points of unequal number: copy both to the common multiple and assign.
  x, y = np.repeat(a, m, axis=0), np.repeat(b, n, axis=0)
  cost = scipy.spatial.distance.cdist(x, y, "sqeuclidean")
  expected = np.sqrt(cost[scipy.optimize.linear_sum_assignment(cost)].mean())
  np.testing.assert_allclose(cs.sliced_wasserstein2(a, b), expected, rtol=1e-12)


def test_sw2_basics():
  a, b = normal((50, 3, 3, 2), 1), normal((50, 3, 3, 2), 2)
  assert cs.sliced_wasserstein2(a, a[::-1]) < 1e-12
  assert cs.sliced_wasserstein2(a, b) == cs.sliced_wasserstein2(a, b)
  np.testing.assert_allclose(cs.sliced_wasserstein2(a, b), cs.sliced_wasserstein2(b, a), rtol=1e-12)
  assert cs.sliced_wasserstein2(a, b, seed=1) != cs.sliced_wasserstein2(a, b)
  theta = cs.directions(18, 40, 0)
  np.testing.assert_allclose(np.linalg.norm(theta, axis=1), 1, rtol=1e-12)
  np.testing.assert_allclose(theta[:18] @ theta[:18].T, np.eye(18), atol=1e-12)


# MMD


def test_mmd2_equals_sklearns_kernel():
  a, b, h = normal((70, 2, 3, 1), 1), normal((55, 2, 3, 1), 2) + 0.3, 1.7
  x, y = a.reshape(70, -1), b.reshape(55, -1)
  kernel = lambda u, v: rbf_kernel(u, v, gamma=1 / (2 * h**2))  # noqa: E731
  off = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))  # noqa: E731
  expected = off(kernel(x, x)) + off(kernel(y, y)) - 2 * kernel(x, y).mean()
  np.testing.assert_allclose(cs.mmd2_unbiased(a, b, h), expected, rtol=1e-10)


def test_mmd2_is_zero_in_the_mean_for_equal_distributions():
  values = np.array([cs.mmd2_unbiased(a, b, 2.0) for a, b in normal((400, 2, 25, 4))])
  assert abs(values.mean()) < 3 * values.std(ddof=1) / np.sqrt(len(values))
  shifted = np.array([cs.mmd2_unbiased(a, b + 0.5, 2.0) for a, b in normal((400, 2, 25, 4))])
  # E k under N(0,I): E exp(-|z|^2 / 2h^2) with z ~ N(delta, 2I), in closed form.
  h2, d = 4.0, 4
  mean_k = lambda delta2: (h2 / (h2 + 2))**(d / 2) * np.exp(-delta2 / (2 * (h2 + 2)))  # noqa: E731
  expected = 2 * mean_k(0) - 2 * mean_k(d * 0.25)
  assert abs(shifted.mean() - expected) < 3 * shifted.std(ddof=1) / np.sqrt(len(shifted))


def test_bandwidth_is_the_median_distance():
  x = normal((101, 2, 2, 1)) + 5
  expected = np.median(scipy.spatial.distance.pdist(x.reshape(101, -1)))
  np.testing.assert_allclose(cs.bandwidth_from(x), expected, rtol=1e-10)
  expected = np.sqrt(2 * scipy.stats.chi2.median(6))  # |x - y|^2 / 2 of white noise
  np.testing.assert_allclose(cs.bandwidth_from(normal((4000, 6)), num=800), expected, rtol=0.02)
  with pytest.raises(UsageError, match="all alike"):
    cs.bandwidth_from(np.full((20, 3), 0.1))


# Bootstrap


@pytest.mark.parametrize("kind", ["sw2", "mmd2"])
def test_bootstrap_spread_is_that_of_repeated_draws(kind):
  fn = {"sw2": lambda a, b: cs.sliced_wasserstein2(a, b, 4),
        "mmd2": lambda a, b: cs.mmd2_unbiased(a, b, 3.0)}[kind]
  sets = [(normal((80, 4), 2 * s), normal((80, 4), 2 * s + 1) + 0.7) for s in range(120)]
  scatter = np.std([fn(a, b) for a, b in sets])
  widths, inside = [], []
  for a, b in sets[:12]:
    low, high = cs.bootstrap(fn, a, b, num=60)
    widths.append((high - low) / (2 * 1.96))
    inside.append(low < fn(a, b) < high)
  assert all(inside)
  np.testing.assert_allclose(np.mean(widths), scatter, rtol=0.25)


def test_bootstrap_is_seeded_and_checked():
  a, b = normal((30, 2), 1), normal((20, 2), 2)
  fn = lambda x, y: float(x.mean() - y.mean())  # noqa: E731
  assert cs.bootstrap(fn, a, b, seed=3) == cs.bootstrap(fn, a, b, seed=3) != cs.bootstrap(fn, a, b, seed=4)
  with pytest.raises(UsageError, match="bootstrap of 1 draws"):
    cs.bootstrap(fn, a, b, num=1)


# Curves


GRID = np.array([1.0, 0.5, 0.0])


def paths(n=200, shift=0.0):
  """Forward, teacher and student paths [3,N,4,4,1]; the student drifts by k * shift."""
  forward, second, teacher, student = (normal((3, n, 4, 4, 1), s).astype(np.float32) for s in range(4))
  student += (np.arange(3) * shift).reshape(3, 1, 1, 1, 1).astype(np.float32)
  return student, teacher, forward, second


def test_curves_follow_a_growing_shift():
  student, teacher, forward, second = paths(shift=0.5)
  rows = cs.shift_curves(student, teacher, forward, GRID, floor_path=second)
  assert [(r["k"], r["t"]) for r in rows] == [(0, 1.0), (1, 0.5), (2, 0.0)]
  for r in rows:
    for pair in ("student_forward", "student_teacher"):
      np.testing.assert_allclose(r[f"sw2_{pair}"], np.hypot(0.5 * r["k"], r["sw2_floor"]), rtol=0.15)
    for pair in ("student_forward", "student_teacher", "teacher_forward", "floor"):
      for kind in ("sw2", "mmd2"):
        name = f"{kind}_{pair}"
        assert r[f"{name}_low"] < r[name] < r[f"{name}_high"]
  for kind in ("sw2", "mmd2"):
    student_k = [r[f"{kind}_student_forward"] for r in rows]
    assert rows[2][f"{kind}_student_forward_low"] > rows[1][f"{kind}_student_forward_high"]
    assert rows[1][f"{kind}_student_forward_low"] > rows[0][f"{kind}_floor_high"]
    assert student_k == sorted(student_k)
  for r in rows:  # the unshifted pair is not told from the floor
    assert r["mmd2_teacher_forward_low"] < r["mmd2_floor_high"]
    assert r["sw2_teacher_forward_low"] < r["sw2_floor_high"]


def test_curves_are_the_plain_functions_per_time():
  student, teacher, forward, _ = paths(n=60, shift=0.3)
  teacher = teacher[:, :45]  # unequal numbers
  rows = cs.shift_curves(student, teacher, forward, GRID, num_projections=24, seed=5)
  assert not any("floor" in name for name in rows[0])
  for k, r in enumerate(rows):
    h = cs.bandwidth_from(forward[k])
    assert r["bandwidth"] == h
    for pair, (a, b) in {"student_forward": (student, forward), "student_teacher": (student, teacher),
                         "teacher_forward": (teacher, forward)}.items():
      sw2 = cs.sliced_wasserstein2(a[k], b[k], num_projections=24, seed=5)
      np.testing.assert_allclose(r[f"sw2_{pair}"], sw2, rtol=1e-5)
      np.testing.assert_allclose(r[f"mmd2_{pair}"], cs.mmd2_unbiased(a[k], b[k], h), atol=1e-6)


@pytest.mark.parametrize("kind", ["sw2", "mmd2"])
def test_paired_intervals_are_those_of_repeated_draws(kind):
  """Sets that share their classes: what differs in classes from draw to draw cancels in a distance."""
  def draw(seed):
    rng = np.random.default_rng(seed)
    label = 4 * rng.integers(0, 2, (1, 100, 1))
    return [label + rng.standard_normal((1, 100, 3)) + shift for shift in (0.8, 0.8, 0)]

  def measured(seed, num_bootstrap, paired):
    (row,) = cs.shift_curves(*draw(seed), [0.5], num_bootstrap=num_bootstrap, num_projections=6, paired=paired)
    name = f"{kind}_student_forward"
    return row[name], (row[f"{name}_high"] - row[f"{name}_low"]) / (2 * 1.96)

  scatter = np.std([measured(s, 2, True)[0] for s in range(150)])
  paired, independent = (np.mean([measured(s, 60, how)[1] for s in range(12)]) for how in (True, False))
  np.testing.assert_allclose(paired, scatter, rtol=0.25)
  assert independent > 1.3 * scatter


def test_weighted_mmd_leaves_out_copies():
  # Resampled with weights (2, 1, 0, 1): the pairs of distinct points, counted with their weights.
  x, w, h = normal((4, 3)), np.array([[2.0, 1.0, 0.0, 1.0]]), 1.3
  kernel = rbf_kernel(x, x, gamma=1 / (2 * h**2))
  pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
  both = {(i, j): w[0, i] * w[0, j] for i, j in pairs}
  expected = sum(both[p] * kernel[p] for p in pairs) / sum(both.values())
  np.testing.assert_allclose(cs._kernel_mean(x, x, w, w, h, within=True), expected, rtol=1e-12)


def test_curves_of_features():
  """Features [K+1,N,D] and a word before the names; without MMD where all forward features are alike."""
  student, teacher, forward, second = (p.reshape(3, 200, 16)[..., :5] for p in paths(shift=0.5))
  student[0] = teacher[0] = forward[0] = second[0] = 0.25
  rows = cs.shift_curves(student, teacher, forward, GRID, second, space="feature_")
  plain = cs.shift_curves(student, teacher, forward, GRID, second)
  assert [{name.removeprefix("feature_"): v for name, v in row.items()} for row in rows] == plain
  assert set(rows[1]) - set(plain[1]) == {name for name in rows[1] if name not in ("t", "k")}
  assert rows[0]["feature_sw2_student_forward"] == 0
  assert not any("mmd2" in name or "bandwidth" in name for name in rows[0])


# Label error


def test_label_error_is_the_rms_per_pixel_with_the_scatter_of_repeated_draws():
  """Errors N(0, s_k^2) on every pixel of 16: E = s_k, with the deviation s_k / sqrt(2 * 16 * N) over draws."""
  n, size = 300, np.array([0.3, 2.0]).reshape(2, 1, 1, 1, 1)
  label = normal((2, n, 4, 4, 1), 1)
  sources = {"forward": label, "student": label}
  references = {"forward": label + size * normal(label.shape, 2), "student": label + 0.5}
  rows = cs.label_error_curves(sources, references, GRID[:2], num_bootstrap=200)
  assert [(r["k"], r["t"]) for r in rows] == [(0, 1.0), (1, 0.5)]
  for r, s in zip(rows, size.ravel()):
    np.testing.assert_allclose(r["label_error_forward"], s, rtol=0.03)
    np.testing.assert_allclose(r["label_error_forward_high"] - r["label_error_forward_low"],
                               2 * 1.96 * s / np.sqrt(2 * 16 * n), rtol=0.25)
    assert r["label_error_forward_low"] < r["label_error_forward"] < r["label_error_forward_high"]
    assert r["label_error_student"] == pytest.approx(0.5) == r["label_error_student_high"]


def test_label_errors_of_a_wrong_teacher_against_the_true_denoiser():
  """Data N(m, c^2), a teacher that takes c for c': wrong by (k' - k)(z - alpha m) with k = alpha c^2 / v.

  On forward states E = |k' - k| sqrt(v), v = alpha^2 c^2 + sigma^2; on states that are off by d it is
  |k' - k| sqrt(v + d^2): covariate shift makes the labels worse.
  """
  p, mean, std, wrong, off = process.cosine(), 0.3, 0.4, 0.6, 1.5
  times = np.array([0.8, 0.4])
  rng = np.random.default_rng(0)
  labels, truths, expected = ({"forward": [], "student": []} for _ in range(3))
  for t in times:
    alpha, sigma = float(p.alpha(jnp.float32(t))), float(p.sigma(jnp.float32(t)))
    v = (alpha * std)**2 + sigma**2
    gain = alpha * std**2 / v - alpha * wrong**2 / ((alpha * wrong)**2 + sigma**2)
    forward = alpha * mean + np.sqrt(v) * rng.standard_normal((2000, 2, 2, 1))
    for source, z, d in (("forward", forward, 0), ("student", forward + off, off)):
      for kept, c in ((labels, wrong), (truths, std)):
        teacher = exact.gaussian(p, mean, c)
        kept[source].append(teacher(teacher.params, jnp.asarray(z, jnp.float32), jnp.full(2000, t, jnp.float32), {}))
      expected[source].append(abs(gain) * np.sqrt(v + d**2))
  rows = cs.label_error_curves({s: np.stack(v) for s, v in labels.items()}, {s: np.stack(v) for s, v in truths.items()},
                               times)
  for k, row in enumerate(rows):
    for source in ("forward", "student"):
      np.testing.assert_allclose(row[f"label_error_{source}"], expected[source][k], rtol=0.03)
    assert row["label_error_student_low"] > row["label_error_forward_high"]


def test_curves_are_fast_enough():
  rng = np.random.default_rng(0)
  big = [rng.standard_normal((5, 1000, 8, 8, 1), np.float32) for _ in range(3)]
  start = time.process_time()
  cs.shift_curves(*big, np.linspace(1, 0, 5), num_projections=64, num_bootstrap=20)
  assert time.process_time() - start < 6  # about 2 s on an idle core; twice that is left for a busy one


def test_bad_input_is_named():
  student, teacher, forward, _ = paths(n=10)
  with pytest.raises(UsageError, match=r"student path has shape \(2, 10, 4, 4, 1\); expected \[3, N, 4, 4"):
    cs.shift_curves(student[:2], teacher, forward, GRID)
  with pytest.raises(UsageError, match=r"the teacher path has shape"):
    cs.shift_curves(student, teacher[:, :, :3], forward, GRID)
  broken = student.copy()
  broken[1, 3] = np.inf
  with pytest.raises(UsageError, match="student path at k = 1 has non-finite numbers in 1 of 10 rows, .* 3"):
    cs.shift_curves(broken, teacher, forward, GRID)
  with pytest.raises(UsageError, match="the teacher path at k = 0 has 1 samples; at least 2"):
    cs.shift_curves(student, teacher[:, :1], forward, GRID)
  with pytest.raises(UsageError, match="paired sets of 10, 9, 10 samples"):
    cs.shift_curves(student, teacher[:, 1:], forward, GRID, paired=True)
  with pytest.raises(UsageError, match="bootstrap of 0 draws"):
    cs.shift_curves(student, teacher, forward, GRID, num_bootstrap=0)
  with pytest.raises(UsageError, match=r"labels of student states have shape \(3, 10, .* references \(3, 9"):
    cs.label_error_curves({"student": student}, {"student": student[:, 1:]}, GRID)
  with pytest.raises(UsageError, match="references of student states at k = 1 has non-finite"):
    cs.label_error_curves({"student": student}, {"student": broken}, GRID)
  with pytest.raises(UsageError, match="bandwidth is 0"):
    cs.mmd2_unbiased(student[0], teacher[0], 0)
  with pytest.raises(UsageError, match="unlike"):
    cs.sliced_wasserstein2(student[0], teacher[0, :, :3])
  with pytest.raises(UsageError, match="num_projections is 0"):
    cs.sliced_wasserstein2(student[0], teacher[0], num_projections=0)
