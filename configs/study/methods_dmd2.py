"""1c. The first question for DMD2: a student for each of 1, 2, 4, 8 steps."""

from configs.study.parts import DMD2, SEEDS, VARIANTS
from ddil_jax.sweep import product


def sweep() -> list[dict]:
  """Four variants and step counts."""
  return product({"config": (DMD2,), "objective.num_steps": (1, 2, 4, 8), "arg": VARIANTS, "seed": SEEDS})
