"""1. Does DDIL or reflection help? PD, LCM, DMD2 x {base, +DDIL, +reflected, both} at 1, 2, 4, 8 steps."""

from configs.study.parts import DMD2, LCM, PD, SEEDS, VARIANTS
from ddil_jax.sweep import cross, product


def sweep() -> list[dict]:
  """PD in stages 8, 4, 2, 1 from the teacher's 16; one LCM student sampled at all step counts; DMD2 students apart."""
  pd = product({"config": (PD,), "train.stages": ((8, 4, 2, 1),), "states.teacher_steps": (16,)})
  lcm = product({"config": (LCM,), "eval.sampler_steps": ((1, 2, 8),)})
  dmd2 = product({"config": (DMD2,), "objective.num_steps": (1, 2, 4, 8)})
  return cross(pd + lcm + dmd2, product({"arg": VARIANTS, "seed": SEEDS}))
