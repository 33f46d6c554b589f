"""States that a policy visits when it samples from noise: student, teacher, or their DAgger mixture.

The sampler walks its own grid; the objective trains at its own times. A training time t between
two grid times is reached by one step of the policy from the last grid time before it. For a
re-noising (consistency) student that is its last x0 noised to t; for a DDIM student whose grid is
the training grid it is the visited state itself.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion.process import Process
from ddil_jax.diffusion.rollout import prior, rollout
from ddil_jax.states.base import SOURCES, Context, Source, States, cond_of


def rollout_source(name: str, process: Process, make_policy, grid: np.ndarray, train_grid: np.ndarray,
                   draw, condition) -> Source:
  """A source of visited states.

  Args:
    name: an entry of SOURCES.
    make_policy: Context -> Policy.
    grid: [K+1] the sampler's times.
    train_grid: [N+1] the objective's times, the last one (clean) excluded from training.
    draw, condition: as in `forward`.
  """
  segments = _segments(grid, train_grid)
  source_index = SOURCES.index(name)
  on_grid = bool(np.all(np.isclose(train_grid[:-1, None], grid[None, :]).any(axis=1)))

  def start(ctx: Context):
    keys = keys_lib.named(ctx.keys, name)
    cond = condition(keys, cond_of(ctx.batch))
    return keys, cond, prior(process, keys, ctx.batch["image"])

  def fresh(ctx: Context) -> States:
    keys, cond, x_T = start(ctx)
    k, t = draw(keys)
    segment = jnp.asarray(np.searchsorted(-grid[:-1], -train_grid[:-1] * (1 - 1e-6), side="right") - 1)
    stop = jnp.maximum(segment, 0).astype(jnp.int32)[k]
    policy = make_policy(ctx)
    x = rollout(policy, x_T, grid, cond, keys, stop=stop)
    if not on_grid:
      here = jnp.asarray(grid, x.dtype)[stop]
      noise = keys_lib.normal_like(keys_lib.named(keys, "visit"), x)
      moved, _ = policy.step(policy.init(x), x, here, t, cond, noise)
      x = jnp.where(jnp.isclose(here, t).reshape((-1,) + (1,) * (x.ndim - 1)), x, moved)
    return States(x, t, k, cond, jnp.full(k.shape, source_index, jnp.int32), ctx.batch["image"])

  def path(ctx: Context) -> States:
    keys, cond, x_T = start(ctx)
    first, count = (jnp.asarray(v, jnp.int32) for v in segments)
    pick = jax.vmap(lambda j: keys_lib.randint(keys_lib.numbered(keys_lib.named(keys, "visit"), j), 0, count[j]))
    k = first.reshape(-1, 1) + pick(jnp.arange(len(first)))  # [K,B]
    t = jnp.asarray(train_grid, x_T.dtype)[k]
    # Where no training time lies between two grid times the walk's own state is taken and dropped.
    here = jnp.asarray(grid[:-1], x_T.dtype).reshape(-1, 1)
    aside = jnp.where((count > 0).reshape(-1, 1) & ~jnp.isclose(here, t), t, here)
    x = rollout(make_policy(ctx), x_T, grid, cond, keys, visit=aside)
    kept = np.flatnonzero(segments[1] > 0)
    by_example = lambda v: jnp.moveaxis(v[kept], 0, 1)  # noqa: E731
    repeat = lambda v: jnp.broadcast_to(v[:, None], (v.shape[0], len(kept)) + v.shape[1:])  # noqa: E731
    return States(by_example(x), by_example(t), by_example(k), jax.tree.map(repeat, cond),
                  jnp.full((x_T.shape[0], len(kept)), source_index, jnp.int32), None)

  return Source(name, fresh, path)


def states_per_rollout(grid: np.ndarray, train_grid: np.ndarray) -> int:
  """How many training states one rollout visits."""
  return int(np.sum(_segments(grid, train_grid)[1] > 0))


def _segments(grid, train_grid):
  """For each interval (grid[j+1], grid[j]]: index of the first training time in it, and their number."""
  slack = 1e-6 * abs(grid[0])
  inside = [(train_grid[:-1] <= hi + slack) & (train_grid[:-1] > lo + slack) for hi, lo in zip(grid[:-1], grid[1:])]
  first = np.array([np.argmax(v) if v.any() else 0 for v in inside])
  return first, np.array([v.sum() for v in inside])
