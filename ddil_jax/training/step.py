"""The training step: a pure function from TrainState to TrainState.

`make_train_step` is the way of the data, read from top to bottom: keys, states, then each
player's loss, gradient and update, the averages, the metrics.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ddil_jax import keys as keys_lib
from ddil_jax.objectives.base import Objective, Player, View, of_others
from ddil_jax.states.base import SOURCES, Context, StateDistribution, States
from ddil_jax.types import Array, Params


class Layout(NamedTuple):
  """What the step knows of devices; by default nothing.

  Attributes:
    axis_name: the mapped axis under pmap; None under jit, where arrays are global.
    gather: parameters that are split over devices -> the same, whole where a loss uses them, with a gradient that
      is split again; None where nothing is split.
    passes: equal parts of the batch from which a gradient is accumulated.
    shards: devices over which axis 0 of a global batch is split; each contributes to every part.
    unroll: the parts, and the steps of a sampler through which gradients pass, in a row instead of in a `lax.scan`: in
      a loop, convolution gradients are 20 times slower on CPU.
  """
  axis_name: str | None = None
  gather: Callable[[Params], Params] | None = None
  passes: int = 1
  shards: int = 1
  unroll: bool = False

  def whole(self, params: Params) -> Params:
    """Parameters as a loss uses them."""
    return self.gather(params) if self.gather else params

  def mean(self, tree):
    """Over the devices of a mapped axis."""
    return jax.lax.pmean(tree, self.axis_name) if self.axis_name else tree

  def sum(self, tree):
    """Over the devices of a mapped axis."""
    return jax.lax.psum(tree, self.axis_name) if self.axis_name else tree

  def parts(self, tree):
    """A tree of [B, ...] as `passes` parts [passes, B / passes, ...], of every device's examples an equal number."""
    def part(v):
      by_device = v.reshape((self.shards, self.passes, -1) + v.shape[1:])
      return by_device.swapaxes(0, 1).reshape((self.passes, -1) + v.shape[1:])
    return jax.tree.map(part, tree)

  def joined(self, tree):
    """The inverse of `parts`."""
    def join(v):
      by_pass = v.reshape((self.passes, self.shards, -1) + v.shape[2:])
      return by_pass.swapaxes(0, 1).reshape((-1,) + v.shape[2:])
    return jax.tree.map(join, tree)


class TrainState(NamedTuple):
  """Everything that training changes; a checkpoint holds all of it.

  Attributes:
    step: int32.
    params, opt: {player: ...}.
    ema: {name: params}, EMAs of the student: the objective's targets and those of the config.
    dist: the state distribution's state (replay buffers).
    bad_steps: int32, updates skipped in a row because a loss or gradient was not finite.
  """
  step: Array
  params: dict[str, Params]
  opt: dict[str, Any]
  ema: dict[str, Params]
  dist: Any
  bad_steps: Array


def due_players(objective: Objective, step: int) -> tuple[str, ...]:
  """Names of the players that are updated at a step."""
  return tuple(player.name for player in objective.players if step % player.period == 0)


class Mean(NamedTuple):
  """A metric as (sum, count), so that means over steps, devices and sources add up; count 0: none."""
  total: Array
  count: Array


def init_state(objective: Objective, distribution: StateDistribution, optimizers,
               ema_decays: Mapping[str, optax.ScalarOrSchedule], key: Array, teacher: Params, batch) -> TrainState:
  """The state before the first step. Every network starts as a copy of its own.

  Args:
    optimizers: {player: optax.GradientTransformation}.
    ema_decays: {name: decay}, the objective's targets included.
    batch: an example batch, for shapes.
  """
  params = objective.init(key, teacher)
  ema = {name: params["student"] for name in ema_decays}
  zero = jnp.zeros((), jnp.int32)
  ctx = _context(zero, key, batch, params["student"], teacher, batch["lane"].shape[0])
  opt = {player.name: optimizers[player.name].init(params[player.name]) for player in objective.players}
  state = TrainState(zero, params, opt, ema, distribution.init(ctx), zero)
  # Copies: with donation a buffer that two leaves share would be freed under the other.
  return jax.tree.map(jnp.array, state)


