"""Speed of the parts of training and sampling, and what DDIL, rollouts, replay and the data cost beside a step."""

import jax
import jax.numpy as jnp
from configs import common

from ddil_jax import build as build_lib
from ddil_jax import keys as keys_lib
from ddil_jax import samplers
from ddil_jax.data.dataset import Dataset
from ddil_jax.diffusion.rollout import prior, rollout
from ddil_jax.evaluation.sampling import balanced_labels
from ddil_jax.states import replay as replay_lib
from ddil_jax.states.base import Context
from ddil_jax.states.rollouts import states_per_rollout
from launch.bench.measure import Size, Window, alternate, digits, rate, ratio, timed

ROLLOUT_TARGET, DDIL_TARGET, REPLAY_TARGET, INPUT_TARGET = 1.05, 1.15, 0.02, 5.0


def training(dataset: Dataset, network, size: Size) -> list[dict]:
  """DDIL steps against base steps, and the steps a second of all base methods and of the teacher."""
  rows, rates = [], []
  for method in size.methods:
    base = Window(digits(method, size), dataset, network, size.window)
    windows = {"base": base}
    if method != "teacher":
      mixed = digits(method, size, "ddil")
      mixed.states.update(common.DDIL)  # also for DMD2, whose own mixture has no teacher states
      windows["ddil"] = Window(mixed, dataset, network, size.window, base)
    seconds = alternate(windows, size.repeats, [window.warm_up for window in windows.values()])
    if "ddil" in windows:
      rows.append(ratio(f"{method}: DDIL step / base step", seconds, "ddil", "base", DDIL_TARGET,
                        method=method, steps=size.window, priors=common.DDIL,
                        refreshes=windows["ddil"].refreshes, base_refreshes=base.refreshes))
    rates.append(rate(f"{method}: training, batch {base.batch_size}", "steps/s", size.window, seconds["base"],
                      method=method, batch_size=base.batch_size))
  return rows + rates


def replay(dataset: Dataset, network, size: Size) -> list[dict]:
  """The draws and the push of DMD2's replay buffer in one of its periods, beside the steps of that period.

  They run as programs of their own, so the cost of their calls is counted too.
  """
  if "dmd2" not in size.methods:
    return []
  window = Window(digits("dmd2", size), dataset, network, size.window)
  window.warm_up()
  window()
  state, batch = window.end, window.runner.place_batch(window.batches[0])

  @jax.jit
  def draw(buffer, step):
    key = jax.random.fold_in(window.root, step)
    keys = keys_lib.per_example(key, batch["lane"])
    ctx = Context(step, key, keys, batch, state.params["student"], (), window.batch_size)
    return window.built.distribution.sample(buffer, ctx)

  visited = states_per_rollout(window.built.objective.sampler_grid, window.built.objective.grid)
  new = jax.tree.map(lambda v: v[:, :visited], state.dist.states)
  push = jax.jit(replay_lib.push)

  def period():
    buffer, drawn = push(state.dist, new), None
    for step in range(1, size.window):  # at none of which the buffer is refreshed
      drawn, _ = draw(buffer, step)
    return drawn, buffer

  seconds = alternate({"replay": lambda: timed(period), "steps": window}, size.repeats)
  return [ratio("dmd2: replay, draws and push / steps", seconds, "replay", "steps", REPLAY_TARGET, steps=size.window,
                batch_size=window.batch_size)]


def inputs(dataset: Dataset, network, size: Size) -> list[dict]:
  """Reading the batches of the fastest step, the teacher's, onto the device, beside the steps themselves."""
  window = Window(digits("teacher", size), dataset, network, size.window)

  def read():
    return [window.runner.place_batch(window.batches[step]) for step in range(size.window)]

  seconds = alternate({"steps": window, "inputs": lambda: timed(read)}, size.repeats)
  examples = size.window * window.batch_size
  return [ratio("input pipeline, times what the teacher's steps consume", seconds, "steps", "inputs", INPUT_TARGET,
                "at least", steps=size.window, batch_size=window.batch_size),
          rate("input pipeline", "examples/s", examples, seconds["inputs"])]


