"""Score and distribution matching, adversarial methods: closed forms on Gaussian data, reductions, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddil_jax import keys as keys_lib
from ddil_jax import lora, registry
from ddil_jax.diffusion import process, solvers, weighting
from ddil_jax.diffusion.rollout import finish, rollout
from ddil_jax.errors import UsageError
from ddil_jax.models import exact
from ddil_jax.objectives import add, diff_instruct, dmd, dmd2, f_distill, gdd, ladd, moment_matching, sid, ufogen, vsd
from ddil_jax.objectives.base import View, bind
from ddil_jax.states.base import SOURCES, States
from ddil_jax.states.replay import on_policy
from ddil_jax.training.step import init_state, make_train_step
from tests import building, toys

P = process.edm()
MEAN, STD = 0.3, 0.5  # of the data
A, B = 0.8, -0.2  # the generator is x = A z + B
SIGMA = 0.7


def gaussian(mean, std):
  """The exact denoiser of N(mean, std^2) as a DenoiseFn."""
  teacher = exact.gaussian(P, mean, std)
  return bind(teacher, teacher.params)


@pytest.fixture(scope="module")
def draws():
  """(z, noise, t) of many generated pixels at one noise level; z and noise in antithetic pairs."""
  rng = np.random.default_rng(0)
  z, noise = (rng.standard_normal((1, 300, 300, 1)) for _ in range(2))
  z, noise = np.concatenate([z, -z, z, -z]), np.concatenate([noise, noise, -noise, -noise])
  return jnp.asarray(z, jnp.float32), jnp.asarray(noise, jnp.float32), jnp.full((4,), SIGMA, jnp.float32)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_with_exact_scores(draws, alpha):
  """With the exact conditional means E[L w] = (1 - alpha) E (f_T - f_psi)^2: 0 at alpha = 1, negative above it."""
  z, noise, t = draws
  loss, found = sid.sid_loss(P, gaussian(MEAN, STD), gaussian(B, A), A * z + B, t, noise, {}, alpha)
  weighed = loss * found["weight"].reshape(-1, 1, 1, 1)
  gap = float(jnp.mean((found["d_real"] - found["d_fake"]) ** 2))
  assert abs(float(weighed.mean()) - (1 - alpha) * gap) < 0.01 * gap


def test_sid_goes_through_both_networks():
  """Its gradient is not the one that stops at the networks' inputs, and it is 0 where they agree."""
  x, t = jnp.linspace(-1, 1, 6).reshape(2, 3, 1, 1), jnp.full((2,), SIGMA)
  real, fake = gaussian(MEAN, STD), gaussian(B, A)
  by_x = jax.grad(lambda x, fake: sid.sid_loss(P, real, fake, x, t, 0.5 * x, {})[0].sum())
  stopped = lambda denoise: lambda x, t, cond: jax.lax.stop_gradient(denoise(x, t, cond))  # noqa: E731
  frozen = jax.grad(lambda x: sid.sid_loss(P, stopped(real), stopped(fake), x, t, 0.5 * x, {})[0].sum())
  assert float(jnp.abs(by_x(x, fake) - frozen(x)).max()) > 1e-2
  np.testing.assert_array_equal(by_x(x, real), 0)


@pytest.mark.parametrize("scale, estimate", [(0.0, lambda c, u: u), (-1.0, lambda c, u: 2 * u - c)])
def test_sid_guides_its_critic(scale, estimate):
  """At 0 (Zero-CFG) it sees no condition, below 0 (Anti-CFG) it is led away from it, in both losses."""
  parts, batch, teacher = toys.toy_parts(process.cosine()), toys.toy_batch(4), toys.toy_init(jax.random.key(7))
  keys, cond = keys_lib.per_example(jax.random.key(0), batch["lane"]), {"label": jnp.asarray(batch["label"])}
  states = States(jnp.ones_like(batch["image"]), jnp.ones(4), jnp.zeros(4, jnp.int32), cond, jnp.zeros(4, jnp.int32),
                  batch["image"])
  params = {"student": teacher, "critic": {"net": toys.toy_init(jax.random.key(3))}}
  view = View(params, {}, teacher, jnp.zeros((), jnp.int32))

  def losses(critic, scale):
    objective = sid.make(parts._replace(critic=critic), critic_scale=scale, critic_training_scale=scale,
                         critic_weight="constant")
    return np.stack([player.loss(params[player.name], view, states, batch, keys)[0] for player in objective.players])

  def expected(params, x_t, t, cond, *rest):
    return estimate(*(parts.critic(params, x_t, t, each, *rest) for each in (cond, toys.null(cond))))

  found = losses(parts.critic, scale)
  np.testing.assert_allclose(found, losses(expected, 1.0), rtol=1e-5)
  assert np.abs(found / losses(parts.critic, 1.0) - 1).max(axis=1).min() > 1e-2


