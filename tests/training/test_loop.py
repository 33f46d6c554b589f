"""When the loop calls whom, and what a window of steps is logged as."""

import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddil_jax.objectives import pd
from ddil_jax.training.loop import Hooks, Settings, Stopped, run_loop, summarise
from ddil_jax.training.parallel import make_runner
from ddil_jax.training.step import Mean, due_players, init_state, make_train_step
from tests import building, toys


def mean(value, count=1.0):
  return Mean(jnp.float32(value * count), jnp.float32(count))


def test_means_and_deviations_over_the_steps():
  losses, norms = [1.0, 3.0, 2.0, 6.0], [0.5, 0.25, 1.0, 2.0]
  counts = [8.0, 8.0, 4.0, 8.0]  # of one source the batches differ in size
  window = [{"student/loss": mean(v), "student/loss@forward": mean(v, n), "student/grad_norm": mean(g),
             "student/dm": mean(v)} for v, g, n in zip(losses, norms, counts)]
  found = summarise(window)
  assert list(found) == sorted(found)
  expected = {"student/loss": np.mean(losses), "student/loss_std": np.std(losses, ddof=1),
              "student/loss@forward": np.average(losses, weights=counts),
              "student/loss_std@forward": np.std(losses, ddof=1), "student/grad_norm": np.mean(norms),
              "student/grad_norm_std": np.std(norms, ddof=1), "student/dm": np.mean(losses)}
  assert found == pytest.approx(expected, rel=1e-6)


def test_what_was_not_counted_is_absent():
  """A player that was not due, a source that was not drawn, an update that was skipped."""
  nothing = mean(0.0, 0.0)
  window = [{"critic/loss": mean(1.0), "critic/grad_norm@student": nothing},
            {"critic/loss": nothing, "critic/grad_norm@student": mean(4.0), "student/loss": mean(3.0)}]
  assert summarise(window) == {"critic/loss": 1.0, "critic/grad_norm@student": 4.0, "student/loss": 3.0}
  assert summarise([]) == {}


def looping():
  """run(state, batches, settings, hooks), and the state where it begins."""
  parts = toys.toy_parts()
  objective = pd.make(parts)
  states = building.on_policy(building.sources(parts, objective)["forward"])
  optimizers, teacher = {"student": optax.sgd(0.1)}, toys.toy_init(jax.random.key(7))
  runner = make_runner("single", lambda layout: make_train_step(objective, states, optimizers, {}, 8, layout=layout), 8)
  state = init_state(objective, states, optimizers, {}, jax.random.key(0), teacher, toys.toy_batch())
  run = lambda state, batches, settings, hooks: run_loop(  # noqa: E731
      runner, functools.partial(due_players, objective), state, runner.place_frozen({"teacher": teacher}), batches,
      jax.random.key(1), settings, hooks)
  return run, runner.place(state)


def test_when_hooks_are_called(tmp_path):
  run, state = looping()
  calls = []

  def called(name, step, state, *rest):
    assert int(state.step) == step
    calls.append((name, step))
    return {"fd": 1.0}

  hooks = Hooks(lambda step, metrics: calls.append(("log", step)),
                *(functools.partial(called, name) for name in ("save", "evaluate", "dump", "diagnose")),
                lambda: calls.append(("started", 1)), tmp_path / "profile")
  settings = Settings(steps=7, log_every=4, eval_every=5, checkpoint_every=6, max_bad_steps=3, diagnose_every=3,
                      profile_steps=(2, 3))
  last = run(state, [toys.toy_batch(8, i) for i in range(7)], settings, hooks)
  assert int(last.step) == 7
  assert calls == [("started", 1), ("diagnose", 3), ("log", 4), ("evaluate", 5), ("save", 5), ("diagnose", 6), ("save", 6),
                   ("log", 7), ("save", 7)]
  trace, = (tmp_path / "profile").rglob("*.xplane.pb")
  assert trace.stat().st_size > 1000
  run(last, [toys.toy_batch()] * 9, settings._replace(steps=9, diagnose_every=0), hooks)
  assert not any(name == "diagnose" for name, step in calls if step > 6)
  assert calls.count(("started", 1)) == 2  # of each sitting
  assert list((tmp_path / "profile").rglob("*.xplane.pb")) == [trace]  # its steps were over


@pytest.mark.parametrize("at, saved", [(2, [2]), (3, [3])])
def test_a_signal_is_never_lost(at, saved):
  """Not while the last step is saved either: after it come evaluations, other stages, other trials of a sweep."""
  run, state = looping()
  saves = []

  def log(step, metrics):
    if step == at < 3:
      os.kill(os.getpid(), signal.SIGTERM)

  def save(step, state, metrics):
    saves.append(step)
    if step == at == 3:
      os.kill(os.getpid(), signal.SIGTERM)

  settings = Settings(steps=3, log_every=1, eval_every=0, checkpoint_every=0, max_bad_steps=3, diagnose_every=0)
  with pytest.raises(Stopped, match=f"stopped at step {at} of 3; the same command continues"):
    run(state, [toys.toy_batch()] * 3, settings, Hooks(log, save, None, None, None))
  assert saves == saved