def _context(step, root, batch, student, teacher, batch_size) -> Context:
  key = jax.random.fold_in(root, step)
  return Context(step, key, keys_lib.per_example(key, batch["lane"]), batch, student, teacher, batch_size)


def make_train_step(objective: Objective, distribution: StateDistribution, optimizers,
                    ema_decays: Mapping[str, optax.ScalarOrSchedule], batch_size: int, rollout_params: str = "raw",
                    layout: Layout = Layout()):
  """Builds `(state, frozen, batch, root_key, due) -> (state, {name: Mean})`.

  Args:
    objective, distribution: what is learned, and on which states.
    optimizers: {player: optax.GradientTransformation}.
    ema_decays: {name: decay, or a schedule of it over the student's updates} of the student's EMAs.
    batch_size: examples over all devices.
    rollout_params: "raw", or the name of the EMA with which the student acts in rollouts.
    layout: of arrays over devices.

  `frozen` is {"teacher": params}: an argument, since what is closed over becomes constants of the
  compiled program. `due`, the names of the players that learn at this step (`due_players`), is
  static: one compiled program for each set. A `lax.cond` would do, but convolution gradients inside
  one run 25 times slower on CPU.
  """
  def train_step(state: TrainState, frozen, batch, root: Array, due: tuple[str, ...]):
    teacher = layout.whole(frozen["teacher"])
    actor = layout.whole(state.params["student"] if rollout_params == "raw" else state.ema[rollout_params])
    ctx = _context(state.step, root, batch, actor, teacher, batch_size)
    states, dist = distribution.sample(state.dist, ctx)
    states = jax.lax.stop_gradient(states)

    mean = lambda values: layout.mean(values.mean(axis=0))  # noqa: E731
    others = lambda values: of_others(values, mean(values), batch_size // layout.passes)  # noqa: E731
    view = View(*({name: layout.whole(tree) for name, tree in trees.items()} for trees in (state.params, state.ema)),
                teacher, state.step, mean, others, ctx.key, layout.unroll)
    params, opt, ema, metrics = dict(state.params), dict(state.opt), dict(state.ema), {}
    all_finite = jnp.array(True)
    for player in objective.players:
      name = player.name
      if name not in due:
        continue
      averages = ema if name == "student" else {}
      own = (params[name], opt[name], averages)
      own, finite, player_metrics = _update(player, optimizers[name], ema_decays, view, states, batch, ctx.keys,
                                            distribution.sources, layout, own)
      params[name], opt[name], averages = own
      ema.update(averages)
      all_finite &= finite
      metrics.update(player_metrics)

    bad_steps = jnp.where(all_finite, 0, state.bad_steps + 1).astype(jnp.int32)
    one = jnp.ones(())
    metrics["skipped"] = Mean((~all_finite).astype(jnp.float32), one)
    return TrainState(state.step + 1, params, opt, ema, dist, bad_steps), metrics

  return train_step


def make_diagnose(objective: Objective, distribution: StateDistribution, batch_size: int, rollout_params: str = "raw"):
  """Builds `(state, frozen, batch, key) -> {"diagnose/<name>": Mean}`, which changes nothing.

  What the objective measures of itself (`Objective.diagnose`), on states drawn as the step would draw them.
  """
  def diagnose(state: TrainState, frozen, batch, key: Array):
    actor = state.params["student"] if rollout_params == "raw" else state.ema[rollout_params]
    ctx = _context(state.step, key, batch, actor, frozen["teacher"], batch_size)
    states, _ = distribution.sample(state.dist, ctx)
    view = View(state.params, state.ema, frozen["teacher"], state.step)
    found = objective.diagnose(view, jax.lax.stop_gradient(states), ctx)
    return {f"diagnose/{name}": Mean(v.sum(), jnp.full((), v.shape[0], jnp.float32)) for name, v in found.items()}

  return diagnose


def _update(player: Player, optimizer, ema_decays, view: View, states: States, batch, keys, sources,
            layout: Layout, own):
  """One player's gradient step; a step that is not finite changes nothing."""
  params, opt, ema = own

  def mean_loss(p, inputs):
    loss, extra = player.loss(layout.whole(p), view, *inputs)
    return loss.mean(), (loss, extra)

  value, (loss, extra), grads = _gradient(mean_loss, params, (states, batch, keys), layout)
  # Averaged before clipping inside the optimizer: the clip sees the gradient of the whole batch.
  grads, value = _of_trainable(player, layout.mean(grads)), layout.mean(value)
  norm = optax.global_norm(grads)
  finite = jnp.isfinite(norm) & jnp.isfinite(value)
  updates, new_opt = optimizer.update(grads, opt, params)
  # Weight decay would move what has no gradient.
  new_params = optax.apply_updates(params, _of_trainable(player, updates))
  decays = {name: ema_decays[name](view.step // player.period) if callable(ema_decays[name]) else ema_decays[name]
            for name in ema}
  new_ema = {name: optax.incremental_update(new_params, old, 1 - decays[name]) for name, old in ema.items()}
  keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)  # noqa: E731
  own = (keep(new_params, params), keep(new_opt, opt), keep(new_ema, ema))
  return own, finite, _metrics(player.name, sources, loss, extra, states.source, norm, finite, layout)


def _of_trainable(player: Player, tree):
  """A tree like the player's parameters with zeros where they do not learn."""
  if player.trainable is None:
    return tree

  def keep(path, leaf):
    learns = player.trainable(jax.tree_util.keystr(path, simple=True, separator="/"))
    return leaf if learns else jnp.zeros_like(leaf)

  return jax.tree_util.tree_map_with_path(keep, tree)


def _gradient(mean_loss, params: Params, inputs, layout: Layout):
  """`mean_loss(params, inputs) -> (value, aux [B])` and its gradient, accumulated over the layout's passes."""
  value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)
  if layout.passes == 1:
    (value, aux), grads = value_and_grad(params, inputs)
    return value, aux, grads

  def one(total, part):
    (value, aux), grads = value_and_grad(params, part)
    return jax.tree.map(jnp.add, total, (value, grads)), aux

  nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
  total, aux = jax.lax.scan(one, nothing, layout.parts(inputs), unroll=layout.unroll)
  value, grads = jax.tree.map(lambda v: v / layout.passes, total)
  return value, layout.joined(aux), grads