def rollouts(dataset: Dataset, network, size: Size) -> list[dict]:
  """K-step scans of PD's DDIM and of LCM's re-noising against K forward passes, one after the other."""
  rows = []
  for method, solver in (("pd", "DDIM"), ("lcm", "re-noising")):
    if method not in size.methods:
      continue
    config = digits(method, size)
    if method == "pd":
      config.objective.num_steps = max(size.rollouts)
    built, batch = build_lib.build(config, dataset), config.train.batch_size
    forward = jax.jit(built.objective.student)
    keys = jax.random.split(jax.random.key(2), batch)
    cond = {"label": jnp.asarray(balanced_labels(batch, dataset.num_classes))}
    x_T = prior(built.parts.process, keys, jnp.zeros((batch,) + built.parts.image_shape))
    for steps in size.rollouts:
      sampler = samplers.samplers(config, built, steps)[0]
      times = [jnp.full(batch, t, jnp.float32) for t in sampler.grid[:-1]]

      @jax.jit
      def scan(params, x, keys, sampler=sampler):
        return rollout(sampler.policy(params), x, sampler.grid, cond, keys)

      def scans():
        x = x_T
        for _ in range(size.inner):
          x = scan(network, x, keys)
        return x

      def forwards():
        x = x_T
        for _ in range(size.inner):
          for t in times:
            x = forward(network, x, t, cond)
        return x

      programs = {"scan": lambda: timed(scans), "forward passes": lambda: timed(forwards)}
      seconds = alternate(programs, size.repeats)
      rows.append(ratio(f"{solver} rollout of {steps} steps / {steps} forward passes", seconds, "scan",
                        "forward passes", ROLLOUT_TARGET, steps=steps, batch_size=batch, calls=size.inner))
  return rows


def sampling(dataset: Dataset, network, size: Size) -> list[dict]:
  """Images a second of every method's own sampler, at the demo's evaluation batch."""
  rows = []
  for method in size.methods:
    config = digits(method, size)
    built, batch = build_lib.build(config, dataset), config.eval.batch_size
    sampler = samplers.samplers(config, built)[0]
    keys = jax.random.split(jax.random.key(2), batch)
    cond = {"label": jnp.asarray(balanced_labels(batch, dataset.num_classes))}
    sample = jax.jit(sampler.sample)
    run = lambda: timed(lambda: sample(network, keys, cond))  # noqa: E731
    rows.append(rate(f"{method}: sampling in {sampler.steps} steps, batch {batch}", "samples/s", batch,
                     alternate({"sample": run}, size.repeats)["sample"], method=method, steps=sampler.steps,
                     batch_size=batch))
  return rows


def gradient_in_scan(dataset: Dataset, network, size: Size, count: int = 20) -> list[dict]:
  """A curiosity: steps along the gradient of one 3x3 convolution, in a `lax.scan` and called one by one."""
  config = digits("teacher", size)
  height, width, _ = dataset.images.shape[1:]
  channels, batch = config.model.channels, config.train.batch_size
  x = jax.random.normal(jax.random.key(0), (batch, height, width, channels))
  start = jax.random.normal(jax.random.key(1), (3, 3, channels, channels)) / channels

  def descend(kernel, _=None):
    loss = lambda k: jnp.mean(jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) ** 2)
    return kernel - 1e-3 * jax.grad(loss)(kernel), None

  scan, once = jax.jit(lambda k: jax.lax.scan(descend, k, None, length=count)[0]), jax.jit(descend)

  def one_by_one():
    kernel = start
    for _ in range(count):
      kernel, _ = once(kernel)
    return kernel

  programs = {"scan": lambda: timed(lambda: scan(start)), "calls": lambda: timed(one_by_one)}
  return [ratio("gradient of a convolution in a lax.scan / by calls", alternate(programs, size.repeats), "scan",
                "calls", None, steps=count, batch_size=batch)]
