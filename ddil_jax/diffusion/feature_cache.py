"""Sampling that computes a UNet's deep features at some steps only, and takes them from there at the others.

DeepCache (arXiv 2312.00858): a full step keeps the feature that enters the up path at block m; the others run the
first m + 1 blocks down and the last m + 1 up. Encoder propagation (Faster Diffusion, arXiv 2312.09608): a key step
keeps all that the encoder gives; the others run the decoder alone, with their own time. Since it reads nothing of their
states, a key step can decode for all of them in one call. Nothing is trained. With all steps full it is the sampler
itself.

The schedules are lists of full steps, from 0; golden vectors `feature_cache_schedules`. Of Faster Diffusion's release the
injection of the first noise is not here.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax.diffusion.solvers import Policy
from ddil_jax.errors import UsageError
from ddil_jax.registry import unknown
from ddil_jax.types import Array, Cond, Denoiser, DenoiseFn, Params


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


SCHEDULES = {"every": (every, int), "around": (lambda *args: around(*args)[0], int, int, float),
             "early": (early, int, float), "keys": (lambda steps, name: keys(name, steps), str)}


def schedule(text: str, steps: int) -> np.ndarray:
  """The full steps of a walk that "NAME:VALUE,..." describes.

  Args:
    text: "every:2", "around:COUNT,CENTER,POWER", "early:COUNT,POWER" or "keys:RULE", see the functions here.
    steps: of the walk.

  Raises:
    UsageError: an unknown name, values that are not of its kind, or none of a walk of so many steps.
  """
  name, _, values = text.partition(":")
  if name not in SCHEDULES:
    raise UsageError(unknown("schedule of full steps", name, SCHEDULES))
  make, *kinds = SCHEDULES[name]
  given = values.split(",") if values else []
  try:
    return make(steps, *(kind(value) for kind, value in zip(kinds, given, strict=True)))
  except (ValueError, ZeroDivisionError):
    raise UsageError(f"schedule of full steps '{text}': '{name}:' and {len(kinds)} value(s) are expected, such as"
                     " every:2, around:5,15,1.4, early:10,1.4 or keys:50ls; numbers from 1 on") from None


def groups(full: Sequence[int], steps: int) -> np.ndarray:
  """[start, end) of the steps that share the features of each full step, [K, 2]."""
  return np.stack([np.asarray(full), np.append(full[1:], steps)], axis=1)


def cached_policy(make_policy: Callable[[DenoiseFn], Policy], denoiser: Denoiser, params: Params,
                  features: tuple[str, ...], full: Sequence[int], grid: Array, cond: Cond,
                  batched: bool = False) -> Policy:
  """A sampler that computes `features` at the full steps and reuses them at the others.

  Args:
    make_policy: a solver with its transforms, such as guidance; each network call of a step has a cache of its own.
    denoiser: of a network that gives and takes the features: `models/unet.py::UNet.cache_names`.
    full: indices of the full steps, 0 first.
    grid: [steps + 1] times of the walk.
    cond: of the walk, as shapes; their leading axis is that of the states.
    batched: a full step decodes for all steps up to the next full one, in one call of as many times the batch. Of
      features with which a network reads no state: "skips". The groups of unlike schedules are filled up.

  Raises:
    UsageError: the first step is not full, or a step is not of the walk; batched: a sampler that asks the network at
      other times than those of the grid.
  """
  full, steps = np.asarray(full), len(grid) - 1
  if len(full) == 0 or full[0] != 0 or full.min() < 0 or full.max() >= steps:
    raise UsageError(f"feature cache: full steps {full.tolist()} of {steps}; the first is 0, the last below {steps}")
  is_full = jnp.zeros(steps, bool).at[full].set(True)
  longest = int(np.diff(groups(full, steps)).max())
  since = jnp.arange(steps) - jnp.asarray(np.repeat(full, np.diff(np.append(full, steps))))  # steps since the full one

  def compute(i, carry, cache, x, now, then, cond, noise):
    found = []

    def denoise(x_t, t, cond):
      x0, named = denoiser(params, x_t, t, cond, None, features)
      if batched:  # the network's own output of this call is not used, so it is not computed
        named = {"output": decoded(named, x_t, t, cond, i, now, then)}
        x0 = denoiser(params, x_t, t, cond, None, (), jax.tree.map(lambda v: v[0], named))
      found.append(named)
      return x0

    x, carry = make_policy(denoise).step(carry, x, now, then, cond, noise)
    return x, carry, tuple(found)

  def decoded(named, x_t, t, cond, i, now, then):
    """What the network gives at step i and those after it that share its features, [longest, B, ...]."""
    several = lambda v: jnp.broadcast_to(v, (longest, *v.shape)).reshape(-1, *v.shape[1:])  # noqa: E731
    at = jnp.minimum(i + jnp.arange(longest), steps - 1)

    def times(t):
      if t is not now and t is not then:  # they are told apart by which array they are
        raise UsageError("feature cache: a sampler that asks the network at other times than those of its grid cannot"
                         " decode several steps in one call")
      return jnp.repeat(jnp.asarray(grid, t.dtype)[at + (t is then)], len(t))

    cond = {name: times(v) if name == "end_time" else several(v) for name, v in cond.items()}
    _, found = denoiser(params, several(x_t), times(t), cond, None, ("output",), jax.tree.map(several, named))
    return found["output"].reshape(longest, len(x_t), *found["output"].shape[1:])

  def reuse(i, carry, cache, x, now, then, cond, noise):
    kept = iter(cache)

    def denoise(x_t, t, cond):
      named = next(kept)
      return denoiser(params, x_t, t, cond, None, (), jax.tree.map(lambda v: v[since[i]], named) if batched else named)

    x, carry = make_policy(denoise).step(carry, x, now, then, cond, noise)
    return x, carry, cache

  # Without a step taken, a policy starts in the same way with any network.
  start = make_policy(lambda x_t, t, cond: x_t).init

  def init(x):
    carry, t, like = start(x), jnp.ones(x.shape[:1], x.dtype), x
    rows = {name: jnp.zeros((len(x), *v.shape[1:]), v.dtype) for name, v in cond.items()}
    cache = jax.eval_shape(lambda t, s: compute(0, carry, (), like, t, s, rows, like)[2], t, t)
    return jnp.zeros((), jnp.int32), carry, jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), cache)

  def step(state, *args):
    i, carry, cache = state
    x, carry, cache = jax.lax.cond(is_full[i], compute, reuse, i, carry, cache, *args)
    return x, (i + 1, carry, cache)

  return Policy(init, step)
