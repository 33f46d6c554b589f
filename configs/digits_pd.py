"""Progressive distillation on digits: 8 -> 4 -> 2 steps, the teacher's DDIM at 8 steps to begin with.

    python -m ddil_jax train --config=configs/digits_pd.py:ddil --workdir=runs/pd --config.teacher.path=runs/digits_teacher

With `stage_two` its teacher is a run of `configs/digits_guided.py`.
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def guided(config: ConfigDict) -> ConfigDict:
  """The first stage's teacher is guided; later ones have it folded in."""
  config.teacher.guidance_scale = 3.0
  return config


def stage_two(config: ConfigDict) -> ConfigDict:
  """The teacher is told the guidance scale, and so are the students: stage two of guided distillation."""
  config.objective.guidance_range = (1.0, 5.0)
  config.model.guidance_embedding = config.teacher.guidance_embedding = 32
  config.teacher.update(ema="0.99", guidance_scale=1.0)
  config.eval.guidance_scales = (1.0, 3.0)
  return config


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.trajectory(digits(common.common()), name="pd", num_steps=4, weight="snr_trunc", snr_cap=1e6)
  # Student steps of each stage; the student of one stage is the teacher of the next.
  config.train.stages = (4, 2)
  config.optimizer.schedule = "linear"
  config.eval.sampler_steps = ()
  config.states.teacher_steps = 16
  return common.apply(config, arg, {"guided": guided, "stage_two": stage_two, "lora": common.lora})


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
