"""LoRA: parameter trees that train low-rank deltas over a frozen base, W + (alpha / rank) A B.

A delta is a part of the tree of its network. In it a kernel [..., n, m] that learns is {"a" [N, rank], "b" [rank, m]}
with N the product of all its axes but the last, a parameter that the base has not is there whole, and what stays as
the base has it is not there at all. So optimizers, averages and checkpoints of a delta hold nothing of the base; the
merged network exists only while a loss or a sampler uses it.

Source: arXiv 2106.09685; a convolution is factored as in peft, a convolution to `rank` channels and one of 1x1 after
it. `A` is drawn from N(0, 1 / rank), so that a first update of B moves a kernel as far as one of the kernel itself
would; B is 0.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.errors import UsageError
from ddil_jax.types import Array, Params


class LoRA(NamedTuple):
  """Which kernels learn, and how.

  Attributes:
    rank: of the deltas.
    alpha: the deltas are scaled by alpha / rank; 0 is the rank, so a scale of 1.
    targets: a regular expression; kernels in whose path ("mid_attn/qkv/kernel") it is found learn. "" is all of them:
      attention, dense layers and convolutions, as in LCM-LoRA.
  """
  rank: int
  alpha: float = 0.0
  targets: str = ""

  @property
  def scale(self) -> float:
    return (self.alpha or self.rank) / self.rank

  def takes(self, path: tuple[str, ...], shape: tuple[int, ...]) -> bool:
    """Whether a parameter gets factors: not a vector, a table of embeddings, or what is no larger than they are."""
    if len(shape) < 2 or path[-1] == "embedding" or not re.search(self.targets, "/".join(path)):
      return False
    return self.rank * sum(_matrix(shape)) < math.prod(shape)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
  """A kernel's shape [..., n, m] as that of a matrix."""
  return math.prod(shape[:-1]), shape[-1]


def init(key: Array, params: Params, base: Params, lora: LoRA,
         learns: Callable[[str], bool] = lambda path: True) -> Params:
  """The delta of a network that starts as its base bit for bit, in the network's dtypes.

  Args:
    params: the network as it starts, nested dicts; what the base has not is taken from it.
    base: a part of the same tree, with the same shapes.
    learns: whether a parameter, by its path, may get factors at all.

  Raises:
    UsageError: the base is no part of the network, or no kernel takes factors.
  """
  own, frozen = (flax.traverse_util.flatten_dict(tree) for tree in (params, base))
  other = ["/".join(path) for path in frozen if path not in own or own[path].shape != frozen[path].shape]
  if other:
    raise UsageError(f"{len(other)} of the teacher's {len(frozen)} parameters are not in it, or of another shape,"
                     f" such as {other[0]}; LoRA needs a network that starts as the teacher and has its architecture")
  delta = {path: leaf for path, leaf in own.items() if path not in frozen}
  factored = [path for path in frozen if lora.takes(path, own[path].shape) and learns("/".join(path))]
  if not factored:
    raise UsageError(f"no kernel takes LoRA factors of rank {lora.rank}: they are larger than each, or targets"
                     f" '{lora.targets}' matches none")
  for path in factored:
    (n, m), dtype = _matrix(own[path].shape), own[path].dtype
    a = jax.random.normal(keys_lib.named(key, "/".join(path)), (n, lora.rank), dtype)
    delta |= {(*path, "a"): a / jnp.sqrt(jnp.asarray(lora.rank, dtype)), (*path, "b"): jnp.zeros((lora.rank, m), dtype)}
  return flax.traverse_util.unflatten_dict(delta)


def merge(base: Params, delta: Params, scale: float = 1.0) -> Params:
  """The network of a delta: a tree of the base's shapes and what the delta adds to it.

  Differentiable in both; what the delta does not touch is the base's own array.
  """
  out = dict(base)
  for name, change in delta.items():
    weight = base.get(name)
    if weight is None:
      out[name] = change
    elif isinstance(weight, Mapping):
      out[name] = merge(weight, change, scale)
    else:
      # In full precision on every device: a weight is the same wherever it is merged, but for rounding.
      product = jnp.matmul(change["a"], change["b"], precision=jax.lax.Precision.HIGHEST)
      out[name] = weight + scale * product.reshape(weight.shape)
  return out
