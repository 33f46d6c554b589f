"""9b. The same at a reduced size for a CPU: 28x28, 36k parameters, 200 updates, base and DDIL at four steps."""

from configs.study import fashion_mnist
from configs.study.parts import FOUR_STEPS, merge
from ddil_jax.sweep import cross, product

# XLA's convolution gradients on a CPU allow no more: about 4 updates a second.
SIZE = {"model.channels": 8, "model.channel_mult": (1, 2), "model.num_res_blocks": 1, "model.attention_resolutions": (),
        "model.num_heads": 1, "train.batch_size": 64, "eval.num_samples": 2000, "eval.shift_samples": 500}
TEACHER = merge(fashion_mnist.TEACHER, SIZE, {"train.steps": 1500, "optimizer.learning_rate": 3e-3,
                                              "optimizer.warmup_steps": 100})


def sweep() -> list[dict]:
  """PD of one stage from the teacher and from the guided teacher, LCM; three seeds."""
  short = SIZE | {"train.steps": 200, "optimizer.learning_rate": 5e-4, "states.capacity": 1024}
  pd = merge({"config": fashion_mnist.PD, "objective.num_steps": 4}, FOUR_STEPS, short, {"eval.sampler_steps": ()})
  lcm = merge({"config": fashion_mnist.LCM}, short)
  return cross([pd, pd | {"teacher.guidance_scale": 3.0}, lcm], product({"arg": ("", "ddil"), "seed": range(3)}))