def test_sida_terms_at_zero():
  zero = jnp.zeros((3,))
  np.testing.assert_allclose(sid.gan_terms(zero), np.log(2), rtol=1e-6)
  np.testing.assert_allclose(sid.gan_terms(zero, zero), np.log(2), rtol=1e-6)
  assert float(jax.grad(lambda v: sid.gan_terms(v).sum())(jnp.full((1,), 11.0))[0]) == 0  # beyond the clamp


def test_diff_instruct_is_the_gradient_of_the_kl(draws):
  """d KL(N(b, a^2 + s^2) || N(m, c^2 + s^2)) by (a, b), with the weight alpha^2 / sigma^2."""
  z, noise, t = draws
  real, fake = gaussian(MEAN, STD), gaussian(B, A)

  def loss(a, b):
    return diff_instruct.ikl_loss(P, real, fake, a * z + b, t, noise, {}, weighting.snr_weight())[0].mean()

  found = jax.grad(loss, argnums=(0, 1))(A, B)
  own, other = A**2 + SIGMA**2, STD**2 + SIGMA**2
  np.testing.assert_allclose(found, (A * (1 / other - 1 / own), (B - MEAN) / other), rtol=0.01)


def test_dmd2_points_where_diff_instruct_points(draws):
  """Without its normaliser DMD2's matching gradient is Diff-Instruct's; with it each sample has a factor."""
  z, noise, t = draws
  real, fake, x = gaussian(MEAN, STD), gaussian(B, A), A * z + B
  _, one = diff_instruct.ikl_loss(P, real, fake, x, t, noise, {})
  _, other = dmd2.dm_loss(P, real, fake, x, t, noise, {})
  norm = jnp.abs(x - other["d_real"]).mean((1, 2, 3), keepdims=True)
  np.testing.assert_allclose(other["gradient"] * norm, one["gradient"], atol=1e-6)


def test_f_distill_reduces_to_dmd2():
  """rkl weighs every ratio alike; where the discriminator cannot tell, every divergence does."""
  mean, ratio = (lambda v: v.mean(0)), jnp.array([0.2, 1.0, 3.0])
  np.testing.assert_allclose(f_distill.f_weight("rkl", ratio, mean), 1, rtol=1e-5)
  for name in f_distill.WEIGHTS:
    np.testing.assert_allclose(f_distill.f_weight(name, jnp.ones(3), mean), 1, rtol=1e-5)
    # w = f''(r) r^2 is positive, so no divergence turns the gradient around.
    assert float(f_distill.f_weight(name, ratio, mean).min()) > 0
  np.testing.assert_allclose(f_distill.density_ratio(jnp.array([-50.0, 0.0, 50.0])), [0.1, 1.0, 5.0])
  index = f_distill.bin_index(jnp.array([0.0, 0.6, 0.7, 1.0]), 0.0, 1.0, 4)
  np.testing.assert_array_equal(index, [0, 2, 2, 3])
  means = f_distill.bin_means(jnp.array([1.0, 2.0, 4.0, 5.0]), index, jnp.full(4, 9.0), 0.0, mean, 0.0)
  np.testing.assert_allclose(means, [1, 9, 3, 5])


def test_vsd_of_a_critic_that_is_the_teacher_is_no_change():
  """A LoRA starts as no change, so VSD's gradient is 0; a step away from it, it is not."""
  parts, base = toys.toy_parts(P), toys.toy_init(jax.random.key(0))
  delta = vsd.make(parts, rank=1).init(jax.random.key(1), base)["critic"]["net"]
  x, t = jnp.ones((2,) + toys.IMAGE), jnp.full((2,), SIGMA)

  def gap(delta):
    real, fake = bind(parts.teacher, base), bind(parts.critic, lora.merge(base, delta))
    return vsd.vsd_loss(P, real, fake, x, t, x, {})[1]["gradient"]

  np.testing.assert_array_equal(gap(delta), 0)
  assert float(jnp.abs(gap(jax.tree.map(lambda v: v + 0.1, delta))).max()) > 1e-3
  with pytest.raises(UsageError, match="rank 0"):
    vsd.make(parts, rank=0)


