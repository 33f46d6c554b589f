"""4. Replay: refresh interval x capacity; raw or EMA parameters in the rollout; DAgger's mixing probability."""

from configs.study.parts import LCM, METHODS, SEEDS, merge, mixture
from ddil_jax.sweep import cross, product


def sweep() -> list[dict]:
  """Unguided LCM and guided PD, DDIL's default priors."""
  methods = [m for m in METHODS if m["config"] == LCM or m["arg"] == "guided"]
  settings = product({"states.refresh_every": (1, 10, 50, 300), "states.capacity": (1024, 4096)})
  settings += [{"states.rollout_params": "0.99"}]
  settings += [merge(mixture(0.5, dagger=0.5), {"states.dagger_probability": p}) for p in (0.25, 0.5, 0.75)]
  return cross([merge(m, {"arg": "ddil"}, s) for m in methods for s in settings], product({"seed": SEEDS}))
