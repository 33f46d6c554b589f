"""10. Every method at 4, 2 and 1 steps, base and +DDIL, from the teacher with and without guidance.

Each run is one student of four steps that is sampled at two and one as well, with the lengths and rates of its config
on digits; what trains against a critic or a discriminator has 700 of its 1000 steps, so that all fits in three hours.
Methods whose own form has one step are trained in that form too, base alone: all states of a sampler of one step are
its start, so there is nothing to mix.
"""

from ddil_jax import config as config_lib
from ddil_jax.sweep import cross, product

SEEDS = range(3)
# What stands under one heading of the table.
FAMILIES = {"Base methods": ("pd", "cd", "lcm", "dmd2"),
            "Trajectory": ("tract", "slam", "ctm", "scott", "boot", "ect", "tcm", "scm", "meanflow", "regression"),
            "Flow": ("rf", "twinflow"),
            "Score and distribution matching": ("sid", "diff_instruct", "dmd", "f_distill", "vsd", "moment_matching",
                                                "msd", "embedding_loss"),
            "Adversarial": ("adversarial", "add", "ladd", "ufogen", "gdd"),
            "Guidance and adapters": ("guided", "agd")}
# Of a grid of many times, sampled at four of them.
TRAJECTORY = ("cd", "lcm", "slam", "scott", "ctm", "adversarial", "scm", "meanflow", "twinflow", "regression")
# Trained for a number of steps.
OF_STEPS = ("tract", "boot", "diff_instruct", "dmd", "dmd2", "f_distill", "vsd", "sid", "moment_matching", "msd",
            "embedding_loss", "add", "ladd", "gdd")
ONE_STEP = ("diff_instruct", "dmd", "vsd", "gdd", "boot")
# Their loss needs the clean image, so there is no +DDIL of them.
CLEAN = ("ect", "tcm", "rf", "ufogen")
# They use no estimate of the teacher: its features, its parameters to start from, or nothing.
UNGUIDED = ("ladd", "gdd", "ufogen", "ect", "tcm")
MOST_STEPS = 700
# What the table has; nothing else is measured.
MEASURED = {"eval.metrics": ("fd", "coverage"), "eval.shift_samples": 0}
BOTH = ({}, {"teacher.guidance_scale": 3.0})


def _entries(name: str, fields: dict, ddil: bool = True, scales: tuple[dict, ...] | None = None) -> list[dict]:
  entry = {"config": f"configs/digits_{name}.py", **fields}
  if config_lib.load(entry["config"]).train.steps > MOST_STEPS:
    entry["train.steps"] = MOST_STEPS
  return cross([entry], [{"arg": arg} for arg in (("", "ddil") if ddil else ("",))],
               list(scales or (BOTH[:1] if name in UNGUIDED else BOTH)))


def sweep() -> list[dict]:
  """All of it; the guided students of guided distillation and AGD are told the scale.

  Those of one seed can be run elsewhere (`--rows`): the list goes seed by seed, the workers setting by setting.
  """
  few = {"eval.sampler_steps": (2, 1)}
  out = _entries("pd", {"train.stages": (4, 2, 1), "states.teacher_steps": 16})
  for name in TRAJECTORY:
    out += _entries(name, few)
  for name in OF_STEPS:
    out += _entries(name, few | {"objective.num_steps": 4})
  for name in ONE_STEP:
    out += _entries(name, {"objective.num_steps": 1, "eval.sampler_steps": ()}, ddil=False)
  for name in CLEAN:
    first = {"teacher": {"config": "configs/digits_ect.py"}} if name == "tcm" else {}
    out += _entries(name, few | first, ddil=False)
  # What it has of data it can have of the teacher, on all states.
  out += _entries("ect", few | {"objective.from_data": False}, scales=BOTH)
  jumps, told = few | {"objective.sampler_steps": 4}, {"eval.guidance_scales": (1.0, 3.0)}
  for name in ("guided", "agd"):
    out += cross([{"config": f"configs/digits_{name}.py", **jumps, **told}], product({"arg": ("", "ddil")}))
  out.append({"config": "configs/digits_guided.py", "arg": "lora", **jumps, **told})
  # Its teacher is the first of the two stages, of the same seed.
  stages = {"config": "configs/digits_pd.py", **told, "train.stages": (4, 2, 1), "states.teacher_steps": 16}
  first = {"config": "configs/digits_guided.py", "arg": "", **dict.fromkeys(stages.keys() - told.keys() - {"config"}),
           **jumps, **told}
  out += cross([stages | {"teacher": first}], product({"arg": ("stage_two", "ddil,stage_two")}))
  return cross(product({"seed": SEEDS}), out, [MEASURED])
