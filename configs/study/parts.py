"""What the parts of the study share: methods, seeds, and the price of a training step."""

from configs.common import VARIANTS  # noqa: F401

SEEDS = range(5)
PD, LCM, DMD2 = (f"configs/digits_{name}.py" for name in ("pd", "lcm", "dmd2"))
# One stage of four steps, from the teacher's eight.
FOUR_STEPS = {"train.stages": ()}
# Every student at four steps, and progressive distillation from the guided teacher.
METHODS = ({"config": PD, "arg": "", **FOUR_STEPS}, {"config": PD, "arg": "guided", **FOUR_STEPS},
           {"config": LCM, "arg": ""})
# Its runs take three times as long: parts of its own, so that none takes more than one sitting.
METHODS_DMD2 = ({"config": DMD2, "arg": ""},)


def mixture(forward: float = 0.0, student: float = 0.0, teacher: float = 0.0, dagger: float = 0.0) -> dict:
  """Priors of the state sources as fields."""
  return {"states.forward": forward, "states.student": student, "states.teacher": teacher, "states.dagger": dagger}


def merge(entry: dict, *more: dict) -> dict:
  """An entry with further fields; arguments are joined."""
  for fields in more:
    arg = ",".join(a for a in (entry.get("arg", ""), fields.get("arg", "")) if a)
    entry = {**entry, **fields, "arg": arg}
  return entry


def step_cost(method: dict, priors: dict, refresh_every: int = 0, teacher_steps: int = 16) -> float:
  """Network evaluations per example of a training step; a gradient counts as three forward passes.

  PD: the student's gradient and two teacher steps. LCM: the gradient, a teacher step, the target. DMD2: the
  sample and the critic's gradient, and at every fifth step the generator's gradient, teacher and critic.
  A guided teacher counts twice. A rollout of K steps costs K, each step or every `refresh_every`-th.
  """
  guided = 2 if "guided" in method["arg"] else 1
  base = {PD: 3 + 2 * guided, LCM: 3 + guided + 1, DMD2: 1 + 3 + (3 + guided + 1) / 5}[method["config"]]
  rollout = {"states.student": 4, "states.teacher": teacher_steps * guided, "states.dagger": 4 * (1 + guided)}
  total = sum(priors.values())
  return base + sum(priors[name] / total * cost for name, cost in rollout.items()) / max(1, refresh_every)
