"""2. Each source alone, each pair and all three, at a fixed budget of network evaluations.

Rollouts are fresh at every step (no replay), so that they pay for themselves: a mixture that costs more a step
gets fewer steps. The budget is that of the base config on forward states.
"""

from configs.study.parts import DMD2, LCM, METHODS, PD, SEEDS, merge, mixture, step_cost
from ddil_jax.sweep import cross, product

MIXTURES = (mixture(forward=1.0), mixture(student=1.0), mixture(teacher=1.0), mixture(forward=0.5, student=0.5),
            mixture(forward=0.5, teacher=0.5), mixture(student=0.5, teacher=0.5),
            mixture(forward=0.5, student=0.25, teacher=0.25))


def at_budget(methods=METHODS) -> list[dict]:
  """Methods x seven mixtures."""
  entries = []
  for method in methods:
    budget = (1000 if method["config"] == DMD2 else 300) * step_cost(method, mixture(forward=1.0))
    for priors in MIXTURES:
      steps = round(budget / step_cost(method, priors))
      entries.append(merge(method, priors, {"states.replay": False, "train.steps": steps}))
  return entries


def sweep() -> list[dict]:
  """And two methods on forward states with as few steps as mixtures leave: fewer steps alone may help or harm."""
  lcm = next(m for m in METHODS if m["config"] == LCM)
  guided = next(m for m in METHODS if m["config"] == PD and m["arg"] == "guided")
  few = [(guided, 54), (guided, 84), (guided, 191), (lcm, 150), (lcm, 214)]
  controls = [merge(method, mixture(forward=1.0), {"states.replay": False, "train.steps": n}) for method, n in few]
  return cross(at_budget() + controls, product({"seed": SEEDS}))
