"""Trajectory methods: what they reduce to, and closed forms on Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import distance, process, solvers, weighting
from ddil_jax.diffusion.process import add_noise, expand, velocity_from_x0
from ddil_jax.diffusion.rollout import rollout
from ddil_jax.errors import UsageError
from ddil_jax.models import exact
from ddil_jax.objectives import (boot, cd, ctm, ect, guided, lcm, meanflow, pd, regression, rf, scm, scott, slam, tcm,
                                 tract, twinflow)
from ddil_jax.objectives.base import View, bind
from ddil_jax.states.base import Context, States
from tests import building, toys

MEAN, STD = 0.1, 0.5
TIMES = jnp.array([0.35, 0.6, 0.85])


@pytest.fixture(scope="module")
def setting():
  """Flow process, exact teacher of N(MEAN, STD^2), toy denoiser, noisy data at TIMES."""
  p = process.flow()
  rng = np.random.default_rng(0)
  x0, eps = (jnp.asarray(rng.standard_normal((3,) + toys.IMAGE), jnp.float32) for _ in range(2))
  x0 = MEAN + STD * x0
  gaussian = exact.gaussian(p, MEAN, STD)
  parts = toys.toy_parts(p)
  toy = lambda seed: bind(parts.student, toys.toy_init(jax.random.key(seed)))  # noqa: E731
  return p, bind(gaussian, gaussian.params), toy, x0, eps, add_noise(p, x0, eps, TIMES)


def to_zero(p, x, t, s=0.0):
  return exact.gaussian_flow(p, MEAN, STD, x, t, jnp.full_like(t, s))


def test_tract_of_two_steps_with_the_teacher_as_self_teacher_is_pd(setting):
  p, _, toy, _, _, x_t = setting
  teacher, mid, end = toy(1), TIMES - 0.1, TIMES - 0.2
  ours = tract.tract_target(p, teacher, teacher, x_t, TIMES, mid, end, {})[0]
  np.testing.assert_allclose(ours, pd.x_target(p, teacher, x_t, TIMES, mid, end, {})[0], atol=2e-5)


def test_tract_loss_is_zero_for_the_exact_jump(setting):
  """The self-teacher and the student jump as the flow does, the teacher's small step by the exact flow too."""
  p, _, _, _, _, x_t = setting
  end = jnp.full_like(TIMES, 0.1)
  # The x0 with which DDIM makes the exact step to a time.
  label = lambda s: lambda x, t, cond: pd.invert_ddim(p, x, exact.gaussian_flow(p, MEAN, STD, x, t, s), t, s)  # noqa: E731
  loss = tract.tract_loss(p, label(end), label(TIMES - 0.05), label(end), x_t, TIMES, TIMES - 0.05, end, {},
                          weighting.make("constant"))
  np.testing.assert_allclose(loss, 0, atol=1e-9)


def test_debiased_average():
  """All updates so far with weights m^(n - i), normalised."""
  values, average = [1.0, 3.0, -2.0, 5.0], 100.0
  for n, value in enumerate(values):
    decay = tract.debiased(0.5)(n)
    average = decay * average + (1 - decay) * value
  weights = 0.5 ** np.arange(3, -1, -1)
  assert average == pytest.approx(np.dot(weights, values) / weights.sum())


def test_slam_at_gamma_one_is_lcm(setting):
  p, _, _, _, _, x_t = setting
  net = toys.toy_parts(p).student
  student, other = toys.toy_init(jax.random.key(1)), toys.toy_init(jax.random.key(2))
  teacher, s, cond = bind(net, toys.toy_init(jax.random.key(3))), TIMES - 0.1, {"guidance_scale": jnp.ones(3)}
  f, metric = lcm.consistency_function(net), distance.make("pseudo_huber")
  expected, _ = cd.consistency_loss(p, bind(f, student), bind(f, other), teacher, solvers.ddim(), x_t, TIMES, s, cond,
                                    metric)
  found, _ = slam.slam_loss(p, bind(net, student), bind(f, other), teacher, x_t, TIMES, s, jnp.ones(3), cond, metric)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_slam_noise_scale_by_simulation():
  """If z_t is a Markov step from z_s, the point between them is alpha_t x0 plus noise of scale sigma_gamma."""
  p, n = process.cosine(), 200_000
  t, s, gamma = jnp.array([0.6]), jnp.array([0.5]), jnp.array([0.3])
  e1, e2 = jax.random.normal(jax.random.key(0), (2, 1, n, 1))
  z_s = expand(p.sigma(s), e1) * e1
  ratio = p.alpha(t) / p.alpha(s)
  z_t = expand(ratio, e1) * z_s + expand(jnp.sqrt(p.sigma(t) ** 2 - (ratio * p.sigma(s)) ** 2), e1) * e2
  z, sigma = slam.sub_path(p, z_t, z_s, t, s, gamma)
  assert float(jnp.std(z)) == pytest.approx(float(sigma[0]), rel=0.01)


