"""The rollout: a `lax.scan` of a policy over a time grid."""

import jax
import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion.process import Process
from ddil_jax.diffusion.solvers import Policy
from ddil_jax.types import Array, Cond


def prior(process: Process, keys: Array, like: Array) -> Array:
  """x_T [B, ...] ~ N(0, prior_std^2), row b from keys[b]."""
  return process.prior_std * keys_lib.normal_like(keys_lib.named(keys, "prior"), like)


def rollout(policy: Policy, x_T: Array, grid: Array, cond: Cond, keys: Array,
            stop: Array | None = None, visit: Array | None = None, path: bool = False) -> Array:
  """Follows a policy from pure noise along a decreasing grid.

  Args:
    policy: see `solvers`.
    x_T: [B,H,W,C] state at grid[0].
    grid: [N+1] times.
    keys: [B]; step i draws its noise from fold_in(keys, i).
    stop: int32 [B], the state at index stop[b] is returned for example b, with O(1) memory.
    visit: times [N,B], grid[i] >= visit[i] > grid[i+1]: returns, for each i, where a step of the
      policy from grid[i] to visit[i] leads. The walk itself stays on the grid.
    path: return the states at all times of the grid.

  Returns:
    [B,H,W,C], the state at grid[N] or at grid[stop]; with `visit`, [N,B,H,W,C]; with `path`,
    [N+1,B,H,W,C].
  """
  grid = jnp.asarray(grid, x_T.dtype)
  steps = (jnp.arange(len(grid) - 1), grid[:-1], grid[1:], visit)

  def body(state, inputs):
    x, carry = state
    i, t, s, aside = inputs
    noise = keys_lib.normal_like(keys_lib.numbered(keys, i), x)
    now, then = jnp.full(x.shape[:1], t), jnp.full(x.shape[:1], s)
    to = lambda s: policy.step(carry, x, now, s, cond, noise)  # noqa: E731
    if visit is None:
      x_s, next_carry = to(then)
      out = x_s if path else None
    else:
      # Mapped over where it leads, so that a network that is not told is called once: written twice, a CPU computes
      # it twice.
      (x_s, moved), carries = jax.vmap(to)(jnp.stack([then, aside]))
      next_carry = jax.tree.map(lambda v: v[0], carries)
      out = jnp.where((aside == t).reshape((-1,) + (1,) * (x.ndim - 1)), x, moved)
    if stop is not None:
      x_s = jnp.where((i < stop).reshape((-1,) + (1,) * (x.ndim - 1)), x_s, x)
    return (x_s, next_carry), out

  (x, _), out = jax.lax.scan(body, (x_T, policy.init(x_T)), steps)
  if visit is not None:
    return out
  return jnp.concatenate([x_T[None], out]) if path else x


def finish(policy: Policy, x_t: Array, t: Array, grid: Array, cond: Cond, keys: Array,
           unroll: bool = False) -> Array:
  """Follows a policy from states within a grid to its end; gradients go through all steps.

  The first step of an example leads from its own time to the next time of the grid below it; the times of
  the grid above it are passed over.

  Args:
    policy: see `solvers`; one without memory, since the steps that are passed over would fill it.
    x_t: [B,H,W,C] at t [B], grid[0] >= t > grid[N].
    grid: [N+1] decreasing times.
    keys: [B]; step i draws its noise from fold_in(keys, i).
    unroll: the steps in a row instead of in a `lax.scan`.
  """
  grid = jnp.asarray(grid, x_t.dtype)
  count = len(grid) - 1

  def body(x, inputs):
    i, then = inputs
    now, then = jnp.minimum(t, grid[i]), jnp.minimum(t, then)
    moved, _ = policy.step(policy.init(x), x, now, then, cond, keys_lib.normal_like(keys_lib.numbered(keys, i), x))
    return jnp.where((then < now).reshape((-1,) + (1,) * (x.ndim - 1)), moved, x), None

  if not unroll:
    return jax.lax.scan(body, x_t, (jnp.arange(count), grid[1:]))[0]
  x = x_t  # `scan(unroll=True)` leaves a loop where there is one step
  for i in range(count):
    x, _ = body(x, (i, grid[i + 1]))
  return x