def test_moment_matching_in_closed_form(draws):
  """One step from noise is Diff-Instruct at z_s; the auxiliary network's optimum is halfway to the teacher."""
  z, noise, t = draws
  x, z_t = A * z + B, P.t_max * noise
  real, fake = gaussian(MEAN, STD), gaussian(B, A)
  z_s = moment_matching.transition(P, "ddim", z_t, x, jnp.full((4,), P.t_max), t, None)
  by_x = jax.grad(lambda x: moment_matching.student_loss(x, fake(z_s, t, {}), real(z_s, t, {})).sum())(x)
  _, found = diff_instruct.ikl_loss(P, real, fake, x, t, (z_t - x) / P.t_max, {})
  np.testing.assert_allclose(by_x * x[0].size, found["gradient"], atol=1e-5)
  np.testing.assert_array_equal(moment_matching.student_loss(x, real(z_s, t, {}), real(z_s, t, {})), 0)

  halfway = 0.5 * (fake(z_s, t, {}) + real(z_s, t, {}))
  slope = lambda c: moment_matching.aux_loss(x, halfway + c, real(z_s, t, {})).mean()  # noqa: E731
  # The posterior's mean takes the place of its draws up to sampling error: z_s is drawn with x.
  assert abs(float(jax.grad(slope)(0.0))) < 0.02 < abs(float(jax.grad(slope)(0.2)))


def test_posterior_transition_reaches_the_forward_marginal(draws):
  """z_s of q(z_s | z_t, x) is distributed as noised x."""
  z, noise, t = draws
  far = jnp.full((4,), 3.0)
  x = A * z + B
  z_t = x + 3.0 * noise
  fresh = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
  z_s = moment_matching.transition(P, "posterior", z_t, x, far, t, fresh)
  assert abs(float(jnp.std(z_s - x)) - SIGMA) < 5e-3 and abs(float(jnp.mean((z_s - x) * x))) < 5e-3


def test_discriminators_that_cannot_tell():
  zero = jnp.zeros((3,))
  np.testing.assert_allclose(ladd.discriminator_loss(zero, zero), 2 * np.log(2), rtol=1e-6)
  np.testing.assert_allclose(ufogen.discriminator_loss(zero, zero), 2 * np.log(2), rtol=1e-6)
  np.testing.assert_allclose(gdd.fake_loss(zero, "ns") + gdd.real_loss(zero, "ns"), 2 * np.log(2), rtol=1e-6)
  np.testing.assert_array_equal(gdd.fake_loss(zero, "hinge") + gdd.real_loss(zero, "hinge"), 2)
  np.testing.assert_array_equal(ladd.approximate_r1(zero + 1, zero + 1), 0)


def test_add_with_heads_that_say_nothing():
  """Each of two heads adds 2 to the discriminator and nothing to the student, whose rest is the distillation."""
  parts, teacher, batch = toys.toy_parts(), toys.toy_init(jax.random.key(7)), toys.toy_batch(4)
  objective = add.make(parts, num_steps=2, layers=("a", "b"), distill_weight=3.0, r1_gamma=0.5)
  keys = keys_lib.per_example(jax.random.key(0), batch["lane"])
  states = States(jnp.ones_like(batch["image"]), jnp.ones(4), jnp.zeros(4, jnp.int32), {"label": batch["label"]},
                  jnp.zeros(4, jnp.int32), batch["image"])
  params = objective.init(jax.random.key(1), teacher)
  view = View(params | {"critic": params["critic"] | {"heads": jax.tree.map(jnp.zeros_like, params["critic"]["heads"])}},
              {}, teacher, jnp.zeros((), jnp.int32))
  student, critic = (player.loss(view.params[player.name], view, states, batch, keys) for player in objective.players)
  np.testing.assert_array_equal(critic[0], 4)
  np.testing.assert_array_equal(critic[1]["r1"], 0)
  np.testing.assert_allclose(student[0], 3 * student[1]["distill"])
  # A linear head on the mean over pixels has the derivative w / pixels at each of them.
  loss, found = objective.players[1].loss(params["critic"], view, states, batch, keys)
  square = sum(jnp.sum(head["w"] ** 2) for head in params["critic"]["heads"].values())
  np.testing.assert_allclose(found["r1"], square / (toys.IMAGE[0] * toys.IMAGE[1]), rtol=1e-5)
  np.testing.assert_allclose(loss, found["gan"] + 0.25 * found["r1"], rtol=1e-6)