def _metrics(name, sources, loss, extra, source, norm, finite, layout) -> dict[str, Mean]:
  """Means of the loss and the gradient norm (all, and per source) and of the extra terms; skipped updates.

  A gradient belongs to a source if the whole batch came from it, as at every step of a mixture that is
  drawn `per_step`; the gradient of a mixed batch (`per_example`) counts for none.
  """
  whole = jnp.full((), loss.shape[0], jnp.float32)
  out = {f"{name}/loss": Mean(loss.sum(), whole)}
  for which in sources:
    mask = source == SOURCES.index(which)
    out[f"{name}/loss@{which}"] = Mean(jnp.where(mask, loss, 0).sum(), mask.sum().astype(jnp.float32))
  out |= {f"{name}/{key}": Mean(v.sum(), whole) for key, v in extra.items()}
  # A step that was skipped must not turn the averages of the others into NaN.
  out = {key: Mean(jnp.where(finite, m.total, 0), jnp.where(finite, m.count, 0)) for key, m in layout.sum(out).items()}

  def norm_where(counted):
    return Mean(jnp.where(counted, norm, 0), counted.astype(jnp.float32))

  everything = out[f"{name}/loss"].count
  for which in sources:
    out[f"{name}/grad_norm@{which}"] = norm_where(finite & (out[f"{name}/loss@{which}"].count == everything))
  out[f"{name}/grad_norm"] = norm_where(finite)
  return out | {f"{name}/skipped": Mean(1 - finite.astype(jnp.float32), jnp.ones(()))}
