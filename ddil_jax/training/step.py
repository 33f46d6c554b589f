"""The training step: a pure function from TrainState to TrainState.

`make_train_step` is the way of the data, read from top to bottom: keys, states and each player's loss and gradient in
`learn`, on every device; then updates, averages and metrics in `train_step`, for all.
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


def _here(learn, due, *arguments):
  return learn(due, *arguments)


class Layout(NamedTuple):
  """What the step knows of devices; by default nothing.

  Attributes:
    axis_name: the axis or axes over which the examples are mapped to devices; None on one.
    passes: equal parts of a device's examples from which a gradient is accumulated.
    unroll: the parts, and the steps of a sampler through which gradients pass, in a row instead of in a `lax.scan`: in
      a loop, convolution gradients are 20 times slower on CPU.
    on_devices: runs the part of a step that reads examples, `learn(due, networks, dist, batch, step, root)`, on each
      device with its own examples and whole networks, and returns the gradients' mean over all.
  """
  axis_name: str | tuple[str, ...] | None = None
  passes: int = 1
  unroll: bool = False
  on_devices: Callable = _here

  def mean(self, tree):
    """Over the devices."""
    return jax.lax.pmean(tree, self.axis_name) if self.axis_name else tree

  def sum(self, tree):
    """Over the devices."""
    return jax.lax.psum(tree, self.axis_name) if self.axis_name else tree


class Networks(NamedTuple):
  """All parameters that a step reads: {player: ...}, {name: EMA of the student}, and the frozen teacher's."""
  params: dict[str, Params]
  ema: dict[str, Params]
  teacher: Params


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
  def learn(due, networks: Networks, dist, batch, step: Array, root: Array):
    actor = networks.params["student"] if rollout_params == "raw" else networks.ema[rollout_params]
    ctx = _context(step, root, batch, actor, networks.teacher, batch_size)
    states, dist = distribution.sample(dist, ctx)
    states = jax.lax.stop_gradient(states)

    mean = lambda values: layout.mean(values.mean(axis=0))  # noqa: E731
    others = lambda values: of_others(values, mean(values), batch_size // layout.passes)  # noqa: E731
    view = View(*networks, step, mean, others, ctx.key, layout.unroll)
    grads, losses = {}, {}
    for player in objective.players:
      if player.name in due:
        value, aux, grads[player.name] = _gradient(player, view, networks.params[player.name],
                                                   (states, batch, ctx.keys), layout)
        sums = _sums(player.name, distribution.sources, *aux, states.source)
        losses[player.name] = layout.mean(value), layout.sum(sums)
    return grads, losses, dist

  def train_step(state: TrainState, frozen, batch, root: Array, due: tuple[str, ...]):
    networks = Networks(state.params, state.ema, frozen["teacher"])
    grads, losses, dist = layout.on_devices(learn, due, networks, state.dist, batch, state.step, root)

    params, opt, ema, metrics = dict(state.params), dict(state.opt), dict(state.ema), {}
    all_finite = jnp.array(True)
    for player in objective.players:
      name = player.name
      if name not in due:
        continue
      own = (params[name], opt[name], ema if name == "student" else {})
      value, sums = losses[name]
      own, finite, norm = _update(player, optimizers[name], ema_decays, state.step, grads[name], value, own)
      params[name], opt[name], averages = own
      ema.update(averages)
      all_finite &= finite
      metrics.update(_metrics(name, distribution.sources, sums, norm, finite))

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


def _update(player: Player, optimizer, ema_decays, step: Array, grads: Params, value: Array, own):
  """One player's gradient step; a step that is not finite changes nothing."""
  params, opt, ema = own
  # Averaged before clipping inside the optimizer: the clip sees the gradient of the whole batch.
  grads = _of_trainable(player, grads)
  norm = optax.global_norm(grads)
  finite = jnp.isfinite(norm) & jnp.isfinite(value)
  updates, new_opt = optimizer.update(grads, opt, params)
  # Weight decay would move what has no gradient.
  new_params = optax.apply_updates(params, _of_trainable(player, updates))
  decays = {name: ema_decays[name](step // player.period) if callable(ema_decays[name]) else ema_decays[name]
            for name in ema}
  new_ema = {name: optax.incremental_update(new_params, old, 1 - decays[name]) for name, old in ema.items()}
  keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)  # noqa: E731
  return (keep(new_params, params), keep(new_opt, opt), keep(new_ema, ema)), finite, norm


def _of_trainable(player: Player, tree):
  """A tree like the player's parameters with zeros where they do not learn."""
  if player.trainable is None:
    return tree

  def keep(path, leaf):
    learns = player.trainable(jax.tree_util.keystr(path, simple=True, separator="/"))
    return leaf if learns else jnp.zeros_like(leaf)

  return jax.tree_util.tree_map_with_path(keep, tree)


def _gradient(player: Player, view: View, params: Params, inputs, layout: Layout):
  """(mean loss, (loss [B], {metric: [B]}), gradient) over a device's examples, accumulated over the layout's passes."""
  def mean_loss(p, inputs):
    loss, extra = player.loss(p, view, *inputs)
    return loss.mean(), (loss, extra)

  value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)
  if layout.passes == 1:
    (value, aux), grads = value_and_grad(params, inputs)
    return value, aux, grads

  def one(total, part):
    (value, aux), grads = value_and_grad(params, part)
    return jax.tree.map(jnp.add, total, (value, grads)), aux

  parts = jax.tree.map(lambda v: v.reshape((layout.passes, -1) + v.shape[1:]), inputs)
  nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
  total, aux = jax.lax.scan(one, nothing, parts, unroll=layout.unroll)
  value, grads = jax.tree.map(lambda v: v / layout.passes, total)
  return value, jax.tree.map(lambda v: v.reshape((-1,) + v.shape[2:]), aux), grads


def _sums(name, sources, loss, extra, source) -> dict[str, Mean]:
  """The loss (of all, and per source) and the extra terms, summed over a device's examples."""
  whole = jnp.full((), loss.shape[0], jnp.float32)
  out = {f"{name}/loss": Mean(loss.sum(), whole)}
  for which in sources:
    mask = source == SOURCES.index(which)
    out[f"{name}/loss@{which}"] = Mean(jnp.where(mask, loss, 0).sum(), mask.sum().astype(jnp.float32))
  return out | {f"{name}/{key}": Mean(v.sum(), whole) for key, v in extra.items()}


def _metrics(name, sources, sums: dict[str, Mean], norm, finite) -> dict[str, Mean]:
  """The sums, the gradient norm (all, and per source), and skipped updates.

  A gradient belongs to a source if the whole batch came from it, as at every step of a mixture that is
  drawn `per_step`; the gradient of a mixed batch (`per_example`) counts for none.
  """
  # A step that was skipped must not turn the averages of the others into NaN.
  out = {key: Mean(jnp.where(finite, m.total, 0), jnp.where(finite, m.count, 0)) for key, m in sums.items()}

  def norm_where(counted):
    return Mean(jnp.where(counted, norm, 0), counted.astype(jnp.float32))

  everything = out[f"{name}/loss"].count
  for which in sources:
    out[f"{name}/grad_norm@{which}"] = norm_where(finite & (out[f"{name}/loss@{which}"].count == everything))
  out[f"{name}/grad_norm"] = norm_where(finite)
  return out | {f"{name}/skipped": Mean(1 - finite.astype(jnp.float32), jnp.ones(()))}
