"""2b. The sources at a fixed budget for DMD2, whose base is student states alone."""

from configs.study import sources
from configs.study.parts import METHODS_DMD2, SEEDS
from ddil_jax.sweep import cross, product


def sweep() -> list[dict]:
  """Seven mixtures."""
  return cross(sources.at_budget(METHODS_DMD2), product({"seed": SEEDS}))
