"""Training with all that a state can hold, on any layout, for tests of where arrays are."""

import functools

import jax
import numpy as np
import optax

from ddil_jax.data import pipeline
from ddil_jax.data.dataset import Dataset
from ddil_jax.objectives import dmd2
from ddil_jax.states.replay import replay
from ddil_jax.training.compiling import tally
from ddil_jax.training.parallel import Options, make_runner
from ddil_jax.training.step import due_players, init_state, make_train_step
from tests import building, toys

BATCH = 16
DECAYS = {"0.9": 0.9}
# Rules that hit, and a default for the rest; the toys are small.
FSDP = Options(fsdp=2, min_size=0, rules=("label=whole", "W2=0"))


@functools.cache
def method():
  """Two players on states of the student from a replay buffer: little to compile."""
  parts = toys.toy_parts()
  objective = dmd2.make(parts, num_steps=2, period=1, critic_weight="snr_trunc", weight_cap=100.0)
  return objective, replay(building.sources(parts, objective)["student"], slots=4, refresh_every=2)


@functools.cache
def batches():
  """A stream of 48 examples: three batches are an epoch."""
  batch = toys.toy_batch(48)
  return pipeline.batches(Dataset("toys", batch["image"], batch["label"], toys.NUM_CLASSES, (-1.0, 1.0), "train"),
                          BATCH, seed=3, flip=True)


class Training:
  """A runner; its optimizers' state mirrors the parameters. `unroll`: instead of what the platform would choose."""

  def __init__(self, mode, options=Options(), devices=None, unroll=None):
    self.objective, distribution = method()
    optimizers = {p.name: optax.sgd(1e-2, momentum=0.9) for p in self.objective.players}
    parts = (self.objective, distribution, optimizers, DECAYS)

    def make_step(layout):
      return make_train_step(*parts, BATCH, layout=layout if unroll is None else layout._replace(unroll=unroll))

    self.runner = make_runner(mode, make_step, BATCH, devices, options)
    teacher = toys.toy_init(jax.random.key(7))
    self.start = (functools.partial(init_state, *parts), jax.random.key(0), teacher, batches()[0])
    self.frozen = self.runner.place_frozen({"teacher": teacher})

  def run(self, steps, state=None, first=0):
    """The state after `steps` more, in the plain layout; `state` is used up.

    Keeps the metrics of each step, and how many programs were compiled for it.
    """
    self.metrics, self.compiled = [], []
    state = self.runner.create(*self.start) if state is None else self.runner.place(state)
    for i in range(first, first + steps):
      batch = self.runner.place_batch(batches()[i])
      with tally() as compiled:
        state, metrics = self.runner.step(state, self.frozen, batch, jax.random.key(1), due_players(self.objective, i))
      self.compiled.append(compiled.programs)
      self.metrics.append({name: (float(m.total), float(m.count)) for name, m in metrics.items()})
    return self.runner.fetch(state)


@functools.cache
def training(mode, options=Options(), num_devices=None):
  """Kept, since compiling is nearly all that it costs."""
  return Training(mode, options, jax.devices()[:num_devices])


@functools.cache
def reference():
  """The states on the host and the metrics of steps 1 to 6 on one device."""
  one, states, metrics, state = training("single"), [], [], None
  for i in range(6):
    state = one.run(1, state, i)
    states.append(jax.tree.map(np.array, state))
    metrics += one.metrics
  return states, metrics


def assert_close(a, b):
  """Every array within 1e-6."""
  for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(np.asarray(x, float), np.asarray(y, float), rtol=0, atol=1e-6,
                               err_msg=jax.tree_util.keystr(path))
