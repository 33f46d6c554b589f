"""Sampling that computes a UNet's deep features at some steps only, and takes them from there at the others.

DeepCache (arXiv 2312.00858): a full step keeps the feature that enters the up path at block m; the others run the
first m + 1 blocks down and the last m + 1 up. Encoder propagation (Faster Diffusion, arXiv 2312.09608): a key step
keeps all that the encoder gives; the others run the decoder alone, with their own time. Nothing is trained. With all
steps full it is the sampler itself.

The schedules are lists of full steps, from 0; golden vectors `feature_cache_schedules`. The releases' further parts,
several decoder steps in one call and the injection of the first noise, are not here.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax.diffusion.solvers import Policy
from ddil_jax.errors import UsageError
from ddil_jax.registry import unknown
from ddil_jax.types import Cond, Denoiser, DenoiseFn, Params


def every(steps: int, interval: int) -> np.ndarray:
  """Each `interval`-th step."""
  return np.arange(0, steps, interval)


def around(steps: int, count: int, center: int, power: float) -> tuple[np.ndarray, float]:
  """`count` full steps that are densest around `center`, and the power: lowered by 0.02 until there are as many.

  The places are even in `(i - center)^(1 / power)`. For i < center that is complex, and of the points between the
  ends, raised to the power again, the real part counts, as in the release.

  Raises:
    UsageError: no power above 1 gives that many.
  """
  while power > 1:
    first, last = np.array([-center, steps - center], complex) ** (1 / power)
    between = np.unique((np.linspace(first, last, count + 1) ** power).real.astype(int))[1:-1]
    if len(between) + 1 == count:
      return np.concatenate([[0], between + center]), power
    power -= 0.02
  raise UsageError(f"feature cache: no {count} of {steps} steps around {center}; take fewer, or another center")


def early(steps: int, count: int, power: float) -> np.ndarray:
  """At most `count` full steps that are densest at the start: even in `i^(1 / power)`."""
  return np.unique((np.linspace(0, steps ** (1 / power), count + 1) ** power).astype(int))[:-1]


# Key steps of Faster Diffusion's release, by its names: of 50 or (100ls) 100 steps.
KEYS = {
    "3": lambda i: i % 3 == 0,
    "50ls": lambda i: i in (0, 1, 2, 3, 5, 10, 15, 25, 35),
    "pro": lambda i: i in [k * (k + 3) // 2 for k in range(i + 1)],
    "100ls": lambda i: i <= 10 or i >= 85 or i % 5 == 0,
    "s2": lambda i: i < 20 or i >= 40 or i % 2 == 0,
}


def keys(name: str, steps: int) -> np.ndarray:
  """Key steps by the name of their rule. Raises UsageError with the names that exist."""
  if name not in KEYS:
    raise UsageError(unknown("rule of key steps", name, KEYS))
  return np.array([i for i in range(steps) if KEYS[name](i)])


def groups(full: Sequence[int], steps: int) -> np.ndarray:
  """[start, end) of the steps that share the features of each full step, [K, 2]."""
  return np.stack([np.asarray(full), np.append(full[1:], steps)], axis=1)


def cached_policy(make_policy: Callable[[DenoiseFn], Policy], denoiser: Denoiser, params: Params,
                  features: tuple[str, ...], full: Sequence[int], steps: int, cond: Cond) -> Policy:
  """A sampler that computes `features` at the full steps and reuses them at the others.

  Args:
    make_policy: a solver with its transforms, such as guidance; each network call of a step has a cache of its own.
    denoiser: of a network that gives and takes the features: `models/unet.py::UNet.cache_names`.
    full: indices of the full steps, 0 first.
    steps: of the walk.
    cond: of the walk, for the shapes of what is kept.

  Raises:
    UsageError: the first step is not full, or a step is not of the walk.
  """
  full = np.asarray(full)
  if len(full) == 0 or full[0] != 0 or full.min() < 0 or full.max() >= steps:
    raise UsageError(f"feature cache: full steps {full.tolist()} of {steps}; the first is 0, the last below {steps}")
  is_full = jnp.zeros(steps, bool).at[full].set(True)

  def compute(carry, cache, *args):
    found = []

    def denoise(x_t, t, cond):
      x0, named = denoiser(params, x_t, t, cond, None, features)
      found.append(named)
      return x0

    x, carry = make_policy(denoise).step(carry, *args)
    return x, carry, tuple(found)

  def reuse(carry, cache, *args):
    kept = iter(cache)
    denoise = lambda x_t, t, cond: denoiser(params, x_t, t, cond, None, (), next(kept))  # noqa: E731
    x, carry = make_policy(denoise).step(carry, *args)
    return x, carry, cache

  # Without a step taken, a policy starts in the same way with any network.
  start = make_policy(lambda x_t, t, cond: x_t).init

  def init(x):
    carry, t = start(x), jnp.ones(x.shape[:1], x.dtype)
    cache = jax.eval_shape(lambda: compute(carry, (), x, t, t, cond, x)[2])
    return jnp.zeros((), jnp.int32), carry, jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), cache)

  def step(state, *args):
    i, carry, cache = state
    x, carry, cache = jax.lax.cond(is_full[i], compute, reuse, carry, cache, *args)
    return x, (i + 1, carry, cache)

  return Policy(init, step)
