"""How things are measured: in turns, as medians; rows of the result; a run's first training steps."""

import concurrent.futures
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddil_jax import build as build_lib
from ddil_jax import config as config_lib
from ddil_jax.data import pipeline
from ddil_jax.data.dataset import Dataset
from ddil_jax.states.replay import Replay
from ddil_jax.states.rollouts import states_per_rollout
from ddil_jax.training import parallel
from ddil_jax.training.step import due_players, init_state, make_train_step

# A program runs once and says how many seconds that took.
Program = Callable[[], float]


class Size(NamedTuple):
  """How much is measured.

  Attributes:
    repeats: measurements of each program.
    window: training steps of one measurement: one replay period.
    inner: rollouts, forward passes and gradients of one measurement.
    rollouts: step counts K.
    methods: configs of the demo.
    images, side: how many images are measured, of how many pixels a side.
    large: pixels a side of the larger network's images.
    batch: of the networks of Stable Diffusion's size.
    smoke: networks as small as can be, on fake data.
  """
  repeats: int = 5
  window: int = 50
  inner: int = 5
  rollouts: tuple[int, ...] = (4, 8)
  methods: tuple[str, ...] = ("teacher", "pd", "lcm", "dmd2")
  images: int = 50_000
  side: int = 32
  large: int = 32
  batch: int = 16
  smoke: bool = False


SMOKE = Size(repeats=2, window=6, inner=1, rollouts=(2,), methods=("pd",), images=64, side=4, large=8, batch=4,
             smoke=True)


def digits(name: str, size: Size, *args: str) -> ConfigDict:
  """The config of a digits run of the demo, whose replay period is the window."""
  config = config_lib.load(f"configs/digits_{name}.py:{','.join((*args, *['smoke'] * size.smoke))}")
  config.states.refresh_every = size.window
  if size.smoke:
    config.model.channel_mult = (1,)
  return config


def alternate(programs: dict[str, Program], repeats: int,
              warm_ups: list[Program] | None = None) -> dict[str, list[float]]:
  """Seconds of each program, run in turns. Before that all are compiled at the same time, by running
  them once, or by `warm_ups`."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(lambda run: run(), warm_ups or programs.values()))
  seconds = {name: [] for name in programs}
  for _ in range(repeats):
    for name, run in programs.items():
      seconds[name].append(run())
  return seconds


def cores() -> int:
  """Cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def timed(work: Callable[[], object]) -> float:
  """Seconds until the arrays that `work` returns are there."""
  began = time.perf_counter()
  jax.block_until_ready(work())
  return time.perf_counter() - began


# Rows ---------------------------------------------------------------------------------------

left_out: list[str] = []  # what this process did not measure, and why


def leave_out(what: str) -> None:
  """Says what is not measured, and keeps it for the result."""
  print(f"left out: {what}", file=sys.stderr, flush=True)
  left_out.append(what)


def row(name: str, unit: str, values: list[float], target: float | None = None, bound: str = "at most",
        digits_: int = 4, **about) -> dict:
  """A row of the result: median and range of `values`.

  Args:
    target: which the median should be `bound`: "at most", "at least", or "within" (a factor of it around 1).
  """
  value = statistics.median(values)
  met = {"at most": lambda: value <= target, "at least": lambda: value >= target,
         "within": lambda: 1 / target <= value <= target}[bound]
  return {"name": name, "unit": unit, "value": round(value, digits_), "low": round(min(values), digits_),
          "high": round(max(values), digits_), "target": target, "bound": None if target is None else bound,
          "met": None if target is None else met(), **about}


def ratio(name: str, seconds: dict[str, list[float]], first: str, second: str, target: float | None,
          bound: str = "at most", times: float = 1.0, **about) -> dict:
  """A row: how many times the seconds of `second` those of `first` are, times a constant."""
  medians = {n: round(statistics.median(seconds[n]), 6) for n in (first, second)}
  return row(name, "ratio", [times * a / b for a, b in zip(seconds[first], seconds[second])], target, bound,
             median_seconds=medians, **about)


