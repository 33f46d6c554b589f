"""3. Priors of the mixture: values and schedules."""

from configs.study.parts import LCM, METHODS, SEEDS, merge, mixture
from ddil_jax.sweep import cross, product

VALUES = (mixture(1.0), mixture(0.75, 0.25), mixture(0.5, 0.5), mixture(0.25, 0.75), mixture(0.5, 0.0, 0.5),
          mixture(0.5, 0.25, 0.25), mixture(0.25, 0.375, 0.375))
# From data to rollouts over the run, and suddenly at half of it.
SCHEDULES = ({**mixture(1.0, 0.25, 0.25), "states.forward": ("linear", 1.0, 0.0, 1.0)},
             {**mixture(1.0, 0.25, 0.25), "states.forward": ("cosine", 1.0, 0.0, 1.0)})


def sweep() -> list[dict]:
  """Unguided LCM and guided PD."""
  methods = [m for m in METHODS if m["config"] == LCM or m["arg"] == "guided"]
  return cross([merge(m, p) for m in methods for p in VALUES + SCHEDULES], product({"seed": SEEDS}))
