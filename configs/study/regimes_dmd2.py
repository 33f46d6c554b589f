"""6b. The regimes for DMD2."""

from configs.study import regimes
from configs.study.parts import METHODS_DMD2


def sweep() -> list[dict]:
  """Base and DDIL in each."""
  return regimes.sweep(METHODS_DMD2)
