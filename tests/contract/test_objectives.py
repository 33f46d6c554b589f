"""Every objective in the folder, on every kind of state and device layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddil_jax import keys as keys_lib
from ddil_jax import registry
from ddil_jax.diffusion import process, transforms
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import View
from ddil_jax.states.base import WITH_X0, Context
from ddil_jax.training.step import due_players, init_state, make_train_step
from tests import building, toys

# Small settings of each method; a new method in the folder is tested with its defaults.
OPTIONS = {"add": dict(num_steps=2), "agd": dict(hidden=8, num_scales=8, sampler_steps=4),
           "boot": dict(num_steps=2, num_scales=8),
           "lcm": dict(num_scales=16, guidance_range=(1.0, 4.0)), "cd": dict(num_scales=9, target_decay=0.9),
           "tract": dict(num_steps=2, block_size=4), "slam": dict(num_scales=16), "rf": dict(num_scales=8),
           "guided": dict(num_scales=8, sampler_steps=4), "ctm": dict(num_scales=9, max_teacher_steps=2),
           "ect": dict(num_scales=8, stage_steps=1), "meanflow": dict(num_scales=8), "regression": dict(label_steps=2),
           "scm": dict(num_scales=8), "scott": dict(num_scales=8, solver_steps=2),
           "tcm": dict(num_scales=16, transition=0.5),
           "dmd2": dict(gan_weight=0.1, period=1, critic_weight="snr_trunc", weight_cap=100.0),
           "sid": dict(num_steps=2, through="all", critic_weight="snr_trunc", weight_cap=100.0),
           "diff_instruct": dict(num_steps=2, critic_weight="snr_trunc", weight_cap=100.0),
           "f_distill": dict(num_steps=2, period=1, ratio_bins=4, critic_weight="snr_trunc", weight_cap=100.0),
           "ladd": dict(num_steps=2), "vsd": dict(num_steps=2, rank=1, weight_cap=100.0),
           "moment_matching": dict(num_steps=2), "ufogen": dict(num_scales=8, num_steps=2, snr_cap=100.0),
           "dmd": dict(num_steps=2, critic_weight="snr_trunc", weight_cap=100.0),
           "msd": dict(students=2, num_steps=2, critic_weight="snr_trunc", weight_cap=100.0),
           "adversarial": dict(num_scales=9, max_teacher_steps=2),
           "embedding_loss": dict(num_steps=2, period=1, critic_weight="snr_trunc", weight_cap=100.0),
           "gdd": dict(num_steps=2, frozen="W1"), "twinflow": dict(num_scales=8)}
NAMES = registry.names("objectives")
# A second setting of a method; its tests are slow.
SECOND = {"scm-difference": dict(num_scales=8, difference=0.1), "meanflow-difference": dict(num_scales=8, difference=0.1)}


def make(name, parts=None):
  parts = parts or toys.toy_parts(reflect=transforms.reflect(transforms.clip()))
  options = SECOND.get(name) or OPTIONS.get(name, {})
  return parts, registry.load("objectives", name.partition("-")[0]).make(parts, **options)


def teacher_for(name):
  return () if name == "denoising" else toys.toy_init(jax.random.key(7))


def largest_difference(a, b):
  return max(float(np.max(np.abs(np.asarray(x, float) - np.asarray(y, float))))
             for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


BASE = ("denoising", "pd", "cd", "lcm", "dmd2")
# Of the family, one with something of its own across the batch: the others go the same way as the base methods. Nearly
# all time is compiling, so that they run in `make test-all`, and so does pmap but with a target and with two players.
QUICK = {("f_distill", "mesh"), ("lcm", "pmap"), ("dmd2", "pmap"), *((name, "mesh") for name in BASE)}
MODES = [pytest.param(name, mode, marks=[] if (name, mode) in QUICK else [pytest.mark.slow])
         for name in (*NAMES, *SECOND) for mode in ("mesh", "pmap")]


@pytest.mark.parametrize("name, mode", MODES)
def test_single_equals_mesh_equals_pmap(name, mode):
  objective, distribution, start, single = on_one_device(name)
  assert largest_difference(single.params, start.params) > 1e-6  # something was learned
  other, _ = building.run(objective, distribution, teacher_for(name), mode, start=start)
  assert largest_difference(single, other) < 1e-6


@functools.lru_cache(maxsize=1)
def on_one_device(name):
  """An objective, its states, and where training begins and ends."""
  parts, objective = make(name)
  distribution = building.ddil(parts, objective)
  start, _ = building.run(objective, distribution, teacher_for(name), steps=0)
  start = jax.device_get(start)  # a step may give its argument's memory away
  single, _ = building.run(objective, distribution, teacher_for(name), start=start)
  return objective, distribution, start, single


PAIRED = ("dmd", "rf")  # which learn from pairs what they learn from no other states
STATES = [pytest.param(name, source, marks=[pytest.mark.slow] if source == "dagger" and name not in BASE
                       or source == "pairs" and name not in PAIRED or name in SECOND else [])
          for name in (*NAMES, *SECOND) for source in ("forward", "student", "teacher", "dagger", "pairs")]


@pytest.mark.parametrize("name, source", STATES)
def test_losses_on_every_source(name, source):
  """Per example, finite, no gradient into the states or the frozen teacher, some into its own parameters."""
  parts, objective = make(name)
  available = building.sources(parts, objective)
  if source not in available or objective.needs_x0 and source not in WITH_X0:
    pytest.skip("not defined on them, or has no teacher")
  teacher, batch = teacher_for(name), toys.toy_batch(4)
  key = jax.random.key(3)
  keys = keys_lib.per_example(key, batch["lane"])
  params = objective.init(key, teacher)
  ctx = Context(jnp.zeros((), jnp.int32), key, keys, batch, params["student"], teacher, 4)
  states = jax.jit(available[source].fresh)(ctx)
  # The critics differ from the teacher, else distribution matching has nothing to do.
  params = jax.tree.map(lambda v: v + 0.05 * jnp.cos(jnp.arange(v.size, dtype=v.dtype).reshape(v.shape)), params)
  for player in objective.players:
    value, grads = graded(name)(player.name, params, teacher, states, batch, keys)
    assert np.isfinite(value)
    assert float(optax.global_norm(grads)) > 0


@functools.lru_cache(maxsize=1)
def graded(name):
  """(player, params, teacher, states, batch, keys) -> its loss and gradient: rollout sources share a program."""
  _, objective = make(name)

  @functools.partial(jax.jit, static_argnums=0)
  def grade(player, params, teacher, states, batch, keys):
    view = View(params, {name: params["student"] for name in objective.targets}, teacher, jnp.zeros((), jnp.int32),
                key=jax.random.key(5))
    loss_of = next(p.loss for p in objective.players if p.name == player)

    def total(own, x_t, teacher):
      loss, metrics = loss_of(own, view._replace(teacher=teacher), states._replace(x_t=jax.lax.stop_gradient(x_t)),
                              batch, keys)
      assert loss.shape == (4,) and all(v.shape == (4,) for v in metrics.values())
      return loss.sum()

    return jax.value_and_grad(total)(params[player], states.x_t, teacher)

  return grade


@pytest.mark.parametrize("name", NAMES)
def test_teacher_is_an_argument(name):
  """Frozen parameters closed over would become constants of the program."""
  parts, objective = make(name)
  distribution = building.ddil(parts, objective)
  teacher = () if name == "denoising" else toys.toy_init(jax.random.key(7), width=4096)  # 128 KiB a layer
  optimizers, targets = {p.name: optax.sgd(0.1) for p in objective.players}, dict(objective.targets)
  step = make_train_step(objective, distribution, optimizers, targets, 4)
  batch = toys.toy_batch(4)
  state = init_state(objective, distribution, optimizers, targets, jax.random.key(0), teacher, batch)
  jaxpr = jax.make_jaxpr(step, static_argnums=4)(state, {"teacher": teacher}, batch, jax.random.key(1),
                                                 due_players(objective, 0))
  constants = sum(np.asarray(c).nbytes for c in jaxpr.consts)
  assert constants < 16 * 1024  # time grids and tables


PROCESSES = {"edm": process.edm(), "flow": process.flow(), "stable_diffusion": process.stable_diffusion()}
REFUSED = {"twinflow": "edm"}
DISTILLATION = [name for name in (*NAMES, *SECOND) if name != "denoising"]


def kinds(i, name):
  """The base methods on all processes; of the family each method on one, in turn, since each is a compilation."""
  defined = [kind for kind in PROCESSES if kind != REFUSED.get(name)]
  return defined if name in BASE else [defined[i % len(defined)]]


QUICK_PAIRS = {("pd", "flow"), ("cd", "edm"), ("lcm", "stable_diffusion"), ("dmd2", "edm")}  # as above
PAIRS = [pytest.param(name, kind, marks=[] if (name, kind) in QUICK_PAIRS else [pytest.mark.slow])
         for i, name in enumerate(DISTILLATION) for kind in kinds(i, name)]


@pytest.mark.parametrize("name, kind", PAIRS)
def test_other_processes(name, kind):
  """Two steps on the other processes are finite."""
  parts = toys.toy_parts(PROCESSES[kind], grid="karras" if kind == "edm" else "uniform")
  _, objective = make(name, parts)
  state, metrics = building.run(objective, building.ddil(parts, objective), teacher_for(name), steps=2, batch_size=4)
  assert float(metrics["skipped"].total) == 0
  assert all(np.isfinite(np.asarray(v)).all() for v in jax.tree.leaves(state.params))


@pytest.mark.parametrize("name, kind", REFUSED.items())
def test_processes_that_are_refused(name, kind):
  with pytest.raises(UsageError, match=f"{name}.*'{kind}'"):
    make(name, toys.toy_parts(PROCESSES[kind], grid="karras"))
