"""How the time and the memory of a step grow, as exponents: slopes of logarithms, by least squares.

In a process with 8 virtual devices on the same cores: `python -m launch.bench.growth rows.json`.
"""

import functools
import json
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddil_jax import build as build_lib
from ddil_jax import samplers
from ddil_jax.data.dataset import Dataset
from ddil_jax.training import parallel
from ddil_jax.training.step import due_players, init_state, make_train_step
from launch.bench.measure import Size, alternate, digits, in_a_process, row, timed

DEVICES = 8
# What the arithmetic demands, and a tenth for noise; memory is the compiler's number and has none.
NOISE, ROUNDING = 0.1, 0.02


class Step(NamedTuple):
  """A compiled step of all players, and what it is given.

  Attributes:
    run: arguments -> new state; the state in the arguments is donated.
    arguments: () -> state, frozen, batch, key, made on the devices.
    peak: bytes of a device, as the compiler has it.
  """
  run: object
  arguments: object
  peak: int


def compiled_step(config: ConfigDict, dataset: Dataset, count: int = 1) -> Step:
  """The config's step on `count` devices."""
  config.train.parallel = "mesh" if count > 1 else "single"
  built = build_lib.build(config, dataset)
  runner = parallel.make_runner(
      config.train.parallel, lambda layout: make_train_step(
          built.objective, built.distribution, built.optimizers, built.ema_decays, config.train.batch_size,
          config.states.rollout_params, layout),
      config.train.batch_size, jax.devices()[:count], parallel.Options(config.train.fsdp))
  shapes = functools.partial(jax.eval_shape, lambda tree: tree)
  teacher = jax.eval_shape(built.init_teacher, jax.random.key(0)) if built.init_teacher else ()
  images = np.zeros((config.train.batch_size, *built.parts.image_shape), np.float32)
  batch = shapes({"image": images, "label": np.zeros(len(images), np.int32), "lane": np.zeros(len(images), np.int32)})
  make_state = functools.partial(init_state, built.objective, built.distribution, built.optimizers, built.ema_decays)
  given = runner.lay(make_state, teacher, batch)
  compiled = runner.lower(given, due_players(built.objective, 0)).compile()
  memory = compiled.memory_analysis()
  peak = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
          + memory.temp_size_in_bytes)

  def fill():  # numbers do not matter for the time; one program, so that each device has its own
    return jax.tree.map(lambda v: jnp.full(v.shape, 0.1 if jnp.issubdtype(v.dtype, jnp.floating) else 0, v.dtype),
                        tuple(given.values()))

  make = jax.jit(fill, out_shardings=jax.tree.map(lambda v: v.sharding, tuple(given.values())))
  key = jax.device_put(jax.random.key(0), compiled.input_shardings[0][-1])
  return Step(compiled, lambda: (*make(), key), peak)


def exponent(sizes, values) -> float:
  """The slope of log(values) over log(sizes)."""
  return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _grown(name: str, sizes: dict[int, Step], size: Size, time_demands: float, memory_demands: float) -> list[dict]:
  """Rows of steps that differ in one size."""
  def program(step):
    given = [step.arguments()]

    def run():
      def steps():
        state, frozen, batch, key = given[0]
        for _ in range(size.inner):
          state, _ = step.run(state, frozen, batch, key)
        given[0] = (state, frozen, batch, key)
        return state
      return timed(steps)
    return run

  seconds = alternate({str(n): program(step) for n, step in sizes.items()}, size.repeats)
  xs, peaks = list(sizes), [step.peak for step in sizes.values()]
  times = [exponent(xs, [seconds[str(n)][i] for n in xs]) for i in range(size.repeats)]
  medians = {n: round(float(np.median(values)) / size.inner, 6) for n, values in seconds.items()}
  return [row(f"step: time over {name}", "exponent", times, time_demands + NOISE, median_seconds=medians),
          row(f"step: memory over {name}", "exponent", [exponent(xs, peaks)], memory_demands + ROUNDING,
              mib={str(n): round(p / 2**20, 2) for n, p in zip(xs, peaks)})]


def _config(size: Size, side: int = 8, batch: int = 64) -> ConfigDict:
  """Denoising by the demo's network, of made-up images."""
  config = digits("teacher", size)
  config.train.batch_size = batch
  config.data.update(name="fake", image_size=side)
  return config


def _step(size: Size, side: int = 8, batch: int = 64, count: int = 1) -> Step:
  config = _config(size, side, batch)
  return compiled_step(config, build_lib.load_data(config, "train"), count)


def _rollouts(size: Size) -> list[dict]:
  config = _config(size)
  built = build_lib.build(config)
  network, keys = built.parts.init_student(jax.random.key(1), ()), jax.random.split(jax.random.key(2), 64)
  cond, programs, peaks = {"label": jnp.zeros(64, jnp.int32)}, {}, []
  counts = (2, 4) if size.smoke else (4, 8, 16)
  for count in counts:
    sampler = samplers.samplers(config, built, count)[0]
    sample = jax.jit(sampler.sample).lower(network, keys, cond).compile()
    memory = sample.memory_analysis()
    peaks.append(memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes)
    programs[str(count)] = functools.partial(timed, functools.partial(sample, network, keys, cond))
  seconds = alternate(programs, size.repeats)
  times = [exponent(counts, [seconds[str(n)][i] for n in counts]) for i in range(size.repeats)]
  return [row("rollout: time over its steps", "exponent", times, 1 + NOISE),
          row("rollout: memory over its steps", "exponent", [exponent(counts, peaks)], ROUNDING)]


def measure(size: Size) -> list[dict]:
  """The rows, in this process."""
  batches, sides, counts = (16, 64, 256), (8, 16, 32), (1, 2, 4, DEVICES)
  if size.smoke:
    batches, sides, counts = (16, 32), (8, 16), (1, 2)
  base = _step(size)
  rows = _grown("examples", {n: base if n == 64 else _step(size, batch=n) for n in batches}, size, 1, 1)
  rows += _grown("pixels", {n * n: base if n == 8 else _step(size, side=n) for n in sides}, size, 1, 1)
  # The same batch on more devices, of which the cores are the same: as much work; of the memory each has a part.
  rows += _grown("devices", {n: base if n == 1 else _step(size, count=n) for n in counts}, size, 0, 0)
  return rows + _rollouts(size)


def growth(dataset: Dataset, network, size: Size) -> list[dict]:
  """Exponents of time and memory over batch, resolution, virtual devices and the steps of a rollout."""
  del dataset, network
  return in_a_process("launch.bench.growth", size, f"--xla_force_host_platform_device_count={DEVICES}",
                      NPROC=str(2 * DEVICES))  # see launch/local.py::environment


if __name__ == "__main__":
  from launch.bench.measure import SMOKE
  pathlib.Path(sys.argv[1]).write_text(json.dumps(measure(SMOKE if "--smoke" in sys.argv else Size())))