def test_ctm_jump_of_the_exact_flow_is_a_semigroup(setting):
  """With the exact x0 of each jump, G(G(x, t, u), u, s) = G(x, t, s), G(x, t, t) = x, and the CTM loss is 0."""
  p, teacher, _, _, _, x_t = setting

  def g(x, t, cond):
    s = cond["end_time"]
    safe = jnp.where(s < t, s, 0.5 * t)
    exact_jump = pd.invert_ddim(p, x, exact.gaussian_flow(p, MEAN, STD, x, t, safe), t, safe)
    return jnp.where(expand(s < t, x), exact_jump, teacher(x, t, {}))

  u, s, end = 0.7 * TIMES, 0.3 * TIMES, jnp.zeros(3)
  direct = ctm.jump(p, g, x_t, TIMES, s, {})
  np.testing.assert_allclose(direct, ctm.jump(p, g, ctm.jump(p, g, x_t, TIMES, u, {}), u, s, {}), atol=1e-5)
  np.testing.assert_array_equal(ctm.jump(p, g, x_t, TIMES, TIMES, {}), x_t)
  x_u = exact.gaussian_flow(p, MEAN, STD, x_t, TIMES, u)
  loss, _ = ctm.ctm_loss(p, g, g, g, x_t, x_u, TIMES, u, s, end, {}, distance.make("l2"))
  np.testing.assert_allclose(loss, 0, atol=1e-10)


def test_ctm_advances_each_example_by_its_own_count(setting):
  p, teacher, _, _, _, x_t = setting
  grid, policy = jnp.linspace(1, 0, 9), solvers.ddim()(p, teacher)
  k, count = jnp.array([2, 2, 5]), jnp.array([0, 2, 3])
  found = ctm.advance(policy, x_t, grid, k, count, 3, {})
  for b in range(3):
    x = x_t[b:b + 1]
    for i in range(int(count[b])):
      x, _ = policy.step((), x, grid[k[b] + i][None], grid[k[b] + i + 1][None], {}, None)
    np.testing.assert_allclose(found[b], x[0], atol=1e-6)


def test_ect_at_ratio_zero_regresses_on_the_image(setting):
  p, _, toy, x0, _, x_t = setting
  r = ect.nearer_time(TIMES, 0.0, 0.0)
  np.testing.assert_array_equal(r, 0)
  _, found = ect.ect_loss(p, toy(1), toy(1), lambda x, t, cond: x0, x_t, TIMES, r, {}, ect.PAIR_WEIGHTS["default"], 0.0)
  np.testing.assert_allclose(found["x_r"], x0, atol=1e-6)
  np.testing.assert_array_equal(ect.stage_ratio(jnp.array([0, 1, 20])), jnp.array([0.5, 0.75, 0.999]))


def test_tcm_ends_at_the_first_stage_below_the_transition(setting):
  """Above it TCM's step is that of ECT, below its target is the frozen stage's whatever the student says."""
  p, _, toy, x0, _, x_t = setting
  student, first, r = toy(1), toy(2), jnp.array([0.3, 0.5, 0.7])
  of = lambda target: ect.ect_loss(p, student, target, lambda x, t, cond: x0, x_t, TIMES, r, {},  # noqa: E731
                                   ect.PAIR_WEIGHTS["default"], 1e-4)[0]
  ours, ect_step, to_first = of(tcm.truncated(student, first, 0.5)), of(student), of(first)
  np.testing.assert_allclose(ours, [to_first[0], *ect_step[1:]], rtol=1e-6)
  assert np.abs(ect_step - to_first).min() > 1e-3


