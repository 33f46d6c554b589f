"""State mixtures and training steps over toy networks, for tests."""

import jax
import jax.numpy as jnp
import optax

from ddil_jax import build
from ddil_jax.data import pipeline
from ddil_jax.diffusion import solvers
from ddil_jax.objectives.base import bind, completed
from ddil_jax.states.forward import forward
from ddil_jax.states.mixture import mixture
from ddil_jax.states.pairs import pairs
from ddil_jax.states.replay import on_policy, replay
from ddil_jax.states.rollouts import rollout_source
from ddil_jax.training.parallel import Options, make_runner
from ddil_jax.training.step import due_players, init_state, make_train_step
from tests import toys


def sources(parts, objective, teacher_steps=16):
  """name -> Source, all that exist for an objective."""
  p, draw, condition = parts.process, objective.draw, objective.condition
  out = {"forward": forward(p, draw, condition, objective.prior_first)}
  whole = lambda ctx: completed(objective, ctx.student, ctx.teacher)  # noqa: E731
  student = lambda ctx: objective.solver(p, bind(objective.student, whole(ctx)))  # noqa: E731
  out["student"] = rollout_source("student", p, student, objective.sampler_grid, objective.grid, draw, condition)
  if objective.teacher is not None:
    teacher = lambda ctx: solvers.ddim()(p, objective.teacher(ctx.teacher))  # noqa: E731
    both = lambda ctx: solvers.mixed(student(ctx), teacher(ctx), 0.5, ctx.key)  # noqa: E731
    out["teacher"] = rollout_source("teacher", p, teacher, parts.make_grid(teacher_steps), objective.grid, draw,
                                    condition)
    out["dagger"] = rollout_source("dagger", p, both, objective.sampler_grid, objective.grid, draw, condition)
    out["pairs"] = pairs(p, teacher, parts.make_grid(teacher_steps), draw, condition, objective.prior_first)
  return out


def ddil(parts, objective, priors=(0.4, 0.3, 0.3), selection="per_step", slots=16, refresh_every=2):
  """Forward, replayed student and fresh teacher states; forward alone where the loss needs x0."""
  available = sources(parts, objective)
  plain = on_policy(available["forward"])
  if objective.needs_x0:
    return plain
  parts_ = (plain, replay(available["student"], slots, refresh_every), on_policy(available["teacher"]))
  return mixture(parts_, lambda step: jnp.asarray(priors), selection)


def run(objective, distribution, teacher, mode="single", steps=3, batch_size=8, optimizer=None, seed=1, start=None,
        first=0, decays=None, options=Options()):
  """Trains a few steps and returns the plain state and the last metrics."""
  optimizers = {p.name: optimizer or optax.sgd(1e-2) for p in objective.players}
  decays = (decays or {"0.9": 0.9}) | dict(objective.targets)
  runner = make_runner(
      mode, lambda layout: make_train_step(objective, distribution, optimizers, decays, batch_size, layout=layout),
      batch_size, options=options)
  state = start or init_state(objective, distribution, optimizers, decays, jax.random.key(0), teacher,
                              toys.toy_batch(batch_size))
  state, frozen, metrics = runner.place(state), runner.place_frozen({"teacher": teacher}), None
  for i in range(first, first + steps):
    batch = runner.place_batch(toys.toy_batch(batch_size, i))
    state, metrics = runner.step(state, frozen, batch, jax.random.key(seed), due_players(objective, i))
  return runner.fetch(state), metrics


def trace_step(config):
  """Traces the first step of a config: it gives back shapes and dtypes that it was given, and every player's loss."""
  built = build.build(config)
  batch, decays = pipeline.batches(built.dataset, config.train.batch_size, 0)[0], built.ema_decays

  def two_states(key, batch):
    teacher = built.init_teacher(key) if built.init_teacher else ()
    state = init_state(built.objective, built.distribution, built.optimizers, decays, key, teacher, batch)
    step = make_train_step(built.objective, built.distribution, built.optimizers, decays, config.train.batch_size)
    return state, step(state, {"teacher": teacher}, batch, key, due_players(built.objective, 0))

  before, (after, metrics) = jax.eval_shape(two_states, jax.random.key(0), batch)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), before) == jax.tree.map(lambda a: (a.shape, a.dtype), after)
  assert {f"{player.name}/loss" for player in built.objective.players} <= set(metrics)
