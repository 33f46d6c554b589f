"""The covariate shift of a run, on Gaussian data where all of it is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddil_jax import build as build_lib
from ddil_jax import config as config_lib
from ddil_jax import samplers
from ddil_jax import runs, shift
from ddil_jax.data import pipeline
from ddil_jax.data.dataset import Dataset
from ddil_jax.diffusion import process
from ddil_jax.errors import UsageError
from ddil_jax.models import exact
from ddil_jax.objectives import dmd2, pd
from ddil_jax.training.parallel import make_runner
from ddil_jax.training.step import init_state, make_train_step
from tests import building, toys

PROCESS, MEAN, STD, N, STEPS = process.cosine(), 0.2, 0.5, 400, 4


def built(student=None):
  """PD at 4 steps on Gaussian data with the exact teacher; two classes that do not differ."""
  teacher = exact.gaussian(PROCESS, MEAN, STD)
  parts = toys.toy_parts(PROCESS, teacher=teacher, student=student or teacher)
  rng = np.random.default_rng(0)
  images = (MEAN + STD * rng.standard_normal((2 * N + 30,) + toys.IMAGE)).astype(np.float32)
  labels = (np.arange(len(images)) % 7 == 0).astype(np.int32)
  objective = pd.make(parts, num_steps=STEPS)
  return build_lib.Built(parts, objective, building.ddil(parts, objective), {}, {}, None,
                         Dataset("gaussian", images, labels, 2, (-1, 1), "train")), teacher


def probe(made, num_samples=N, teacher_steps=256, **options):
  parts, teacher = made
  config = config_lib.load("configs/digits_pd.py:smoke", {"train.stages": "()"})
  sampler = samplers.samplers(config, parts)[0]
  return shift.Probe(parts, sampler, teacher.params, num_samples, teacher_steps, **options)


def flow_to_the_next_time(bias):
  """x0 estimates whose DDIM steps are the exact flow between the sampler's times, but for a bias of the first."""
  def student(params, x_t, t, cond, keys=None, features=()):
    s = jnp.maximum(t - 1 / STEPS, 0)
    x_s = exact.gaussian_flow(PROCESS, MEAN, STD, x_t, t, s)
    alpha, sigma = (process.expand(of(t), x_t) for of in (PROCESS.alpha, PROCESS.sigma))
    alpha_s, sigma_s = (process.expand(of(s), x_t) for of in (PROCESS.alpha, PROCESS.sigma))
    first = process.expand(t, x_t) > 1 - 0.5 / STEPS
    x_s = x_s + jnp.where(first, bias, 0)
    return (x_s - sigma_s / sigma * x_t) / (alpha_s - sigma_s / sigma * alpha)
  return student


BIAS = 0.8
flat = lambda x: x.reshape(len(x), -1)  # noqa: E731


@pytest.fixture(scope="module")
def rows():
  return probe(built(flow_to_the_next_time(BIAS))).rows({}, flat)


def scales(t):
  """(alpha, sigma, sqrt(v)) of the forward marginal N(alpha m, v)."""
  alpha, sigma = float(PROCESS.alpha(jnp.float32(t))), float(PROCESS.sigma(jnp.float32(t)))
  return alpha, sigma, np.sqrt((alpha * STD)**2 + sigma**2)


def offsets(rows):
  """By how much the bias moves the student's states: the flow carries it on in proportion to sqrt(v)."""
  first = scales(rows[1]["t"])[2]
  return [0.0] + [BIAS * scales(r["t"])[2] / first for r in rows[1:]]


def test_a_known_shift_in_state_space(rows):
  assert [round(r["t"], 6) for r in rows] == [1, 0.75, 0.5, 0.25, 0]
  for row, off in zip(rows, offsets(rows)):
    for pair in ("student_forward", "student_teacher"):
      floor = row["sw2_floor"] if pair == "student_forward" else 0  # student and teacher start from the same noise
      np.testing.assert_allclose(row[f"sw2_{pair}"], np.hypot(off, floor), rtol=0.05, atol=0.01)
    np.testing.assert_allclose(row["sw2_teacher_forward"], row["sw2_floor"], rtol=0.2)
    assert (row["mmd2_student_forward_low"] > row["mmd2_floor_high"]) == (row["k"] > 0)
    assert row["mmd2_teacher_forward_low"] < row["mmd2_floor_high"]


def test_a_known_shift_in_feature_space(rows):
  """The teacher's estimate moves by alpha c^2 / v for each unit that the state moves."""
  for row, off in zip(rows[1:-1], offsets(rows)[1:-1]):
    alpha, _, root_v = scales(row["t"])
    expected = alpha * STD**2 / root_v**2 * off
    np.testing.assert_allclose(row["feature_sw2_student_teacher"], expected, rtol=0.05)
    np.testing.assert_allclose(row["feature_sw2_student_forward"], np.hypot(expected, row["feature_sw2_floor"]), rtol=0.05)
  last = rows[-1]  # the clean end: these features are the states themselves
  for name in ("bandwidth", "sw2_student_forward", "mmd2_student_teacher", "sw2_floor"):
    np.testing.assert_allclose(last[f"feature_{name}"], last[name], rtol=1e-6)