def test_reflow_has_no_loss_for_the_straight_flow_of_gaussian_pairs(setting):
  """The teacher carries eps to MEAN + STD eps; the line between the two is known from any of its points."""
  p, _, _, _, eps, _ = setting
  x0 = exact.gaussian_flow(p, MEAN, STD, eps, jnp.ones(3), jnp.zeros(3))

  def straight(x, t, cond):
    t = expand(t, x)
    return (1 - STD) * (x - (1 - t) * MEAN) / ((1 - t) * STD + t) - MEAN

  of = lambda noise: rf.rf_loss(straight, add_noise(p, x0, noise, TIMES), TIMES, noise, x0, {},  # noqa: E731
                                distance.make("l2"))
  loss, velocity = of(eps)
  np.testing.assert_allclose(loss, 0, atol=1e-10)
  # One step of Euler from any time is the image.
  np.testing.assert_allclose(add_noise(p, x0, eps, TIMES) - expand(TIMES, x0) * velocity, x0, atol=1e-6)
  assert (of(jnp.roll(eps, 1, axis=0))[0] > 0.1).all()  # noise and image that do not belong together


def exact_average_velocity(p):
  """(x_t, t, r, cond) -> (y_t - y_r) / (t - r) of the exact flow, and the velocity itself at r = t."""
  teacher = exact.gaussian(p, MEAN, STD)

  def velocity(x, t, r, cond):
    del cond
    gap = expand(jnp.where(r < t, t - r, 1), x)
    average = (x - exact.gaussian_flow(p, MEAN, STD, x, t, r)) / gap
    return jnp.where(expand(r < t, x), average, velocity_from_x0(p, x, teacher(teacher.params, x, t, {}), t))

  return velocity


def test_meanflow_loss_is_zero_for_the_exact_average_velocity(setting):
  p, teacher, _, _, _, x_t = setting
  v = velocity_from_x0(p, x_t, teacher(x_t, TIMES, {}), TIMES)
  for r in (0.4 * TIMES, TIMES):
    _, found = meanflow.meanflow_loss(p, exact_average_velocity(p), x_t, TIMES, r, {}, v)
    np.testing.assert_allclose(found["u"], found["target"], atol=2e-5)


def test_twinflow_correction_is_of_first_order_for_the_exact_average_velocity(setting):
  """The reference's jumps are exact in any number; what is left is the error of the step to the near time."""
  p, teacher, _, _, _, x_t = setting
  exact_u, r = exact_average_velocity(p), 0.3 * TIMES
  u, v = exact_u(x_t, TIMES, r, {}), velocity_from_x0(p, x_t, teacher(x_t, TIMES, {}), TIMES)
  left = [np.abs(u - twinflow.recursive_target(p, u, exact_u, x_t, TIMES, TIMES - gap, r, {}, v, order=3)).max()
          for gap in (0.04, 0.02)]
  assert left[0] < 0.2 and left[0] / left[1] == pytest.approx(2, rel=0.15)
  # From t to the near time itself: the velocity, exactly.
  target = twinflow.recursive_target(p, u, exact_u, x_t, TIMES, r, r, {}, v, bound=1e9)
  np.testing.assert_allclose(target, v, atol=1e-6)


def test_twinflow_moves_fake_images_to_real_ones(setting):
  """Flows to constant images in closed form: real 0.5, the student's 0.1."""
  p, _, _, _, eps, _ = setting
  real, image = 0.5, jnp.full_like(eps, 0.1)

  def velocity(x, t, r, cond):
    sign = expand(cond.get("time_sign", jnp.ones_like(t)), x)
    return velocity_from_x0(p, x, jnp.where(sign < 0, image, real), t)

  np.testing.assert_allclose(twinflow.fake_velocity_loss(p, velocity, image, eps, TIMES, {}), 0, atol=1e-10)
  difference = twinflow.rectification(p, velocity, image, eps, TIMES, {})
  np.testing.assert_allclose(difference, jnp.broadcast_to(expand((real - 0.1) / TIMES, image), image.shape),
                             rtol=1e-4)
  # A step down the gradient by the one-step velocity moves the image, noise - u, by that difference.
  u = eps - image
  gradient = jax.grad(lambda u: jnp.sum(0.5 * (u - jax.lax.stop_gradient(u - difference)) ** 2))(u)
  np.testing.assert_allclose(twinflow.move(p, eps, u - gradient, jnp.ones(3), jnp.zeros(3)), image + difference,
                             atol=1e-5)


