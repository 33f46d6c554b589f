"""How the number of grid points and the target's EMA rate change over consistency training."""

import math
from collections.abc import Callable

from ddil_jax.errors import UsageError

MODES = (("fixed", "fixed"), ("fixed", "progressive"), ("adaptive", "progressive"), ("fixed", "progdist"))


def ema_and_scales(target_ema_mode: str, start_ema: float, scale_mode: str, start_scales: int,
                   end_scales: int, total_steps: int,
                   distill_steps_per_iter: int = 0) -> Callable[[int], tuple[float, int]]:
  """The schedules of consistency models: step -> (EMA rate of the target, number of grid points).

  progressive: `N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1`; adaptive:
  `mu(k) = exp(s0 log(mu0) / (N(k) - 1))`; progdist: halved every `distill_steps_per_iter` steps, and
  twice as long for the last two stages. Source: arXiv 2303.01469, appendix C.

  Raises:
    UsageError: a pair of modes that does not exist.
  """
  if (target_ema_mode, scale_mode) not in MODES:
    pairs = ", ".join(f"{e}+{s}" for e, s in MODES)
    raise UsageError(f"unknown schedule {target_ema_mode}+{scale_mode} of EMA and scales; there are: {pairs}")

  def progressive(step):
    square = step / total_steps * ((end_scales + 1) ** 2 - start_scales**2) + start_scales**2
    return max(math.ceil(math.sqrt(square) - 1), 1)

  def halved(step):
    points = start_scales >> (step // distill_steps_per_iter)
    if points > 1:
      return points
    late = max(step - distill_steps_per_iter * (math.log2(start_scales) - 1), 0)
    return 2 if late < 2 * distill_steps_per_iter else 1

  def schedule(step):
    if scale_mode == "fixed":
      return start_ema, start_scales
    if scale_mode == "progdist":
      return 1.0, halved(step)
    intervals = progressive(step)
    exponent = 1 if target_ema_mode == "fixed" else start_scales / intervals
    return start_ema**exponent, intervals + 1

  return schedule