def test_known_label_errors(rows):
  """One step to E[x0 | z] and many to the end of the flow differ by (c / sqrt(v) - alpha c^2 / v)(z - alpha m)."""
  for row, off in zip(rows[:-1], offsets(rows)):
    alpha, _, root_v = scales(row["t"])
    gap = STD / root_v - alpha * STD**2 / root_v**2
    expected = {"forward": gap * root_v, "teacher": gap * root_v, "student": gap * np.hypot(root_v, off)}
    for source, value in expected.items():
      np.testing.assert_allclose(row[f"label_error_{source}"], value, rtol=0.05, err_msg=f"{source} at {row['t']}")
  assert not any("label_error" in name for name in rows[-1])


def test_rows_do_not_depend_on_the_batch_size_and_drift_is_a_part_of_them(rows):
  other = probe(built(flow_to_the_next_time(BIAS)), batch_size=150)
  again = other.rows({}, flat)
  for a, b in zip(rows, again, strict=True):
    assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
  drift = other.drift({})
  expected = {f"shift/{pair}/sw2@{k}": again[k][f"sw2_{pair}"] for pair in ("student_forward", "student_teacher")
              for k in range(1, STEPS + 1)}
  assert drift == pytest.approx(expected, rel=1e-5)


def test_without_features(rows):
  plain = probe(built(flow_to_the_next_time(BIAS)), num_samples=20, teacher_steps=4).rows({})
  assert set(plain[1]) == {name for name in rows[1] if not name.startswith("feature_")}


def test_a_student_that_diverged():
  broken = probe(built(lambda params, x_t, t, cond, keys=None, features=(): x_t * jnp.inf), 20, 4)
  drift = broken.drift({})
  assert len(drift) == 2 * STEPS and all(np.isnan(v) for v in drift.values())
  with pytest.raises(UsageError, match="student path at k = 1 has non-finite"):
    broken.rows({})


def test_forward_and_floor_have_the_same_labels():
  labels = np.random.default_rng(0).integers(0, 5, 101)
  first, second = shift._pairs_of_a_class(labels, 30, seed=3)
  assert len(first) == 30 and len(set(first) | set(second)) == 60
  np.testing.assert_array_equal(labels[first], labels[second])
  assert len(set(labels[first])) == 5
  everything, _ = shift._pairs_of_a_class(labels, 1000, seed=3)
  assert len(everything) == sum(n // 2 for n in np.bincount(labels))
  with pytest.raises(UsageError, match="0 samples: at least 2"):
    shift._pairs_of_a_class(np.arange(10), 30, seed=0)


def test_what_a_run_logs_of_itself_now_and_then():
  """The run's hook, on DMD2 with toy networks: drift of the shift, critic lag, gradient norms."""
  parts, teacher = toys.toy_parts(), toys.toy_init(jax.random.key(7))
  objective = dmd2.make(parts, num_steps=STEPS, gan_weight=0.1)
  data = built()[0].dataset
  made = build_lib.Built(parts, objective, building.ddil(parts, objective), {p.name: optax.sgd(0.1) for p in
                                                                              objective.players}, {}, None, data)
  config = config_lib.load("configs/digits_dmd2.py:smoke", {"eval.shift_samples": "40", "eval.ema": "raw"})
  batches = pipeline.batches(data, 8, 0)
  state = init_state(objective, made.distribution, made.optimizers, {}, jax.random.key(0), teacher, batches[0])
  # A critic that is its teacher has no gradient to give.
  state = state._replace(params=state.params | {"critic": jax.tree.map(lambda v: 1.1 * v, state.params["critic"])})
  logged = {}
  runner = make_runner("single", lambda layout: make_train_step(objective, made.distribution, made.optimizers, {}, 8,
                                                                layout=layout), 8)
  hook = runs._diagnose(config, made, teacher, runner.place_frozen({"teacher": teacher}), batches, runner,
                        lambda step, values: logged.update({step: values}))
  for step in (3, 6):
    hook(step, state._replace(step=jnp.int32(step)))
  drift = {f"shift/student_{name}/sw2@{k}" for name in ("forward", "teacher") for k in range(1, STEPS + 1)}
  own = {f"diagnose/{name}" for name in ("score_training", "score_fresh", "critic_lag", "dm_gradient_norm",
                                         "gan_gradient_norm")}
  assert set(logged) == {3, 6}
  for values in logged.values():
    assert set(values) == drift | own and np.isfinite(list(values.values())).all()
    np.testing.assert_allclose(values["diagnose/critic_lag"], values["diagnose/score_fresh"]
                               - values["diagnose/score_training"], atol=1e-6)
  assert {name for name in own if logged[3][name] == logged[6][name]} == set()  # other batches, other draws
  assert all(logged[3][name] == logged[6][name] for name in drift)  # the same student