def test_scm_tangent_vanishes_for_the_exact_consistency_function(setting):
  p, teacher, _, _, _, x_t = setting
  x_hat = scm.to_trig(p, x_t, TIMES)
  slope = 0.5 * scm.trig_output(p, teacher, x_hat, TIMES, {})
  consistency = lambda x, t, cond: to_zero(p, x, t)  # noqa: E731
  _, found = scm.scm_loss(p, consistency, x_t, TIMES, slope, {}, 1.0)
  assert float(found["norm"].max()) < 1e-4
  _, wrong = scm.scm_loss(p, teacher, x_t, TIMES, slope, {}, 1.0)
  assert float(wrong["norm"].min()) > 0.05


@pytest.mark.parametrize("method", ["meanflow", "scm"])
def test_differences_in_place_of_the_derivative_are_of_second_order(setting, method):
  p, teacher, _, _, _, x_t = setting
  if method == "meanflow":
    v = velocity_from_x0(p, x_t, teacher(x_t, TIMES, {}), TIMES)
    derivative = lambda h: meanflow.along_path(  # noqa: E731
        p, exact_average_velocity(p), x_t, TIMES, 0.3 * TIMES, {}, v, h)[1]
  else:
    slope = 0.5 * scm.trig_output(p, teacher, scm.to_trig(p, x_t, TIMES), TIMES, {})
    derivative = lambda h: scm.scm_loss(p, teacher, x_t, TIMES, slope, {}, 1.0, difference=h)[1]["derivative"]  # noqa: E731
  # Of the first two times: from the last there is no room for a whole step up.
  right = derivative(0.0)[:2]
  left = [np.abs(derivative(h)[:2] - right).max() for h in (0.24, 0.12)]
  assert left[0] < 0.2 * np.abs(right).max()
  assert left[0] / left[1] == pytest.approx(4, rel=0.2)


def test_scott_without_noise_in_one_step_is_cd(setting):
  p, _, _, x0, eps, _ = setting
  parts, k = toys.toy_parts(p), jnp.array([0, 3, 7], jnp.int32)
  student, average, teacher = (toys.toy_init(jax.random.key(seed)) for seed in range(3))
  keys = keys_lib.per_example(jax.random.key(0), jnp.arange(3))
  view = View({}, {"target": average}, teacher, jnp.zeros((), jnp.int32))

  def loss(module, **options):
    objective = module.make(parts, num_scales=9, target_decay=0.95, **options)
    t = jnp.asarray(objective.grid, jnp.float32)[k]
    states = States(add_noise(p, x0, eps, t), t, k, {"label": k % 3}, jnp.zeros(3, jnp.int32), x0)
    return objective.players[0].loss(student, view, states, {}, keys)[0]

  expected = loss(cd, solver="ddim")
  np.testing.assert_allclose(loss(scott, solver_steps=1, eta=0.0), expected, rtol=1e-5)
  assert (np.abs(loss(scott, solver_steps=1, eta=1.0) / expected - 1)[:2] > 1e-2).all()


def test_scott_full_noise_has_the_posterior_moments():
  p, x0 = process.cosine(), jnp.full((1, 400, 400, 1), 0.3)
  t, s, keys = jnp.array([0.6]), jnp.array([0.45]), keys_lib.per_example(jax.random.key(0), jnp.arange(1))
  x_t = jnp.full_like(x0, 0.7)
  mean, log_var = solvers.posterior(p, x_t, x0, t, s)
  found = scott.stochastic_steps(p, lambda x, t, cond: x0, x_t, t, s, {}, keys, 1, 1.0)
  assert float(found.mean()) == pytest.approx(float(mean.mean()), abs=0.005)
  assert float(found.std()) == pytest.approx(float(jnp.exp(0.5 * log_var).mean()), rel=0.01)


