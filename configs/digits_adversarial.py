r"""GAN terms on digits: CTM on features of a small classifier, with `scott` SCott on features of the teacher.

    python -m ddil_jax train --config=configs/digits_adversarial.py:ddil --workdir=runs/ctm_gan \
        --config.teacher.path=runs/digits_teacher
    python -m ddil_jax train --config=configs/digits_adversarial.py:scott --workdir=runs/scott_gan \
        --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def scott(config: ConfigDict) -> ConfigDict:
  """SCott in the place of CTM."""
  config.objective = ConfigDict(dict(
      name="adversarial", base="scott", adversarial_weight=0.01, images="jump", kind="teacher", r1=0.0, num_scales=17,
      sampler_steps=4, solver_steps=3, eta=0.3, distance="l2", weight="constant", target_decay=0.95))
  config.model.end_time_embedding = 0
  return config


def get_config(arg: str | None = None) -> ConfigDict:
  # The denoising term's weight is that of digits_ctm.py; the GAN term's was scaled with it.
  config = common.trajectory(digits(common.common()), name="adversarial", base="ctm", adversarial_weight=0.002,
                             images="jump", kind="images", r1=0.0, num_scales=17, sampler_steps=4, max_teacher_steps=4,
                             solver="ddim", dsm_weight=0.04, dsm_cap=100.0, target_decay=0.99)
  config.model.end_time_embedding = 32
  return common.apply(config, arg, {"scott": scott})


def sweep() -> list[dict]:
  """Both methods, base and DDIL, three seeds."""
  return product({"arg": ("", "ddil", "scott", "ddil,scott"), "seed": range(3)})
