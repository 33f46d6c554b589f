"""Bytes that devices send each other in a training step: those of a compiled program, and the least possible."""

import math
import re

import jax
import jax.numpy as jnp

from ddil_jax.training import hlo

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4,
          "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
# What XLA for TPUs makes of most scatters: a computation of this name, in which a sum is followed by a slice.
_SUM_AND_SLICE = "all-reduce-scatter"


def collective_bytes(text: str) -> dict[str, hlo.Range]:
  """{kind: bytes that a device sends} of one run of an optimised program.

  A ring over n devices sends 2 (n - 1) / n of what it reduces, (n - 1) / n of what it gathers or of what it reduces
  and scatters, all of what it permutes.
  """
  def of(line, _):
    found = re.search(rf"= (.*?) ({'|'.join((*_COLLECTIVES, _SUM_AND_SLICE))})(-start)?\(", line)
    if not found:
      return {}
    kind = "reduce-scatter" if found[2] == _SUM_AND_SLICE else found[2]
    return {kind: _sent(found[2], found[1], bool(found[3]), _group_size(line))}

  return hlo.totals(_as_sent(text), of)


def _as_sent(text: str) -> str:
  """A program's text with two habits of XLA for TPUs undone.

  A collective that runs beside other operations has a copy in each of their fusions; it counts where it starts. Of a
  sum in a computation that sums and slices only the slice is sent.
  """
  def counted(computation):
    if "AsyncCollectiveStart" not in computation:
      computation = re.sub(r"(?m)^.*\{chain_id=.*\n", "", computation)
    if re.match(rf"%?{_SUM_AND_SLICE}[\w.\-]* ", computation):
      computation = computation.replace(" all-reduce(", f" {_SUM_AND_SLICE}(")
    return computation

  return "".join(map(counted, re.split(r"(?m)^(?=\S.*\{$)", text)))


def _sent(kind, shapes, asynchronous, n) -> float:
  sizes = [math.prod(int(d) for d in dims.split(",") if d) * _BYTES.get(dtype, _BYTES.get(dtype[:2], 4))
           for dtype, dims in re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", shapes)]
  size, ring = sum(sizes), (n - 1) / n
  if asynchronous and kind != "all-reduce" and len(sizes) > 1:  # operands and results, of one or more arrays
    size *= {"all-gather": n / (n + 1), "reduce-scatter": 1 / (n + 1)}.get(kind, 1 / 2)
  return {"all-reduce": 2 * ring * size, _SUM_AND_SLICE: ring * size, "all-gather": ring * size, "reduce-scatter": ring * n * size,
          "collective-permute": size, "all-to-all": ring * size}[kind]


def _group_size(line) -> int:
  """Devices of a group: `[groups,size]<=...`, `{{0,1},{2,3}}`, or the axes in braces of `mesh['a'=4,'b'=2] {'a'}`."""
  mesh = re.search(r"replica_groups=mesh\[(.*?)\].*?\{('.*?)\}", line)
  if mesh:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])  # an axis, or the part of one
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  counted = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
  if counted:
    return int(counted[1])
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
  return len(listed[1].split(",")) if listed else 2


def ideal_bytes(step, given: dict, due: tuple[str, ...], fsdp: int, count: int, dtype: str = "float32") -> float:
  """Bytes that a device has to send in a step on `count` devices, of which `fsdp` share each parameter.

  What is split is gathered once if a loss or a rollout depends on it, (f - 1) / f of its bytes, and kernels and the like,
  of more than one axis, in the dtype in which the networks compute, if that is narrower than theirs. A gradient of what is
  split is summed and scattered over the f devices, (f - 1) / f, and its part summed over the d others, 2 (d - 1) / d of
  1 / f; that of what is whole is summed over all n, 2 (n - 1) / n (rings). Metrics and norms are left out.

  Args:
    step: of one device, `make_train_step` without a layout.
    given: {"state", "frozen", "batch"} of ShapeDtypeStructs with shardings, of `Runner.lower`.
    due: the players that learn.
    dtype: in which the networks compute.
  """
  state, frozen, batch = given["state"], given["frozen"], given["batch"]
  plain = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), (state, frozen, batch))
  traced, shapes = jax.make_jaxpr(step, static_argnums=4, return_shape=True)(
      *plain, jax.eval_shape(jax.random.key, 0), due)
  jaxpr, (new, metrics) = traced.jaxpr, jax.tree.unflatten(jax.tree.structure(shapes), traced.jaxpr.outvars)
  # Averages and optimizers change in place, part by part; what they depend on needs not be whole.
  needed = set(map(id, jax.tree.leaves(({name: new.params[name] for name in due}, new.dist, metrics))))
  for equation in reversed(jaxpr.eqns):
    if any(id(v) in needed for v in equation.outvars):
      needed |= set(map(id, equation.invars))
  read = jax.tree.unflatten(jax.tree.structure(plain), [id(v) in needed for v in jaxpr.invars[:-1]])
  size = lambda v: math.prod(v.shape) * v.dtype.itemsize  # noqa: E731
  split = lambda v: not v.sharding.is_fully_replicated  # noqa: E731

  def as_read(v):
    narrower = min(v.dtype.itemsize, jnp.dtype(dtype).itemsize) if v.ndim > 1 else v.dtype.itemsize
    return math.prod(v.shape) * narrower

  def gathered(trees, used):
    return sum(as_read(v) for v, u in zip(jax.tree.leaves(trees), jax.tree.leaves(used), strict=True) if u and split(v))

  networks = lambda state, frozen: (state.params, state.ema, frozen)  # noqa: E731
  total = (fsdp - 1) / fsdp * gathered(networks(state, frozen), networks(read[0], read[1]))
  others = count // fsdp
  for leaf in jax.tree.leaves({name: state.params[name] for name in due}):
    part = (fsdp - 1) / fsdp + 2 * (others - 1) / others / fsdp if split(leaf) else 2 * (count - 1) / count
    total += part * size(leaf)
  return total
