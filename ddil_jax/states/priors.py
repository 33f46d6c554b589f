"""The priors beta over sources, as functions of the training step.

The paper leaves values and schedule open; each prior is a schedule (constant, linear, cosine,
piecewise: optax), and the vector is normalised at every step.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import jax.numpy as jnp
import numpy as np
import optax

from ddil_jax.errors import UsageError
from ddil_jax.types import Array

Schedule = Callable[[Array], Array]


def schedule(value: float | tuple, total_steps: int, what: str = "priors") -> Schedule:
  """A prior's schedule from a config value; `what` names it in errors.

  A number is constant. A tuple is a schedule over the run's length: ("linear", a, b, fraction),
  ("cosine", a, b, fraction) go from a to b within that fraction of the run, and ("piecewise", a,
  fraction1, b, fraction2, c, ...) jumps.

  Raises:
    UsageError: a value that is negative or not finite, a fraction outside (0, 1], or a kind that does not exist.
  """
  if isinstance(value, int | float):
    _check(what, value)
    return lambda step: jnp.full((), value, jnp.float32)
  kind, *numbers = value
  if kind in ("linear", "cosine") and len(numbers) == 3:
    start, end, fraction = numbers
    _check(what, start, end)
    _check_fractions(what, fraction)
    steps = max(1, round(fraction * total_steps))
    if kind == "linear":
      return optax.linear_schedule(start, end, steps)
    ramp = optax.cosine_decay_schedule(1.0, steps)
    return lambda step: end + (start - end) * ramp(step)
  if kind == "piecewise" and len(numbers) % 2:
    values, fractions = numbers[::2], numbers[1::2]
    _check(what, *values)
    _check_fractions(what, *fractions)
    bounds = [round(f * total_steps) for f in fractions]
    return optax.join_schedules([optax.constant_schedule(v) for v in values], bounds)
  raise UsageError(f"{what}: {value!r} is no schedule; use a number, ('linear', a, b, fraction),"
                   " ('cosine', a, b, fraction) or ('piecewise', a, fraction, b, ...)")


def _check(what, *values):
  for value in values:
    if not value >= 0:
      raise UsageError(f"{what}: {value} is negative; each prior must be at least 0")
    if not math.isfinite(value):
      raise UsageError(f"{what}: {value} is not finite; priors are divided by their sum")


def _check_fractions(what, *fractions):
  """Parts of the run, one after the other."""
  for before, fraction in zip((0, *fractions), fractions):
    if not before < fraction <= 1:
      raise UsageError(f"{what}: {fraction} is no fraction of the run, above {before} and at most 1")


def is_never_drawn(value: float | tuple) -> bool:
  """Whether a config value is zero throughout, so that its source need not exist."""
  numbers = [value] if isinstance(value, int | float) else \
      value[1::2] if value[0] == "piecewise" else value[1:3]
  return all(v == 0 for v in numbers)


def check_sum(schedules: Iterable[Schedule], total_steps: int) -> None:
  """Raises UsageError if all priors are 0 at some step of the run, and so no state is wanted there."""
  steps = jnp.arange(total_steps)
  total = sum(np.broadcast_to(np.asarray(f(steps)), steps.shape) for f in schedules)
  empty = np.flatnonzero(total == 0)
  if empty.size:
    raise UsageError(f"config.states: the priors sum to 0 at {len(empty)} of {total_steps} steps, first at step"
                     f" {empty[0]}; at each step one of them has to be positive")


def normalised(schedules: Mapping[str, Schedule]) -> Callable[[Array], Array]:
  """step -> probabilities [S], in the order of `schedules`; all zero falls back to the first source."""
  def priors(step):
    beta = jnp.stack([jnp.asarray(f(step), jnp.float32) for f in schedules.values()])
    total = beta.sum()
    return jnp.where(total > 0, beta / jnp.where(total > 0, total, 1), jnp.eye(len(schedules))[0])
  return priors
