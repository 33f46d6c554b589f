"""A ring buffer of rollout states on device, one ring per batch lane.

Layout [B, slots, ...]: axis 0 is sharded like the batch, every push and draw stays on its device,
and what lane b draws does not depend on the number of devices. A fresh rollout every
`refresh_every` steps pushes all states that it visited. Source: DDIL's replay buffer
(arXiv 2410.11971); the layout is ours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.errors import UsageError
from ddil_jax.states.base import Context, Source, StateDistribution, States
from ddil_jax.types import Array


class Replay(NamedTuple):
  """Buffer state: states with leading axes [B, slots] (x0 only of teacher pairs), the
  number ever pushed to each lane, and the step of the last refresh."""
  states: States
  pushed: Array
  refreshed: Array


def push(buffer: Replay, new: States) -> Replay:
  """Writes new states [B,K,...] over the oldest slots."""
  slots, count = buffer.states.t.shape[1], new.t.shape[1]
  where = (buffer.pushed + jnp.arange(count)) % slots
  states = jax.tree.map(lambda old, v: old.at[:, where].set(v), buffer.states, new)
  return buffer._replace(states=states, pushed=buffer.pushed + count)


def draw(buffer: Replay, keys: Array) -> States:
  """One stored state per lane, uniform over the filled slots."""
  filled = jnp.minimum(buffer.pushed, buffer.states.t.shape[1])
  slot = keys_lib.randint(keys_lib.named(keys, "replay"), 0, filled)
  return jax.tree.map(lambda v: jax.vmap(lambda row, i: row[i])(v, slot), buffer.states)


def replay(source: Source, slots: int, refresh_every: int) -> StateDistribution:
  """Keeps the states of a rollout source and draws from them.

  Args:
    slots: states kept per batch lane; the capacity is slots * batch size.
    refresh_every: steps between fresh rollouts; 1 with slots = states per rollout is on-policy.

  Raises:
    UsageError: the source has no rollout, or one rollout does not fit.
  """
  if source.path is None:
    raise UsageError(f"replay: the source '{source.name}' makes no rollouts")
  if refresh_every < 1 or slots < 1:
    raise UsageError(f"replay: refresh_every {refresh_every} and capacity must be at least 1 step and 1 batch")

  def init(ctx: Context) -> Replay:
    shapes = jax.eval_shape(source.path, ctx)
    if shapes.t.shape[1] > slots:
      raise UsageError(f"replay: one rollout visits {shapes.t.shape[1]} states per example, capacity is {slots};"
                       f" set the capacity to at least {shapes.t.shape[1]} batches")
    empty = jax.tree.map(lambda v: jnp.zeros((v.shape[0], slots) + v.shape[2:], v.dtype), shapes)
    return Replay(empty, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

  def sample(buffer: Replay, ctx: Context):
    # Counted from the last refresh: a mixture may not draw from this buffer at every step.
    due = (buffer.pushed == 0) | (ctx.step - buffer.refreshed >= refresh_every)

    def refresh(buffer):
      return push(buffer, jax.lax.stop_gradient(source.path(ctx)))._replace(refreshed=ctx.step)

    buffer = jax.lax.cond(due, refresh, lambda b: b, buffer)
    drawn = draw(buffer, ctx.keys)
    return (drawn._replace(x0=ctx.batch["image"]) if drawn.x0 is None else drawn), buffer

  return StateDistribution((source.name,), init, sample)


def on_policy(source: Source) -> StateDistribution:
  """A source without memory: a fresh state per example at every step."""
  return StateDistribution((source.name,), lambda ctx: (), lambda state, ctx: (source.fresh(ctx), state))