def test_add_distils_to_the_mode():
  """On N(m, c^2) the gradient, averaged over the noise, is 2 alpha (x - m) sigma^2 / (alpha^2 c^2 + sigma^2) / numel."""
  p = process.flow()
  teacher = exact.gaussian(p, MEAN, STD)
  x = jnp.linspace(-1, 1, 6).reshape(2, 3, 1, 1)
  t, noise = jnp.array([0.3, 0.7]), jnp.asarray(np.random.default_rng(0).standard_normal(x.shape), jnp.float32)

  def loss(x):  # the teacher is linear, so two opposite draws are the average
    return sum(add.distillation_loss(p, bind(teacher, teacher.params), x, t, sign * noise, {}) for sign in (1, -1)) / 2

  alpha, sigma = ((f(t)).reshape(2, 1, 1, 1) for f in (p.alpha, p.sigma))
  expected = 2 * alpha * (x - MEAN) * sigma**2 / (alpha**2 * STD**2 + sigma**2) / 3
  np.testing.assert_allclose(jax.grad(lambda x: loss(x).sum())(x), expected, atol=1e-6)


def test_add_keeps_its_feature_network():
  """Its heads learn; the network, which is stored with them, does not, and neither does a weight decay move it."""
  parts, teacher = toys.toy_parts(), toys.toy_init(jax.random.key(7))
  objective = add.make(parts, num_steps=2)
  state, _ = building.run(objective, on_policy(building.sources(parts, objective)["forward"]), teacher,
                          optimizer=optax.adamw(1e-2, weight_decay=0.1))
  start = objective.init(jax.random.key(0), teacher)["critic"]
  found = state.params["critic"]
  np.testing.assert_array_equal(found["net"]["W"], start["net"]["W"])
  assert all(np.abs(found["heads"][name]["w"] - start["heads"][name]["w"]).max() > 1e-3 for name in start["heads"])


def test_ufogen_waits_beyond_the_clamp():
  """A discriminator that is right by more than c, and a generator that fools it by more, have no gradient."""
  right, wrong = jnp.full((1,), 0.7), jnp.full((1,), -0.7)

  def slope(loss):
    return [float(g[0]) for g in jax.grad(lambda a, b: loss(a, b).sum(), argnums=(0, 1))(wrong, right)]

  assert slope(ufogen.discriminator_loss) == [0, 0]
  assert all(slope(lambda a, b: ufogen.discriminator_loss(b, a)))
  assert slope(lambda a, b: ufogen.adversarial_loss(a) + ufogen.adversarial_loss(b))[1] == 0


def test_r1_of_a_linear_discriminator():
  """|d (w . x) / d x|^2 = |w|^2, per example."""
  w = jnp.arange(6.0).reshape(1, 2, 3, 1)
  x = jnp.ones((4, 2, 3, 1))
  np.testing.assert_allclose(gdd.r1_penalty(lambda x: (w * x).sum(), x), jnp.full(4, (w**2).sum()))


def test_dmd_regresses_pairs_only():
  """A batch of rollout and of pair states: the regression is there where the image belongs to the state."""
  parts = toys.toy_parts()
  objective = dmd.make(parts, num_steps=2, regression=0.5)
  batch = toys.toy_batch(4)
  keys = keys_lib.per_example(jax.random.key(0), batch["lane"])
  source = jnp.array([SOURCES.index(name) for name in ("student", "pairs", "forward", "pairs")], jnp.int32)
  k = jnp.zeros(4, jnp.int32)
  states = States(jnp.ones_like(batch["image"]), jnp.ones(4), k, {"label": batch["label"]}, source, batch["image"])
  teacher = toys.toy_init(jax.random.key(7))
  params = objective.init(jax.random.key(1), teacher)
  view = View(params, {}, teacher, k[0])
  loss, found = objective.players[0].loss(params["student"], view, states, batch, keys)
  np.testing.assert_array_equal(found["regression"] > 0, [False, True, False, True])
  np.testing.assert_allclose(loss, found["dm"] + 0.5 * found["regression"], rtol=1e-6)


@pytest.mark.parametrize("solver", [solvers.renoise(), solvers.ddim()], ids=["renoise", "ddim"])
def test_finish_is_the_rest_of_the_rollout(solver):
  """From the start it is the rollout; from a visited state on the grid too, if the noise is the same."""
  p, grid = process.cosine(), np.array([1.0, 0.6, 0.3, 0.0])
  teacher = exact.gaussian(p, 0.1, 0.5)
  policy = solver(p, bind(teacher, teacher.params))
  keys = keys_lib.per_example(jax.random.key(0), jnp.arange(3))
  x_T = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 2, 1)), jnp.float32)
  path = rollout(policy, x_T, grid, {}, keys, path=True)
  start = jnp.array([0, 1, 2])
  x = jnp.stack([path[k, b] for b, k in enumerate(start)])
  t = jnp.asarray(grid, jnp.float32)[start]
  for unroll in (False, True):
    np.testing.assert_allclose(finish(policy, x, t, grid, {}, keys, unroll), path[-1], atol=1e-6)


