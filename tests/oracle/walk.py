"""A policy along a grid with prescribed noise."""

import jax.numpy as jnp


def walk(policy, x, grid, cond, noise=None):
  """The states after each step, [N,B,H,W,C]; noise [N,B,H,W,C] or None for deterministic policies."""
  carry, states = policy.init(x), []
  at = lambda value: jnp.full(x.shape[:1], value, x.dtype)  # noqa: E731
  for i, (t, s) in enumerate(zip(grid[:-1], grid[1:])):
    x, carry = policy.step(carry, x, at(t), at(s), cond, jnp.zeros_like(x) if noise is None else noise[i])
    states.append(x)
  return jnp.stack(states)
