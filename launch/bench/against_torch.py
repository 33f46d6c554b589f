"""Our training step beside the same step in PyTorch: same network, weights, batch and optimizer on the same cores.

That it is the same step is measured too: both take the first steps from the same parameters on the same draws, and
their losses are compared.
"""

import collections
import functools
import gzip
import importlib.metadata
import json
import pathlib
import re
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddil_jax import build as build_lib
from ddil_jax import keys as keys_lib
from ddil_jax.data.dataset import Dataset
from ddil_jax.objectives.base import draw_noise, draw_times
from ddil_jax.states.base import Context
from ddil_jax.training.step import due_players
from launch.bench.measure import Size, Window, alternate, cores, digits, leave_out, rate, ratio, row

TARGET = 1.3  # times the better of PyTorch's two
LOSS_TOLERANCE = 1e-3  # relative, after some updates in another order of summation
DM_RANGE = (0.02, 0.98)  # the default of DMD2
METHODS = {"teacher": "denoising", "pd": "pd", "lcm": "lcm", "dmd2": "dmd2"}


def against_torch(dataset: Dataset, network, size: Size) -> list[dict]:
  """Training steps of the demo's methods at 8x8, and denoising of a larger network at 32x32."""
  if not torch_version():
    leave_out("everything against PyTorch, which is not installed (pip install -r requirements-test.txt)")
    return []
  rows = []
  for method in size.methods:
    rows += _compare(method, METHODS[method], _config(method, size), dataset, network, size.window, size)
  config, dataset = large(size)
  name = f"{size.large}x{size.large} teacher"
  rows += _compare(name, "denoising", config, dataset, (), max(1, size.window // 25), size)
  return rows + profile(config, dataset, name)


def torch_version() -> dict[str, str]:
  """{"torch": version}, or {} where it is not installed."""
  try:
    return {"torch": importlib.metadata.version("torch")}
  except importlib.metadata.PackageNotFoundError:
    return {}


def _config(method: str, size: Size) -> ConfigDict:
  config = digits(method, size)
  config.optimizer.schedule = "constant"
  return config


def large(size: Size) -> tuple[ConfigDict, Dataset]:
  """Denoising at 32x32, batch 64, with 32 and 64 channels."""
  config = _config("teacher", size)
  config.data.update(name="fake", image_size=size.large)
  config.model.update(channels=32)
  config.train.batch_size = 64
  return config, build_lib.load_data(config, "train")


def perturbed(params):
  """Without the zeros with which networks begin: a network that gives 0 hides mistakes."""
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  return jax.tree.unflatten(tree, [jnp.asarray(v + 0.03 * rng.standard_normal(v.shape, np.float32)) for v in leaves])


def apart(window: Window) -> None:
  """Moves where the networks start: one that gives 0, or a critic that is the teacher still, has losses of 0."""
  window.start = window.start._replace(params=jax.tree.map(perturbed, window.start.params,
                                                           is_leaf=lambda tree: "conv_in" in tree))


def twin(window: Window, method: str, denoiser=None):
  """The same step in PyTorch, from the same parameters; `denoiser`: `torch_twin.denoise`, compiled."""
  from launch.bench import torch_twin
  config, built = window.config, window.built
  o, model, image = config.objective, config.model, built.parts.image_shape
  rates = {"student": config.optimizer.learning_rate,
           "critic": config.optimizer.critic_learning_rate or config.optimizer.learning_rate}
  options = {"grid": built.objective.grid, "rates": rates, "clip": config.optimizer.clip, "ema": config.train.ema[0],
             "t_min": built.parts.process.t_min, "num_classes": built.parts.num_classes}
  options |= {"denoising": lambda: {"label_dropout": o.label_dropout},
              "pd": lambda: {"fine_grid": built.parts.make_grid(2 * o.num_steps), "cap": o.snr_cap},
              "lcm": lambda: {"target_decay": o.target_decay},
              "dmd2": lambda: {"cap": o.weight_cap, "period": o.period, "dm_range": DM_RANGE,
                               "refresh_every": config.states.refresh_every,
                               "slots": config.states.capacity // window.batch_size}}[method]()

  def make_net():
    return torch_twin.UNet(model.channels, model.channel_mult, model.num_res_blocks, image[-1], built.parts.num_classes)

  return torch_twin.Step(method, make_net, window.start.params, window.teacher, options,
                         denoiser or torch_twin.denoise)


def seen(window: Window, method: str, steps: int) -> list[tuple]:
  """[(batch, draws, metrics)] of our first steps, in which the method's random numbers are known by their names."""
  distribution, times = window.built.distribution, draw_times(window.built.parts)

  @jax.jit
  def draws(state, frozen, batch, root):
    key = jax.random.fold_in(root, state.step)
    keys = keys_lib.per_example(key, batch["lane"])
    ctx = Context(state.step, key, keys, batch, state.params["student"], frozen["teacher"], window.batch_size)
    s, _ = distribution.sample(state.dist, ctx)
    found = {"x_t": s.x_t, "t": s.t, "k": s.k, "label": s.cond["label"], "x0": s.x0}
    if method == "dmd2":
      found |= {"dm_t": times(keys, "dm_t", DM_RANGE), "dm_noise": draw_noise(keys, "dm_eps", s.x_t),
                "critic_t": times(keys, "critic_t"), "critic_noise": draw_noise(keys, "critic_eps", s.x_t)}
    return found

  return window.look(steps, draws)


def loss_difference(window: Window, method: str, ours: list[tuple]) -> float:
  """The largest relative difference of PyTorch's losses to `ours` (`seen`), on the same draws."""
  import torch

  from launch.bench import torch_twin
  step, worst = twin(window, method), 0.0
  for batch, found, metrics in ours:
    found = {name: np.array(v) for name, v in found.items()}  # PyTorch warns of what cannot be written to
    states = {name: torch_twin.images(v) if v.ndim == 4 else torch.from_numpy(v) for name, v in found.items()}
    states["label"], k = states["label"].long(), states.pop("k").long()
    if method in ("pd", "lcm"):
      states |= step.times(k)
    for player, theirs in step(batch, states).items():
      mean = metrics[f"{player}/loss"]
      mean = float(mean.total / mean.count)
      worst = max(worst, abs(theirs - mean) / abs(mean))
  return worst


def _compare(name: str, method: str, config: ConfigDict, dataset: Dataset, network, steps: int,
             size: Size) -> list[dict]:
  import torch
  torch.set_num_threads(cores())
  window = Window(config, dataset, network, steps)
  apart(window)
  window.warm_up()
  difference = loss_difference(window, method, seen(window, method, 2 if size.smoke else 6))
  rows = [row(f"{name}: loss, ours and PyTorch's on the same draws", "relative", [difference], LOSS_TOLERANCE,
              digits_=7)]
  programs = {"ours": window, "eager": _program(window, twin(window, method))}
  try:
    programs["compiled"] = _program(window, twin(window, method, _compiled_denoiser()))
    programs["compiled"]()
  except Exception as error:  # whatever its compiler raises where there is no C++ compiler
    leave_out(f"{name}: torch.compile, which failed: {str(error).splitlines()[0]}")
    programs.pop("compiled", None)
  # One after the other: PyTorch's compiler does not like to be called from several threads.
  for program in programs.values():
    program()
  seconds = alternate(programs, size.repeats, warm_ups=[lambda: 0.0])
  theirs = [kind for kind in ("eager", "compiled") if kind in seconds]
  best = min(theirs, key=lambda kind: sorted(seconds[kind])[len(seconds[kind]) // 2])
  about = {"method": method, "steps": steps, "batch_size": window.batch_size,
           "parameters": sum(v.size for v in jax.tree.leaves(window.start.params["student"]))}
  for kind in theirs:
    rows.append(ratio(f"{name}: our steps, times as fast as PyTorch's ({kind})", seconds, kind, "ours",
                      TARGET if kind == best else None, "at least", **about))
  return rows + [rate(f"{name}: steps of {kind}", "steps/s", steps, seconds[kind], **about) for kind in seconds]


@functools.cache
def _compiled_denoiser():
  """The network by `torch.compile`, which is where the time goes; the same for all methods, since it takes long."""
  import torch

  from launch.bench import torch_twin
  return torch.compile(torch_twin.denoise, dynamic=False)


def _program(window: Window, step):
  def run() -> float:
    began = time.perf_counter()
    for number in range(window.steps):
      step(window.batches[number])
    return time.perf_counter() - began
  return run


# Where the time goes ------------------------------------------------------------------------

FORWARD, BY_INPUT, BY_WEIGHT = "convolutions forward", "convolutions' input gradients", "convolutions' weight gradients"
PRODUCTS, REST = "matrix products", "norms, activations, copies, optimizer"


def profile(config: ConfigDict, dataset: Dataset, name: str) -> list[dict]:
  """Shares of the time of XLA's operations in steps of ours, by kind; operations that overlap count in full."""
  window = Window(config, dataset, (), 2)
  batch, due = window.runner.place_batch(window.batches[0]), due_players(window.built.objective, 0)
  text = window.runner.step.lower(window.start, window.frozen, batch, window.root, due).compile().as_text()
  window.warm_up()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      window()
    (path,) = pathlib.Path(folder).rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
  spent, kinds = collections.Counter(), kinds_of(text)
  for op, seconds in durations(events).items():
    spent[kinds.get(op, REST)] += seconds
  return [row(f"{name}: {kind}, of the time of all operations", "share", [spent[kind] / sum(spent.values())])
          for kind in (BY_WEIGHT, BY_INPUT, FORWARD, PRODUCTS, REST)]


def kinds_of(text: str) -> dict[str, str]:
  """{operation: kind} of an optimised program for CPU, of what is no REST; a fusion is of the kind of what is in it.

  A convolution by whose result a kernel learns has a window as large as the map.
  """
  found, inside, computation = {}, {}, ""
  for line in text.splitlines():
    head = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
    operation = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)
    if head:
      computation = head[1]
    elif operation:
      op, body = operation.groups()
      window, called = re.search(r" convolution\(.*window={size=(\d+)x", body), re.search(r"calls=%?([\w.\-]+)", body)
      if window:
        by_input = BY_INPUT if "transpose(" in body else FORWARD
        found[op] = BY_WEIGHT if int(window[1]) > 3 else by_input
      elif " dot(" in body:
        found[op] = PRODUCTS
      elif called and called[1] in inside:  # a computation stands before those that call it
        found[op] = inside[called[1]]
      if op in found:
        inside[computation] = found[op]
  return found


def durations(events: list[dict]) -> dict[str, float]:
  """{operation: microseconds} of a trace: from an operation's start to its end, which another thread may tell."""
  began, ended = collections.defaultdict(list), collections.defaultdict(list)
  for event in events:
    if "hlo_op" in event.get("args", {}):
      began[event["args"]["hlo_op"]].append(event)
    elif event.get("name", "").startswith("end: "):
      ended[event["name"].removeprefix("end: ")].append(event["ts"])
  out = {}
  for op, starts in began.items():
    if len(ended[op]) == len(starts):
      out[op] = sum(ended[op]) - sum(event["ts"] for event in starts)
    else:
      out[op] = sum(event["dur"] for event in starts)
  return out
