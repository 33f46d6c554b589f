"""1b. The same for students of the guided teacher (scale 3), where the pilot saw DDIL's clearest gain."""

from configs.study.parts import LCM, PD, SEEDS
from ddil_jax.sweep import cross, product


def sweep() -> list[dict]:
  """PD in stages 8, 4, 2, 1; LCM with one fixed guidance scale, folded into the student."""
  pd = product({"config": (PD,), "train.stages": ((8, 4, 2, 1),), "states.teacher_steps": (16,)})
  lcm = product({"config": (LCM,), "eval.sampler_steps": ((1, 2, 8),)})
  variants = ("", "ddil", "reflected", "ddil,reflected")
  return cross(
      [{**entry, "teacher.guidance_scale": 3.0} for entry in pd + lcm], product({"arg": variants, "seed": SEEDS}))
