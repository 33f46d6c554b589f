"""9. On Fashion-MNIST (28x28, a teacher of 1.4M parameters), for one GPU: base, DDIL, reflected and both."""

from configs.study.parts import VARIANTS
from ddil_jax.sweep import cross, product

PD, LCM = "configs/fashion_mnist_pd.py", "configs/fashion_mnist_lcm.py"
TEACHER = {"config": "configs/fashion_mnist_teacher.py", "eval.guidance_scales": (1.0, 3.0)}


def sweep() -> list[dict]:
  """PD from the teacher and from the guided teacher, LCM; three seeds."""
  methods = [{"config": PD}, {"config": PD, "teacher.guidance_scale": 3.0}, {"config": LCM}]
  return cross(methods, product({"arg": VARIANTS, "seed": range(3)}))