@pytest.mark.parametrize("name, options, message", [
    ("sid", dict(times=(0.5, 0.2)), "times"), ("sid", dict(through="some"), "through 'some'"),
    ("diff_instruct", dict(times=(0.0, 1.5)), "times"), ("dmd", dict(dm_range=(1.0, 0.0)), "dm_range"),
    ("dmd", dict(regression=-1.0), "regression"), ("f_distill", dict(divergence="tv"), "divergence 'tv'"),
    ("f_distill", dict(ratio_range=(0.0, 1.0)), "ratio_range"), ("ladd", dict(times=(0.3, 0.3)), "times"),
    ("vsd", dict(random_guidance=(3.0, 1.0)), "random_guidance"),
    ("moment_matching", dict(kind="euler"), "kind 'euler'"),
    ("ufogen", dict(num_scales=9, num_steps=2), "multiple"), ("gdd", dict(kind="wgan"), "kind 'wgan'"),
    ("gdd", dict(frozen="("), "regular expression"), ("gdd", dict(features=()), "at least one feature"),
    ("add", dict(layers=()), "at least one layer"), ("add", dict(times=(0.5, 0.5)), "times"),
    ("add", dict(distill_weight=-1.0), "distill_weight -1")])
def test_wrong_options_are_named(name, options, message):
  with pytest.raises(UsageError, match=f"{name}: .*{message}".replace("(", "\\(")):
    registry.load("objectives", name).make(toys.toy_parts(), **options)


@pytest.mark.parametrize("name", ["ladd", "ufogen", "gdd", "ect", "tcm"])
def test_no_guidance_where_no_estimate_is_used(name):
  with pytest.raises(UsageError, match=f"{name}: .*guidance scale 2"):
    registry.load("objectives", name).make(toys.toy_parts(guidance_scale=2.0))


def test_ect_from_the_teacher_is_guided():
  assert not registry.load("objectives", "ect").make(toys.toy_parts(guidance_scale=2.0), from_data=False).needs_x0


def test_ufogen_needs_clean_data():
  assert registry.load("objectives", "ufogen").make(toys.toy_parts()).needs_x0


@pytest.mark.parametrize("name, options", [
    ("sid", dict(critic_weight="constant", times=(0.5, 0.9))), ("diff_instruct", dict(critic_weight="constant")),
    ("dmd", dict(critic_weight="constant")), ("moment_matching", dict(num_steps=1))])
def test_students_reach_the_data(name, options):
  """A student x = a z + b and a critic with a mean and a deviation to learn: a and b become the data's."""
  p = process.flow()
  teacher = exact.gaussian(p, MEAN, STD)

  def student(params, x_t, t, cond, keys=None, features=()):
    return params["a"] * x_t + params["b"]

  start = {"mean": jnp.asarray(-0.2), "std": jnp.asarray(0.9)}
  parts = toys.toy_parts(p, teacher=teacher, student=student)._replace(
      critic=teacher, image_shape=(1, 1, 1), num_classes=0, init_critic=lambda key, params: dict(start),
      init_student=lambda key, params: {"a": start["std"], "b": start["mean"]})
  objective = registry.load("objectives", name).make(parts, **options)
  n = 256
  batch = {"image": np.zeros((n, 1, 1, 1), np.float32), "lane": np.arange(n, dtype=np.int32)}
  distribution = on_policy(building.sources(parts, objective)["student"])
  rates = {"student": optax.adam(optax.linear_schedule(2e-2, 0, 400)),
           "critic": optax.adam(optax.linear_schedule(5e-2, 0, 400))}
  step = make_train_step(objective, distribution, rates, {}, n)
  state = init_state(objective, distribution, rates, {}, jax.random.key(0), teacher.params, batch)

  @jax.jit
  def train(state):
    def body(i, state):
      return step(state, {"teacher": teacher.params}, batch, jax.random.key(1), ("student", "critic"))[0]
    return jax.lax.fori_loop(0, 400, body, state)

  found = train(state).params["student"]
  assert abs(float(found["b"]) - MEAN) < 0.05 and abs(abs(float(found["a"])) - STD) < 0.05, found
