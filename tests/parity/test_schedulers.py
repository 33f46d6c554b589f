"""diffusers' schedulers in PyTorch against our solvers: the same toy network, the same noise, float32.

Each scheduler walks its whole trajectory. Our solver takes every single step from the scheduler's
own state, so that a difference is found where it arises; in some cases it walks the whole way too.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import grids, prediction, solvers, transforms
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import lcm_scalings, make_denoiser
from ddil_jax.diffusion.rollout import rollout
from ddil_jax.objectives.base import bind
from ddil_jax.objectives.lcm import consistency_function
from tests.oracle import toy

REASON = "parity with diffusers' schedulers needs PyTorch: pip install -r requirements-test.txt"
torch = pytest.importorskip("torch", reason=REASON)
diffusers = pytest.importorskip("diffusers", reason=REASON)

torch.set_num_threads(1)  # arrays this small run no faster on more

SHAPE = (3, 5, 5, 2)  # B, H, W, C
MOST_STEPS = 16
TOLERANCE = dict(rtol=1e-5, atol=1e-5)
HEADS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCALED_LINEAR = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
# A quantile that lies between two values, and a ceiling that some of the samples reach.
DYNAMIC = dict(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.5)
CLIP = dict(clip_sample=True, clip_sample_range=0.8)
PROJECTIONS = {"plain": (dict(clip_sample=False), transforms.identity()),
               "clip": (CLIP, transforms.clip(-0.8, 0.8)),
               "dynamic": (DYNAMIC, transforms.dynamic(0.9, 1.0, 2.5))}


@functools.cache
def weights():
  """Parameters of `toy.net` with outputs of about 1, so that x0 leaves the box at high noise."""
  rng = np.random.default_rng(7)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  return {"W1": normal(2, 8), "b1": 0.3 * normal(8), "c1": normal(8), "W2": 0.4 * normal(8, 2),
          "b2": 0.3 * normal(2), "phi": np.array([2e-3, -1.0], np.float32)}


def torch_net(x, t):
  """`toy.net` in PyTorch, on [B,C,H,W] at one time t."""
  p = {name: torch.from_numpy(value) for name, value in weights().items()}
  time = (p["phi"][0] * float(t) + p["phi"][1]) * p["c1"]
  hidden = torch.tanh(x.permute(0, 2, 3, 1) @ p["W1"] + p["b1"] + time)
  return (hidden @ p["W2"] + p["b2"]).permute(0, 3, 1, 2)


def channels_first(x):
  return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def channels_last(x):
  return np.moveaxis(x.numpy(), 1, -1)


@functools.cache
def start_and_noise(steps):
  """x_T, the rollout's keys, and the noise that `rollout` draws from them at each step."""
  keys = jax.random.split(jax.random.key(3), SHAPE[0])
  x_T = keys_lib.normal_like(keys_lib.named(keys, "prior"), jnp.zeros(SHAPE))
  return x_T, keys, [keys_lib.normal_like(keys_lib.numbered(keys, i), x_T) for i in range(steps)]


def walk_torch(scheduler, n, x_T, step):
  """All states [N+1,B,H,W,C] of a scheduler; step (i, t, x, out) -> the next x."""
  x, states = channels_first(x_T), [np.asarray(x_T)]
  with torch.no_grad():
    for i, t in enumerate(scheduler.timesteps):
      x = step(i, t, x, torch_net(x, t))
      states.append(channels_last(x))
  return np.stack(states)


def denoiser(process, prediction_type):
  return bind(make_denoiser(toy.net, process, prediction.make(HEADS[prediction_type])), weights())


def single_steps(policy, states, times, befores, noise):
  """Every step of a policy from the given state, all steps in one batch."""
  # Filled up to the same number of rows in all cases, so that JAX compiles every operation once.
  rows, filled = len(times) * SHAPE[0], MOST_STEPS * SHAPE[0]
  fold = lambda v: jnp.asarray(np.resize(np.concatenate(v), (filled,) + SHAPE[1:]))  # noqa: E731
  per_step = lambda v: jnp.asarray(np.resize(np.repeat(v, SHAPE[0]), filled), jnp.float32)  # noqa: E731
  x, t, s, eps = fold(states[:-1]), per_step(times), per_step(befores), fold(noise)
  step = lambda carry: policy.step(carry, x, t, s, {}, eps)  # noqa: E731
  start = policy.init(x)
  after, carry = step(start)
  if jax.tree.leaves(carry):  # what a step remembers is what the one before it saw
    shift = lambda first, v: jnp.concatenate([first[:SHAPE[0]], v[:-SHAPE[0]]])  # noqa: E731
    after, _ = step(jax.tree.map(shift, start, carry))
  return np.asarray(after)[:rows].reshape((-1,) + SHAPE)