def rate(name: str, unit: str, count: int, seconds: list[float], **about) -> dict:
  """A row: how many a second; lowest and highest are of single measurements."""
  return row(name, unit, [count / s for s in seconds], digits_=2, **about)


def once(name: str, unit: str, value: float, target: float, **about) -> dict:
  """A row that was measured once."""
  return row(name, unit, [value], target, **about)


def in_a_process(module: str, size: Size, flags: str = "", arguments: tuple[str, ...] = (), **environment: str):
  """What `python -m module OUT ARGUMENTS [--smoke]` writes, in a process of its own with further XLA flags."""
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder, "rows.json")
    environment |= {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    subprocess.run([sys.executable, "-m", module, str(out), *arguments, *["--smoke"] * size.smoke], check=True,
                   env=os.environ | environment)
    return json.loads(out.read_text())


# Training -----------------------------------------------------------------------------------


class Window:
  """The first `steps` training steps of a run, always the same ones, fed as the training loop does.

  Buffers begin empty and the window is one replay period long, so every source is refreshed exactly
  once in it: when it is first drawn.
  """

  def __init__(self, config: ConfigDict, dataset: Dataset, network, steps: int, like: "Window | None" = None):
    """Players start as those of `like`: compiling their initialisation takes longer than a window."""
    self.built = build_lib.build(config, dataset)
    if like is not None:
      objective = self.built.objective._replace(init=lambda key, teacher: like.start.params)
      self.built = self.built._replace(objective=objective)
    self.batch_size, self.steps, self.config = config.train.batch_size, steps, config
    built, self.root = self.built, jax.random.key(config.seed)
    self.batches = pipeline.batches(dataset, self.batch_size, config.seed, config.data.flip)
    self.teacher = network if built.init_teacher else ()
    self.runner = parallel.make_runner("single", lambda layout: make_train_step(
        built.objective, built.distribution, built.optimizers, built.ema_decays, self.batch_size,
        config.states.rollout_params, layout), self.batch_size)
    self.frozen = self.runner.place_frozen({"teacher": self.teacher})
    self.start = init_state(built.objective, built.distribution, built.optimizers, built.ema_decays,
                            self.root, self.teacher, jax.tree.map(jnp.asarray, self.batches[0]))
    self.refreshes: dict[str, int] = {}
    self.end = None

  def __call__(self) -> float:
    seconds, self.end = self._run(self.steps)
    self.refreshes = self._count_refreshes(self.end.dist)
    return seconds

  def warm_up(self) -> float:
    """The first two steps: at one of them all players learn, at the other those of period 1."""
    return self._run(2)[0]

  def look(self, steps: int, before: Callable) -> list[tuple]:
    """[(host batch, before(state, frozen, batch, root), the step's metrics)] of the first steps."""
    state, seen = self._copy(), []
    for step in range(steps):
      batch = self.runner.place_batch(self.batches[step])
      found = jax.device_get(before(state, self.frozen, batch, self.root))
      state, metrics = self.runner.step(state, self.frozen, batch, self.root, due_players(self.built.objective, step))
      seen.append((self.batches[step], found, jax.device_get(metrics)))
    return seen

  def _copy(self):
    # A copy, since the step frees the state that it is given.
    return jax.block_until_ready(self.runner.place(jax.tree.map(jnp.copy, self.start)))

  def _run(self, steps: int):
    state = self._copy()
    began = time.perf_counter()
    for step in range(steps):
      batch = self.runner.place_batch(self.batches[step])
      due = due_players(self.built.objective, step)
      state, _ = self.runner.step(state, self.frozen, batch, self.root, due)
    jax.block_until_ready(state)
    return time.perf_counter() - began, self.runner.fetch(state)

  def _count_refreshes(self, dist) -> dict[str, int]:
    sources, objective = self.built.distribution.sources, self.built.objective
    grids = {"student": objective.sampler_grid, "dagger": objective.sampler_grid}
    if "teacher" in sources:
      grids["teacher"] = self.built.parts.make_grid(self.config.states.teacher_steps)
    parts = dist if len(sources) > 1 else (dist,)
    return {name: int(part.pushed) // states_per_rollout(grids[name], objective.grid)
            for name, part in zip(sources, parts) if isinstance(part, Replay)}
