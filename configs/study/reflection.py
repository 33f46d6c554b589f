"""5. Reflection of progressive distillation: kind x place x bound x guidance scale; float32 against bfloat16."""

from configs.study.parts import FOUR_STEPS, PD, SEEDS
from ddil_jax.sweep import cross, product


def place(teacher=False, target=False, sampler=False) -> dict:
  """Where the projection acts."""
  return {"reflect.teacher": teacher, "reflect.target": target, "reflect.sampler": sampler}


def sweep() -> list[dict]:
  """PD to four steps from the teacher at three guidance scales; it has no target network and no critic."""
  scales = product({"config": (PD,), **{k: (v,) for k, v in FOUR_STEPS.items()},
                    "teacher.guidance_scale": (1.0, 2.0, 5.0)})
  kinds = [{"reflect.kind": kind, "reflect.lo": -bound, "reflect.hi": bound, **where}
           for kind, bound in (("clip", 1.0), ("clip", 1.1), ("dynamic", 1.0), ("fold", 1.0))
           for where in (place(teacher=True), place(sampler=True), place(teacher=True, sampler=True))]
  return cross(scales, [{}, {"model.dtype": "bfloat16"}] + kinds, product({"seed": SEEDS}))
