"""6. Where does DDIL pay? A narrower student, few updates, a tenth of the data, eight steps."""

from configs.study.parts import DMD2, LCM, METHODS, SEEDS, merge
from ddil_jax.sweep import cross, product


def sweep(methods=METHODS) -> list[dict]:
  """Base and DDIL in each regime; the default regime is part 1 at four steps, repeated here for the pairs."""
  entries = []
  for method in methods:
    few = 200 if method["config"] == DMD2 else 60
    eight = {"objective.sampler_steps": 8} if method["config"] == LCM else {"objective.num_steps": 8}
    regimes = ({}, {"model.channels": 4, "teacher.channels": 8}, {"train.steps": few}, {"data.fraction": 0.1},
               eight)
    for regime in regimes:
      # A pool as large as the data at hand would allow; progressive distillation to 8 steps needs 16 of the teacher.
      entries += [merge(method, regime, {"arg": variant}) for variant in ("", "ddil")]
  return cross(entries, product({"seed": SEEDS}))