@pytest.mark.parametrize("kind", [process.cosine, process.edm, process.flow, process.stable_diffusion])
def test_boot_step_is_a_ddim_step_of_the_teacher(kind):
  """From any start the new signal leads where the teacher's step leads; from pure noise Delta is the published one."""
  p = kind()
  t, u, v = (f * p.t_max * jnp.ones(3) for f in (0.8, 0.5, 0.3))
  rng = np.random.default_rng(1)
  x_t, signal, estimate = (jnp.asarray(rng.standard_normal((3,) + toys.IMAGE), jnp.float32) for _ in range(3))
  teacher = lambda x, t, cond: jnp.tanh(x) + estimate  # noqa: E731
  found, _ = boot.signal_target(p, teacher, x_t, signal, t, u, v, {})
  x_u = solvers.ddim_step(p, x_t, signal, t, u)
  expected = solvers.ddim_step(p, x_u, teacher(x_u, u, {}), u, v)
  np.testing.assert_allclose(solvers.ddim_step(p, x_t, found, t, v), expected, rtol=1e-3, atol=1e-4)
  if kind is process.flow:
    noise = jnp.ones(3)
    half = lambda s: 0.5 * p.log_snr(s)  # noqa: E731
    np.testing.assert_allclose(boot.signal_step(p, noise, u, v), 1 - jnp.exp(half(u) - half(v)), rtol=1e-5)
    np.testing.assert_allclose(boot.signal_step(p, noise, noise, u), 1)
    np.testing.assert_allclose(boot.signal_step(p, noise, u, 0 * u), 1)


def test_boot_has_no_loss_for_the_teachers_walk(setting):
  """The signals of the teacher's DDIM walk from any of its points, and the walk's end in one step."""
  p, teacher, _, _, _, x_t = setting
  grid = jnp.linspace(0.9, 0, 10)
  keys = keys_lib.per_example(jax.random.key(0), jnp.arange(3))
  walk = rollout(solvers.ddim()(p, teacher), x_t, grid, {}, keys, path=True)

  for first in (0, 4):
    t = jnp.full(3, grid[first])
    def signal(x, t, cond, first=first):
      i = jnp.argmin(jnp.abs(grid - cond["end_time"][0]))
      at = jnp.where(i > first, grid[i], 0.5 * t[0])
      y = pd.invert_ddim(p, x, walk[i], t, jnp.full(3, at))
      return jnp.where(i > first, y, 7.0)  # of no bearing: a path's first step is the teacher's alone
    for i in range(first, 9):
      u, v = jnp.full(3, grid[i]), jnp.full(3, grid[i + 1])
      loss = boot.boot_loss(p, signal, signal, teacher, walk[first], t, u, v, {})
      np.testing.assert_allclose(loss, 0, atol=1e-8)
      assert float(boot.boot_loss(p, lambda x, t, cond: signal(x, t, cond) + 0.1, signal, teacher, walk[first], t, u, v,
                                  {}).min()) > 5e-3
    np.testing.assert_allclose(signal(walk[first], t, {"end_time": jnp.zeros(3)}), walk[-1], atol=1e-5)


def test_boot_loss_of_the_exact_signal_is_of_second_order(setting):
  """On Gaussian data what is left is the error of Euler's step; where the path begins nothing is left."""
  p, teacher, _, _, _, x_t = setting

  def signal(x, t, cond):
    s = cond["end_time"]
    safe = jnp.where(s < t, s, 0.5 * t)
    exact_signal = pd.invert_ddim(p, x, exact.gaussian_flow(p, MEAN, STD, x, t, safe), t, safe)
    return jnp.where(expand(s < t, x), exact_signal, teacher(x, t, {}))

  left = [boot.boot_loss(p, signal, signal, teacher, x_t, TIMES, 0.6 * TIMES, 0.6 * TIMES - gap, {})
          for gap in (0.04, 0.02)]
  np.testing.assert_allclose(left[0] / left[1], 4, rtol=0.2)
  assert float(left[0].max()) < 1e-2
  np.testing.assert_allclose(boot.boundary_loss(signal, teacher, x_t, TIMES, {}), 0, atol=1e-12)


def test_boot_of_one_step_sees_no_image():
  """Its states are noise on every source, and its loss does not depend on the batch's images."""
  parts = toys.toy_parts()
  objective, teacher = boot.make(parts, num_scales=8), toys.toy_init(jax.random.key(7))
  found = []
  for seed in (0, 1):
    batch = toys.toy_batch(4) | {"image": toys.toy_batch(4, seed)["image"]}
    ctx = Context(jnp.zeros((), jnp.int32), jax.random.key(3),
                  keys_lib.per_example(jax.random.key(3), batch["lane"]), batch, teacher, teacher, 4)
    for source in building.sources(parts, objective).values():
      states = source.fresh(ctx)
      assert float(jnp.abs(states.x_t).std()) > 0.3 and np.all(states.t == parts.process.t_max)
      view = View({}, {}, jax.tree.map(lambda v: 1.1 * v, teacher), ctx.step)
      found.append(objective.players[0].loss(teacher, view, states, batch, ctx.keys)[0])
  np.testing.assert_array_equal(*np.split(np.array(found), 2))


