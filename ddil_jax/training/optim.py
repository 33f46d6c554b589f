"""Optimizers and learning-rate schedules by name: thin over optax."""

import jax.numpy as jnp
import optax

from ddil_jax.errors import UsageError
from ddil_jax.registry import unknown

OPTIMIZERS = {"adam": optax.adam, "adamw": optax.adamw, "radam": optax.radam, "lion": optax.lion,
              "adafactor": optax.adafactor, "sgd": optax.sgd}
SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(peak: float, schedule: str, total_steps: int, warmup_steps: int = 0, end: float = 0.0,
                  start: float = 0.0):
  """A schedule: warm-up from `start` * peak to `peak`, then constant, or linear or cosine decay to `end` * peak."""
  decay_steps = max(1, total_steps - warmup_steps)
  if schedule == "constant":
    body = optax.constant_schedule(peak)
  elif schedule == "linear":
    body = optax.linear_schedule(peak, end * peak, decay_steps)
  elif schedule == "cosine":
    body = optax.cosine_decay_schedule(peak, decay_steps, alpha=end)
  else:
    raise UsageError(unknown("learning-rate schedule", schedule, SCHEDULES))
  if not warmup_steps:
    return body
  return optax.join_schedules([optax.linear_schedule(start * peak, peak, warmup_steps), body], [warmup_steps])


def make(name: str, learning_rate, clip: float = 0.0, **options) -> optax.GradientTransformation:
  """An optimizer with global-norm clipping in front (0: none).

  Clipping acts on the gradient averaged over all devices, unlike the original progressive
  distillation, which clips on each device before the mean.
  """
  if name not in OPTIMIZERS:
    raise UsageError(unknown("optimizer", name, OPTIMIZERS))
  try:
    optimizer = OPTIMIZERS[name](learning_rate, **options)
  except TypeError as error:
    raise UsageError(f"optimizer '{name}' does not take these options {sorted(options)}: {error}") from None
  return optax.chain(optax.clip_by_global_norm(clip), optimizer) if clip else optimizer


def warm_ema(decay: float) -> optax.Schedule:
  """EMA decay that forgets the start: min(decay, (1 + n) / (10 + n)) at update n.

  With a constant decay d the starting point keeps the weight d^n: 37 % after 1 / (1 - d) updates, which
  spoils the average of a short run. Source: the `num_updates` rule of TensorFlow's ExponentialMovingAverage.
  """
  return lambda n: jnp.minimum(decay, (1.0 + n) / (10.0 + n))
