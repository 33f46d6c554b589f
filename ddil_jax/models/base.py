"""Networks as pure functions of plain parameter dicts, and comparing and copying those dicts."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax.errors import UsageError
from ddil_jax.registry import unknown
from ddil_jax.types import Array, Cond, NetFn, Params


class Network(NamedTuple):
  """A network: `init(key, image_shape, cond_example) -> params`, `apply` a NetFn."""
  init: Any
  apply: NetFn


@functools.lru_cache(maxsize=32)
def as_net_fn(module: nn.Module) -> Network:
  """A Linen module `(x, t, cond, keys, features)` as a pair of pure functions.

  Equal modules give the same functions, and `apply` is jitted: a network is traced once for each
  shape, however often a program calls it and however many runs a process makes of it.

  Returns:
    Network; `init` takes a key, the image shape (H, W, C) and an example of cond (default {}),
    whose leading axis may have any size, and returns params as a plain dict.
  """
  def init(key: Array, image_shape: tuple[int, ...], cond_example: Cond | None = None) -> Params:
    cond = {name: jnp.asarray(value)[:1] for name, value in (cond_example or {}).items()}
    x, t = jnp.zeros((1, *image_shape), jnp.float32), jnp.zeros((1,), jnp.float32)
    if isinstance(key, jax.core.Tracer):  # inside a caller's jit or eval_shape
      return module.init(key, x, t, cond)["params"]
    return unoptimised(key, x, t, cond)["params"]

  def apply(params, x, t, cond, keys=None, features=(), reuse=None):
    taken = () if reuse is None else (reuse,)  # of networks that take features
    return module.apply({"params": params}, x, t, cond, keys, features, *taken)

  # One compilation instead of one a layer, and unoptimised: it runs once, and optimising the
  # random draws of every layer takes far longer (2 s against 10 to 17 s for the smallest UNet).
  unoptimised = jax.jit(module.init, compiler_options={"xla_backend_optimization_level": 0})
  return Network(init, jax.jit(apply, static_argnames="features"))


def require_features(names: Iterable[str], known: Sequence[str]) -> None:
  """Raises UsageError for a feature that a network does not have, with those it has."""
  if missing := [name for name in names if name not in known]:
    raise UsageError(f"unknown feature '{missing[0]}'; there are: {', '.join(known)}")


def layers_of(module: nn.Module, params: Params, images: Array, names: tuple[str, ...]) -> dict[str, Array]:
  """What layers of a Linen module `images -> anything` give, by the names of its submodules.

  Args:
    images: [B,H,W,C] as the module reads them.
    names: "conv_1", or "block.conv_1" of a submodule's own.

  Returns:
    {name: [B,h,w,c]}; a vector is a map of one pixel.

  Raises:
    UsageError: a name that no layer has, or a layer that gives no map or vector.
  """
  wanted = lambda layer, method: method == "__call__" and ".".join(layer.path) in names  # noqa: E731
  _, kept = module.apply({"params": params}, images, capture_intermediates=wanted, mutable="intermediates")
  kept = flax.traverse_util.flatten_dict(kept["intermediates"], sep=".") if kept else {}
  found = {}
  for name in names:
    if f"{name}.__call__" not in kept:
      layers = dict.fromkeys(path.rpartition("/")[0].replace("/", ".") for path in by_path(params))
      raise UsageError(unknown(f"layer of {type(module).__name__}", name, layers))
    output = kept[f"{name}.__call__"][0]
    if not isinstance(output, jax.Array) or output.ndim not in (2, 4):
      raise UsageError(f"layer '{name}' of {type(module).__name__} gives no map [B,h,w,c] and no vector [B,c]")
    found[name] = output if output.ndim == 4 else output[:, None, None]
  return found


def count_params(params: Params) -> int:
  """Number of scalars in a tree of arrays."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def by_path(params: Params) -> dict[str, Any]:
  """Leaves of a tree by their path, `{"down_0_0/conv_in/kernel": array}`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def describe_mismatch(params_a: Params, params_b: Params) -> list[str]:
  """How b differs from a in paths and shapes, one line a parameter; empty if it does not.

  Args:
    params_a: what is expected (arrays or ShapeDtypeStructs).
    params_b: what was found, such as a checkpoint of another architecture.
  """
  a, b = by_path(params_a), by_path(params_b)
  lines = [f"missing: {path} {tuple(a[path].shape)}" for path in a if path not in b]
  lines += [f"unexpected: {path} {tuple(b[path].shape)}" for path in b if path not in a]
  lines += [f"shape of {path}: {tuple(a[path].shape)} expected, {tuple(b[path].shape)} found"
            for path in a if path in b and tuple(a[path].shape) != tuple(b[path].shape)]
  return lines


class InitReport(NamedTuple):
  """What `init_from` did: parameter paths copied, kept (the student's own), unused (the teacher's)."""
  copied: tuple[str, ...]
  kept: tuple[str, ...]
  unused: tuple[str, ...]

  def __str__(self) -> str:
    return f"{len(self.copied)} parameters copied, {len(self.kept)} kept, {len(self.unused)} unused"


def init_from(student_params: Params, teacher_params: Params) -> tuple[Params, InitReport]:
  """Starts a student from a teacher: every entry of equal path and shape is copied.

  Returns:
    (params, report). Params has the student's structure and dtypes and only fresh buffers, so that
    a step that donates them frees nothing of the student's or the teacher's.
  """
  teacher = by_path(teacher_params)
  copied, kept = [], []

  def pick(path, own):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    other = teacher.get(name)
    agrees = other is not None and tuple(other.shape) == tuple(own.shape)
    (copied if agrees else kept).append(name)
    return jnp.array(other if agrees else own, dtype=own.dtype, copy=True)

  params = jax.tree_util.tree_map_with_path(pick, student_params)
  unused = tuple(name for name in teacher if name not in set(copied))
  return params, InitReport(tuple(copied), tuple(kept), unused)