def whole_walk(policy, x, times, befores, noise):
  """Our own trajectory, without the start."""
  carry, out = policy.init(x), []
  at = lambda value: jnp.full(SHAPE[:1], value, jnp.float32)  # noqa: E731
  for t, s, eps in zip(times, befores, noise):
    x, carry = policy.step(carry, x, at(t), at(s), {}, eps)
    out.append(x)
  return np.stack(out)


def check(ours, theirs):
  np.testing.assert_allclose(ours, theirs, **TOLERANCE)


def ddim_scheduler(spacing, prediction_type, options, final_alpha_one=True):
  return diffusers.DDIMScheduler(timestep_spacing=spacing, prediction_type=prediction_type,
                                 set_alpha_to_one=final_alpha_one, **SCALED_LINEAR, **options)


def ddim_pair(n, spacing, prediction_type, kind, eta, recompute, final_alpha_one=True):
  """(their states, our policy, times, the times they lead to, noise)."""
  options, project = PROJECTIONS[kind]
  scheduler = ddim_scheduler(spacing, prediction_type, options, final_alpha_one)
  scheduler.set_timesteps(n)
  x_T, _, noise = start_and_noise(n)

  def step(i, t, x, out):
    return scheduler.step(out, t, x, eta=eta, use_clipped_model_output=recompute,
                          variance_noise=channels_first(noise[i])).prev_sample

  theirs = walk_torch(scheduler, n, x_T, step)
  process = processes.stable_diffusion(final_alpha_one)
  denoise = denoiser(process, prediction_type)
  # Their scheduler projects x0 and keeps the network's noise; with use_clipped_model_output the noise
  # is recomputed from the projected x0, which is what our transforms of the denoiser do.
  policy = (solvers.ddim(eta)(process, transforms.reflect(project)(denoise)) if recompute
            else solvers.ddim(eta, project)(process, denoise))
  times = grids.ddim_timesteps(n, spacing)
  np.testing.assert_array_equal(times, scheduler.timesteps.numpy())
  return theirs, policy, times, grids.ddim_previous(times, n), noise


@pytest.mark.parametrize("spacing", grids.SPACINGS)
@pytest.mark.parametrize("prediction_type", HEADS)
def test_ddim(spacing, prediction_type):
  """7 steps, which do not divide 1000: their steps then do not end at the next timestep."""
  for kind, eta, recompute in itertools.product(PROJECTIONS, (0.0, 0.7), (False, True)):
    if kind == "plain" and recompute:
      continue  # nothing to recompute
    theirs, policy, times, befores, noise = ddim_pair(7, spacing, prediction_type, kind, eta, recompute)
    check(single_steps(policy, theirs, times, befores, noise), theirs[1:])
    if recompute and eta and spacing != "leading":
      check(whole_walk(policy, jnp.asarray(theirs[0]), times, befores, noise), theirs[1:])


def test_the_options_act():
  """Each option changes their trajectory by far more than the tolerance, so that the cases above differ."""
  usual = dict(n=7, spacing="trailing", prediction_type="epsilon", kind="plain", eta=0.0, recompute=False)
  final = lambda **change: ddim_pair(**(usual | change))[0][-1]  # noqa: E731
  variants = [final(), final(kind="clip"), final(kind="clip", recompute=True), final(kind="dynamic"),
              final(kind="dynamic", recompute=True), final(eta=0.7), final(spacing="leading"),
              final(spacing="linspace"), final(prediction_type="sample"),
              final(prediction_type="v_prediction")]
  for a, b in itertools.combinations(variants, 2):
    assert np.abs(a - b).max() > 1e-2


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_final_alpha_of_the_table(spacing):
  theirs, policy, times, befores, noise = ddim_pair(6, spacing, "epsilon", "clip", 0.7, False,
                                                    final_alpha_one=False)
  check(single_steps(policy, theirs, times, befores, noise), theirs[1:])


def test_ddim_by_rollout():
  """Where the steps divide 1000, `rollout` along `grids.ddim` is their sampler, noise included."""
  theirs, policy, _, _, _ = ddim_pair(5, "trailing", "v_prediction", "dynamic", 0.7, True)
  x_T, keys, _ = start_and_noise(5)
  ours = jax.jit(lambda x: rollout(policy, x, grids.ddim(5, "trailing"), {}, keys, path=True))(x_T)
  check(ours, theirs)


