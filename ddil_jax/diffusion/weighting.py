"""Loss weights as functions of the noise level: `(process, t [B]) -> [B]`, on the mean square error of x0.

Since eps = (x_t - alpha x0) / sigma, an error of eps is SNR times that of x0; v's is 1 + SNR times
it (for variance-preserving processes).
"""

from collections.abc import Callable

import jax.numpy as jnp

from ddil_jax.diffusion.process import Process, snr
from ddil_jax.errors import UsageError
from ddil_jax.types import Array

Weighting = Callable[[Process, Array], Array]


def constant() -> Weighting:
  """1."""
  return lambda process, t: jnp.ones_like(snr(process, t))


def snr_weight() -> Weighting:
  """SNR: the mean square error of eps (DDPM's simple loss, arXiv 2006.11239)."""
  return snr


def snr_trunc() -> Weighting:
  """max(1, SNR): the larger of the errors of x0 and eps (arXiv 2202.00512, section 4)."""
  return lambda process, t: jnp.maximum(snr(process, t), 1)


def snr_plus_one() -> Weighting:
  """1 + SNR: the mean square error of v (arXiv 2202.00512, section 4)."""
  return lambda process, t: snr(process, t) + 1


def edm(sigma_data: float = 0.5) -> Weighting:
  """SNR + 1 / sigma_data^2: 1 / c_out^2 (arXiv 2206.00364, section 5)."""
  return lambda process, t: snr(process, t) + 1 / sigma_data**2


WEIGHTINGS = {
    "constant": constant,
    "snr": snr_weight,
    "snr_trunc": snr_trunc,
    "snr_plus_one": snr_plus_one,
    "v_mse": snr_plus_one,
    "edm": edm,
}


def capped(weighting: Weighting, cap: float) -> Weighting:
  """min(weight, cap); on "snr" this is min-SNR (arXiv 2303.09556)."""
  if not cap > 0:
    raise UsageError(f"weighting: cap {cap} must be positive")
  return lambda process, t: jnp.minimum(weighting(process, t), cap)


def make(name: str, cap: float | None = None, **options) -> Weighting:
  """A weighting by name, optionally capped. Raises UsageError with the names that exist."""
  if name not in WEIGHTINGS:
    raise UsageError(f"unknown weighting '{name}'; there are: {', '.join(sorted(WEIGHTINGS))}")
  weighting = WEIGHTINGS[name](**options)
  return weighting if cap is None else capped(weighting, cap)
