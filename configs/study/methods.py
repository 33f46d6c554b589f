"""1. Does DDIL or reflection help? PD and LCM x {base, +DDIL, +reflected, both} at 1, 2, 4, 8 steps."""

from configs.study.parts import LCM, PD, SEEDS, VARIANTS
from ddil_jax.sweep import cross, product


def sweep() -> list[dict]:
  """PD in stages 8, 4, 2, 1 from the teacher's 16; one LCM student sampled at all step counts."""
  pd = product({"config": (PD,), "train.stages": ((8, 4, 2, 1),), "states.teacher_steps": (16,)})
  lcm = product({"config": (LCM,), "eval.sampler_steps": ((1, 2, 8),)})
  return cross(pd + lcm, product({"arg": VARIANTS, "seed": SEEDS}))
