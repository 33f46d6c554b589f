r"""DMD2 of two steps on digits with the embedding loss: its images and real ones look alike to networks at random.

    python -m ddil_jax train --config=configs/digits_embedding_loss.py:ddil --workdir=runs/embedding_loss \
        --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.generator(digits(common.common()), name="embedding_loss", base="dmd2", embedding_weight=1.0,
                            images="jump", networks=2, embedding_layers=("conv_0", "conv_1", "features"),
                            num_steps=2, period=2, critic_weight="v_mse", weight_cap=20.0)
  return common.apply(config, arg, {"ddil": common.half_forward})


def sweep() -> list[dict]:
  """Base and DDIL, reflected and not, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
