"""5b. Reflection of LCM's target and of DMD2's critic, beside that of the teacher: kind x place x guidance scale."""

from configs.study.parts import DMD2, LCM, SEEDS
from configs.study.reflection import place
from ddil_jax.sweep import cross, product

PLACES = (place(teacher=True), place(target=True), place(teacher=True, target=True))


def sweep() -> list[dict]:
  """LCM at three guidance scales with clip and dynamic thresholding; DMD2, which takes long, at two with a clip."""
  def at(config, scales, kinds):
    return cross(product({"config": (config,), "teacher.guidance_scale": scales}),
                 [{}, *cross(product({"reflect.kind": kinds}), list(PLACES))])

  return cross(at(LCM, (1.0, 2.0, 5.0), ("clip", "dynamic")) + at(DMD2, (1.0, 3.0), ("clip",)),
               product({"seed": SEEDS}))
