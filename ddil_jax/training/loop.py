"""The host's loop around the training step: data in, metrics out, checkpoints, stopping and resuming."""

import collections
import contextlib
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from ddil_jax.errors import RunError
from ddil_jax.training.compiling import Profile
from ddil_jax.training.parallel import Runner
from ddil_jax.training.step import Mean, TrainState
from ddil_jax.training.watchdog import watch


class Settings(NamedTuple):
  """How long, and how often; in steps. A period of 0 means only at the end, and never for `diagnose_every`.

  Without a step for `watchdog_seconds` the process ends, see `watchdog.py`; 0 is never. `profile_steps`: first
  and last step of a trace, () for none.
  """
  steps: int
  log_every: int
  eval_every: int
  checkpoint_every: int
  max_bad_steps: int
  diagnose_every: int
  watchdog_seconds: float = 0.0
  profile_steps: tuple[int, ...] = ()


class Hooks(NamedTuple):
  """What the loop calls.

  Attributes:
    log: (step, {name: value}).
    save: (step, state in the plain layout, its metrics).
    evaluate: (step, state in the plain layout) -> its metrics.
    dump: (step, state) -> where the state of a failed run was written.
    diagnose: (step, state in the plain layout): measures and logs what a step does not.
    started: after the first step of this sitting, which was compiled for it.
    profile: where a trace is written.
  """
  log: Callable[[int, dict[str, float]], None]
  save: Callable[[int, TrainState, dict[str, float]], None]
  evaluate: Callable[[int, TrainState], dict[str, float]]
  dump: Callable[[int, TrainState], str]
  diagnose: Callable[[int, TrainState], None]
  started: Callable[[], None] = lambda: None
  profile: pathlib.Path = pathlib.Path()


class Stopped(Exception):
  """Asked to stop by a signal; the state is saved."""


def run_loop(runner: Runner, due: Callable[[int], tuple[str, ...]], state, frozen, batches, root: jax.Array,
             settings: Settings, hooks: Hooks):
  """Trains from state.step to settings.steps and returns the last state, on its devices.

  Args:
    due: step -> names of the players that learn at it.
    state: placed by the runner.
    batches: random access by step.

  Raises:
    RunError: losses that are not finite for `max_bad_steps` steps in a row.
    Stopped: SIGINT or SIGTERM came; the step was finished and saved.
  """
  pending: list[dict[str, Mean]] = []
  bad_check = min(settings.log_every, settings.max_bad_steps)
  profile = Profile(settings.profile_steps, hooks.profile)
  with _stop_requests() as stop, watch(settings.watchdog_seconds) as dog, contextlib.closing(profile):
    first = int(runner.fetch(state).step)
    for step in range(first, settings.steps):
      done = step + 1
      profile.before(done)
      state, metrics = runner.step(state, frozen, runner.place_batch(batches[step]), root, due(step))
      pending.append(metrics)
      profile.after(done, metrics)
      if step == first:
        jax.block_until_ready(metrics)
        hooks.started()
      dog.step_done(done)
      last = done == settings.steps
      if last or done % bad_check == 0:
        _check_finite(runner, state, done, settings.max_bad_steps, hooks)
      if last or done % settings.log_every == 0:
        hooks.log(done, summarise(pending))
        pending = []
      if settings.diagnose_every and done % settings.diagnose_every == 0:
        with dog.paused():
          hooks.diagnose(done, runner.fetch(state))
      measured = {}
      if settings.eval_every and done % settings.eval_every == 0 and not last:
        with dog.paused():
          measured = hooks.evaluate(done, runner.fetch(state))
      save_now = settings.checkpoint_every and done % settings.checkpoint_every == 0
      # What was measured is saved: it may be the best.
      saved = last or save_now or bool(measured)
      if saved:
        hooks.save(done, runner.fetch(state), measured)
      if stop(done):  # also where it came while the last step was saved: a sweep would go on, or the next stage
        if not saved:
          hooks.save(done, runner.fetch(state), measured)
        raise Stopped(f"stopped at step {done} of {settings.steps}; the same command continues from there")
  return state


def summarise(window: list[dict[str, Mean]]) -> dict[str, float]:
  """What a window of steps is logged as: means, and how much losses and gradient norms fluctuate.

  `x` is the mean over everything that was counted. For losses and gradient norms `x_std` is the standard
  deviation (n - 1) of the steps' own means, `x_std@source` that of the steps of a source. It costs the
  step nothing. A metric without any count is left out, a deviation with fewer than two steps too.
  """
  counted = collections.defaultdict(list)
  for metrics in jax.device_get(window):
    for name, mean in metrics.items():
      if mean.count > 0:
        counted[name].append((mean.total, mean.count))
  out = {}
  for name, steps in counted.items():
    total, count = np.array(steps, np.float64).T
    out[name] = total.sum() / count.sum()
    quantity, at, source = name.partition("@")
    if quantity.endswith(("/loss", "/grad_norm")) and len(steps) > 1:
      out[f"{quantity}_std{at}{source}"] = np.std(total / count, ddof=1)
  return dict(sorted(out.items()))


def _check_finite(runner, state, step, limit, hooks):
  plain = runner.fetch(state)
  bad = int(plain.bad_steps)
  if bad >= limit:
    where = hooks.dump(step, plain)
    raise RunError(f"loss or gradient not finite for {bad} steps in a row at step {step}; the state is in {where}."
                   " Lower config.optimizer.learning_rate, cap the loss weight, or set"
                   " config.optimizer.clip, in a new work directory")


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[int], bool]]:
  """Whether to stop after a step, since SIGINT or SIGTERM came: it is finished and saved. A second one ends at once.

  Of several processes JAX catches SIGTERM: whichever it reaches, all stop after the same step.
  """
  if jax.process_count() > 1:
    with _passing_on_interrupts():
      yield multihost_utils.reached_preemption_sync_point
    return
  event = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield lambda step: False
    return

  def request(number, frame):
    del number, frame
    if event.is_set():
      raise KeyboardInterrupt
    event.set()

  old = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield lambda step: event.is_set()
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def _passing_on_interrupts():
  old = signal.signal(signal.SIGINT, lambda number, frame: signal.raise_signal(signal.SIGTERM))
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, old)


