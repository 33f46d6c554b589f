"""A run that hangs says where, and ends."""

import subprocess
import sys
import time

from ddil_jax.training.watchdog import watch
from tests.running import ROOT

HANGS = """
import jax, threading
from tests.conftest import *
import optax
from tests import building, toys
from ddil_jax.training.loop import Hooks, Settings, run_loop
from ddil_jax.objectives import denoising
from ddil_jax.training.parallel import make_runner
from ddil_jax.training.step import due_players, init_state, make_train_step
import functools

class Stuck:
  def __getitem__(self, step):
    if step == 3:
      threading.Event().wait()  # a file system that does not answer
    return toys.toy_batch(8, step)

objective = denoising.make(toys.toy_parts())
states = building.on_policy(building.sources(toys.toy_parts(), objective)["forward"])
parts = (objective, states, {"student": optax.sgd(0.1)}, {})
runner = make_runner("single", lambda layout: make_train_step(*parts, 8, layout=layout), 8)
frozen = runner.place_frozen({"teacher": ()})
state = runner.create(functools.partial(init_state, *parts), jax.random.key(0), (), toys.toy_batch())
batch = runner.place_batch(toys.toy_batch())
state, _ = runner.step(state, frozen, batch, jax.random.key(1), ("student",))  # compiling is no step
hooks = Hooks(*[lambda *arguments: {}] * 5)
settings = Settings(steps=9, log_every=1, eval_every=0, checkpoint_every=0, max_bad_steps=9, diagnose_every=0,
                    watchdog_seconds=1.0)
run_loop(runner, functools.partial(due_players, objective), state, frozen, Stuck(), jax.random.key(1), settings, hooks)
"""


def test_a_stuck_run_ends_with_its_stacks():
  done = subprocess.run([sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=100)
  assert done.returncode == 1
  assert "watchdog: no step for 1 s since step 3" in done.stderr
  assert "run_loop" in done.stderr and "__getitem__" in done.stderr and "look" in done.stderr


def test_steps_and_pauses_keep_it_quiet():
  with watch(0.2) as dog:
    for step in range(4):
      time.sleep(0.1)
      dog.step_done(step)
    with dog.paused():
      time.sleep(0.5)
    assert dog.idle() < 0.2
  with watch(0) as dog:
    time.sleep(0.01)
  assert dog.idle() > 0
