"""The priors beta over sources, as functions of the training step.

The paper leaves values and schedule open; each prior is a schedule (constant, linear, cosine,
piecewise: optax), and the vector is normalised at every step.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import optax

from ddil_jax.errors import UsageError
from ddil_jax.types import Array

Schedule = Callable[[Array], Array]


def schedule(value: float | tuple, total_steps: int) -> Schedule:
  """A prior's schedule from a config value.

  A number is constant. A tuple is a schedule over the run's length: ("linear", a, b, fraction),
  ("cosine", a, b, fraction) go from a to b within that fraction of the run, and ("piecewise", a,
  fraction1, b, fraction2, c, ...) jumps.

  Raises:
    UsageError: a negative value, or a kind that does not exist.
  """
  if isinstance(value, int | float):
    _check(value)
    return lambda step: jnp.full((), value, jnp.float32)
  kind, *numbers = value
  if kind in ("linear", "cosine") and len(numbers) == 3:
    start, end, fraction = numbers
    _check(start, end)
    steps = max(1, round(fraction * total_steps))
    if kind == "linear":
      return optax.linear_schedule(start, end, steps)
    ramp = optax.cosine_decay_schedule(1.0, steps)
    return lambda step: end + (start - end) * ramp(step)
  if kind == "piecewise" and len(numbers) % 2:
    values, fractions = numbers[::2], numbers[1::2]
    _check(*values)
    bounds = [round(f * total_steps) for f in fractions]
    return optax.join_schedules([optax.constant_schedule(v) for v in values], bounds)
  raise UsageError(f"priors: {value!r} is no schedule; use a number, ('linear', a, b, fraction),"
                   " ('cosine', a, b, fraction) or ('piecewise', a, fraction, b, ...)")


def _check(*values):
  for value in values:
    if not value >= 0:
      raise UsageError(f"priors: {value} is negative; each prior must be at least 0")


def is_never_drawn(value: float | tuple) -> bool:
  """Whether a config value is zero throughout, so that its source need not exist."""
  numbers = [value] if isinstance(value, int | float) else \
      value[1::2] if value[0] == "piecewise" else value[1:3]
  return all(v == 0 for v in numbers)


def normalised(schedules: Mapping[str, Schedule]) -> Callable[[Array], Array]:
  """step -> probabilities [S], in the order of `schedules`; all zero falls back to the first source."""
  def priors(step):
    beta = jnp.stack([jnp.asarray(f(step), jnp.float32) for f in schedules.values()])
    total = beta.sum()
    return jnp.where(total > 0, beta / jnp.where(total > 0, total, 1), jnp.eye(len(schedules))[0])
  return priors
