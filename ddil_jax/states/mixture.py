"""DDIL's mixture: one of several state distributions, chosen by the priors.

`per_step` draws one source for the whole batch (`lax.switch`: only that one is computed).
`per_example` splits the batch in the exact proportions of the priors, up to rounding that is
unbiased; every source is computed, so use it with replay. The expectation is the same.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.errors import UsageError
from ddil_jax.states.base import Context, StateDistribution
from ddil_jax.types import Array

SELECTIONS = ("per_step", "per_example")


def mixture(parts: tuple[StateDistribution, ...], priors: Callable[[Array], Array],
            selection: str = "per_step") -> StateDistribution:
  """Mixes distributions; with one part it is that part itself, so that a base method is unchanged.

  Args:
    parts: the distributions.
    priors: step -> probabilities [len(parts)].
    selection: an entry of SELECTIONS.
  """
  if selection not in SELECTIONS:
    raise UsageError(f"states: unknown selection '{selection}'; there are: {', '.join(SELECTIONS)}")
  if not parts:
    raise UsageError("states: the priors sum to 0; give at least one source a positive prior")
  if len(parts) == 1:
    return parts[0]
  names = sum((part.sources for part in parts), ())

  def init(ctx: Context):
    return tuple(part.init(ctx) for part in parts)

  def per_step(dist, ctx: Context):
    cumulative = jnp.cumsum(priors(ctx.step))
    u = jax.random.uniform(keys_lib.named(ctx.key, "source"))
    chosen = jnp.minimum(jnp.sum(u >= cumulative[:-1]), len(parts) - 1)

    def branch(i):
      def run(dist):
        states, updated = parts[i].sample(dist[i], ctx)
        return states, dist[:i] + (updated,) + dist[i + 1:]
      return run

    return jax.lax.switch(chosen, [branch(i) for i in range(len(parts))], dist)

  def per_example(dist, ctx: Context):
    drawn = [part.sample(d, ctx) for part, d in zip(parts, dist)]
    cumulative = jnp.cumsum(priors(ctx.step))
    key = keys_lib.named(ctx.key, "source")
    order = jax.random.permutation(key, ctx.batch_size)[ctx.batch["lane"]]
    # Systematic sampling: evenly spaced positions with one random offset.
    u = (order + jax.random.uniform(keys_lib.named(key, "offset"))) / ctx.batch_size
    chosen = jnp.sum(u[:, None] >= cumulative[None, :-1], axis=1)

    def select(*leaves):
      stacked = jnp.stack(leaves)
      return jax.vmap(lambda i, column: column[i], in_axes=(0, 1))(chosen, stacked)

    return jax.tree.map(select, *(states for states, _ in drawn)), tuple(d for _, d in drawn)

  return StateDistribution(names, init, per_step if selection == "per_step" else per_example)