@pytest.mark.parametrize("scaling", [10.0, 0.003], ids=["lcm", "wide_boundary"])
def test_lcm(scaling):
  """4 steps. At the usual scaling the boundary hardly acts at these times; at 0.003 it mixes x_t in."""
  for prediction_type, (options, project) in itertools.product(HEADS, PROJECTIONS.values()):
    scheduler = diffusers.LCMScheduler(prediction_type=prediction_type, timestep_scaling=scaling,
                                       **SCALED_LINEAR, **options)
    scheduler.set_timesteps(4)
    x_T = start_and_noise(0)[0]
    # They draw inside; a generator of the same seed gives us the same numbers.
    generator, same = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    theirs = walk_torch(scheduler, 4, x_T,
                        lambda i, t, x, out: scheduler.step(out, t, x, generator=generator).prev_sample)
    first = channels_first(x_T)
    noise = [jnp.asarray(channels_last(torch.randn(first.shape, generator=same))) for _ in range(3)]
    noise.append(jnp.full(SHAPE, 1e3))  # the last step must not read it

    process = processes.stable_diffusion()
    times = grids.lcm_timesteps(4)
    np.testing.assert_array_equal(times, scheduler.timesteps.numpy())
    # The estimate is projected before the boundary condition mixes x_t in.
    head = make_denoiser(toy.net, process, prediction.make(HEADS[prediction_type]))
    projected = lambda p, x_t, t, cond, keys=None, features=(): project(head(p, x_t, t, cond))  # noqa: E731
    policy = solvers.renoise()(process, bind(consistency_function(projected, scaling), weights()))
    befores = grids.lcm(4)[1:]
    check(single_steps(policy, theirs, times, befores, noise), theirs[1:])
    if options is not CLIP:
      check(whole_walk(policy, x_T, times, befores, noise), theirs[1:])

    at = [0.0, *times.astype(float)]
    theirs_scalings = np.array([scheduler.get_scalings_for_boundary_condition_discrete(t) for t in at])
    check(np.stack(lcm_scalings(jnp.asarray(at, jnp.float32), timestep_scaling=scaling), 1), theirs_scalings)


# final_sigmas_type "zero" ends at clean data, where their last step is of first order whatever
# lower_order_final says, as ours is: the log-SNR there is infinite. "sigma_min" ends at the table's
# first entry; ours then takes the last step at second order, as theirs without lower_order_final.
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("n", [1, 2, 5, MOST_STEPS])
def test_dpmpp_2m(n, end):
  heads = HEADS if n == 5 else ["epsilon"]
  spacings = ("linspace", "trailing")
  for prediction_type, kind, spacing in itertools.product(heads, ("plain", "dynamic"), spacings):
    options = DYNAMIC if kind == "dynamic" else {}
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint", prediction_type=prediction_type,
        timestep_spacing=spacing, final_sigmas_type=end, lower_order_final=end == "zero" and n % 2 == 1,
        **SCALED_LINEAR, **options)
    scheduler.set_timesteps(n)
    x_T = start_and_noise(0)[0]
    theirs = walk_torch(scheduler, n, x_T, lambda i, t, x, out: scheduler.step(out, t, x).prev_sample)

    process = processes.stable_diffusion(final_alpha_one=end == "zero")
    denoise = transforms.reflect(PROJECTIONS[kind][1])(denoiser(process, prediction_type))
    policy = solvers.dpmpp_2m()(process, denoise)
    # Their "linspace" leaves out the last of n + 1 times; "trailing" is DDIM's.
    times = (grids.ddim_timesteps(n, "trailing") if spacing == "trailing"
             else grids.ddim_timesteps(n + 1, "linspace")[:-1])
    np.testing.assert_array_equal(times, scheduler.timesteps.numpy())
    befores, none = [*times[1:], -1], [jnp.full(SHAPE, 1e3)] * n  # deterministic: the noise must not be read
    check(single_steps(policy, theirs, times, befores, none), theirs[1:])
    if spacing == "trailing" and prediction_type == "epsilon":
      check(whole_walk(policy, x_T, times, befores, none), theirs[1:])


@pytest.mark.parametrize("options, table", [
    (SCALED_LINEAR, processes.sd_alphas_cumprod),
    (dict(beta_schedule="linear"), processes.ddpm_linear_alphas_cumprod)])
def test_tables_are_equal_to_the_bit(options, table):
  np.testing.assert_array_equal(table(), diffusers.DDIMScheduler(**options).alphas_cumprod.numpy())
