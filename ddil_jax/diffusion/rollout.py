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
            stop: Array | None = None, path: bool = False) -> Array:
  """Follows a policy from pure noise along a decreasing grid.

  Args:
    policy: see `solvers`.
    x_T: [B,H,W,C] state at grid[0].
    grid: [N+1] times.
    keys: [B]; step i draws its noise from fold_in(keys, i).
    stop: int32 [B], the state at index stop[b] is returned for example b, with O(1) memory.
    path: return the whole path instead.

  Returns:
    [B,H,W,C], the state at grid[N] or at grid[stop]; with `path`, [N+1,B,H,W,C].
  """
  grid = jnp.asarray(grid, x_T.dtype)

  def body(state, inputs):
    x, carry = state
    i, t, s = inputs
    noise = keys_lib.normal_like(keys_lib.numbered(keys, i), x)
    x_s, carry = policy.step(carry, x, jnp.full(x.shape[:1], t), jnp.full(x.shape[:1], s), cond, noise)
    if stop is not None:
      x_s = jnp.where((i < stop).reshape((-1,) + (1,) * (x.ndim - 1)), x_s, x)
    return (x_s, carry), (x_s if path else None)

  (x, _), visited = jax.lax.scan(body, (x_T, policy.init(x_T)), (jnp.arange(len(grid) - 1), grid[:-1], grid[1:]))
  return jnp.concatenate([x_T[None], visited]) if path else x