def test_regression_labels_are_the_ends_of_the_teachers_walk(setting):
  """They go to the exact flow's end, and every student that gives them has no loss."""
  p, teacher, _, _, _, x_t = setting
  label = regression.end_point(p, teacher, x_t, TIMES, 0.0, {}, 200)
  np.testing.assert_allclose(label, to_zero(p, x_t, TIMES), atol=0.01)
  np.testing.assert_array_equal(regression.regression_loss(lambda x, t, cond: label, x_t, TIMES, label, {}), 0)


def guided_setting(scale):
  """Stage one on states with a given scale: the loss of a student that reads it and guides as the teacher does."""
  parts = toys.toy_parts(process.flow())
  net = parts.teacher
  itself = lambda params, x, t, cond, keys=None, features=(): parts.guidance(None)(bind(net, params))(x, t, cond)  # noqa: E731
  conditional = lambda params, x, t, cond, keys=None, features=(): net(  # noqa: E731
      params, x, t, {"label": cond["label"]})
  teacher, batch = toys.toy_init(jax.random.key(7)), toys.toy_batch(3)
  x_t = jnp.asarray(batch["image"])
  cond = {"label": jnp.asarray(batch["label"]), "guidance_scale": jnp.full(3, scale)}
  states = States(x_t, TIMES, jnp.zeros(3, jnp.int32), cond, jnp.zeros(3, jnp.int32), x_t)
  view = View({}, {}, teacher, jnp.zeros((), jnp.int32))
  keys = keys_lib.per_example(jax.random.key(0), jnp.arange(3))

  def loss(student):
    objective = guided.make(parts._replace(student=student), num_scales=8, sampler_steps=4)
    return objective.players[0].loss(teacher, view, states, batch, keys)[0]

  return loss(itself), loss(conditional)


def test_guided_distillation():
  """No loss for a student that guides itself; at g = 1 that is the conditional teacher."""
  guides, conditional = guided_setting(3.0)
  np.testing.assert_allclose(guides, 0, atol=1e-10)
  assert float(conditional.min()) > 1e-4
  np.testing.assert_allclose(guided_setting(1.0)[1], 0, atol=1e-10)


def test_stage_two_gives_both_networks_the_scale():
  parts = toys.toy_parts()
  keys = keys_lib.per_example(jax.random.key(0), jnp.arange(64))
  scale = pd.make(parts, guidance_range=(2.0, 4.0)).condition(keys, {})["guidance_scale"]
  assert float(scale.min()) >= 2 and float(scale.max()) <= 4 and float(scale.std()) > 0.3
  with pytest.raises(UsageError, match="must be 1"):
    pd.make(parts._replace(guidance_scale=3.0), guidance_range=(2.0, 4.0))


@pytest.mark.parametrize("module, options, said", [
    (guided, dict(guidance_range=()), "must be"),
    (guided, dict(guidance_range=(3.0, 2.0)), "g_min <= g_max"),
    (tract, dict(block_size=1), "block_size 1"), (slam, dict(sampler_steps=60), "sampler_steps 60"),
    (ctm, dict(outer="cubic"), "there are: euler"), (ctm, dict(outer="variance"), "process edm"),
    (ect, dict(weight="none"), "there are: c_out"), (meanflow, dict(same_share=2.0), "same_share 2.0"),
    (scm, dict(warmup_steps=0), "warmup_steps 0"), (tcm, dict(transition=1e9), "lower transition"),
    (scott, dict(eta=2.0), "eta 2.0"), (twinflow, dict(order=0), "order 0"),
    (regression, dict(label_steps=0), "label_steps 0"), (boot, dict(num_steps=40), "num_steps 40"),
    (boot, dict(boundary_weight=-1.0), "boundary_weight -1")])
def test_mistakes_are_named(module, options, said):
  with pytest.raises(UsageError, match=said):
    module.make(toys.toy_parts(), **options)
