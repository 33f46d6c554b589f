"""Where arrays live. The only module that names Mesh or pmap.

One step function for all modes: "single" (jit on one device), "mesh" (jit over a mesh, arrays are
global), "pmap" (one program per device; the step averages over its axis). The mesh has two axes, `data` and `fsdp`.
The batch and the replay buffers are split along axis 0 over both. Parameters, optimizer states, averages and the
frozen teacher are split over `fsdp`, one axis of each array by rules on its path, and are whole only while states and
losses are computed (ZeRO stage 3, arXiv 1910.02054): this part of a step is written device by device (`shard_map`),
what updates parameters is left to the compiler (GSPMD, arXiv 2105.04663).
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddil_jax.errors import UsageError
from ddil_jax.registry import unknown
from ddil_jax.training.params import flatten, to_host
from ddil_jax.training.step import Layout, Networks, TrainState
from ddil_jax.types import Devices

MODES = ("single", "mesh", "pmap")
AXES = ("data", "fsdp")
LARGEST, WHOLE = "largest", "whole"


class Options(NamedTuple):
  """How state and batch are split.

  Attributes:
    fsdp: devices over which parameters are split; 1 keeps a copy on each. The rest is the `data` axis.
    rules: "REGEX=AXIS" on a parameter's path, such as "film/kernel=1", the first that is found counts;
      AXIS is a number, "largest" (the largest axis that fsdp divides, of equals the last) or "whole".
      What no rule finds is "largest".
    min_size: arrays of fewer elements stay whole under "largest": a collective costs more than they do.
    microbatch: most examples that a device learns from at a time, 0 is all; gradients are accumulated.
  """
  fsdp: int = 1
  rules: tuple[str, ...] = (f".*={LARGEST}",)
  min_size: int = 2**14
  microbatch: int = 0


class Runner(NamedTuple):
  """How a step runs.

  Attributes:
    shapes: (make_state, key, teacher, host batch) -> what `create` would make, as ShapeDtypeStructs in the
      plain layout (as on one device, or global arrays) with their shardings.
    create: the same arguments -> `make_state(key, teacher, batch)` on the devices.
    place, fetch: a TrainState in the plain layout to and from the devices.
    place_frozen, place_batch: the same for the frozen parameters and a host batch, of which each process
      has its share.
    step: (state, frozen, batch, key, due) -> (state, metrics); the state is donated.
    lay: (make_state, teacher, batch) -> {"state", "frozen", "batch"}, the step's arguments as ShapeDtypeStructs with
      their shardings, for devices that need not be there; None under pmap.
    lower: (what `lay` gave, due) -> the lowered step; None under pmap.
    num_devices: over how many devices the batch is split.
    summary: one line: how the batch is split.
  """
  shapes: Callable[..., TrainState]
  create: Callable[..., Any]
  place: Callable[[TrainState], Any]
  fetch: Callable[[Any], TrainState]
  place_frozen: Callable[[Any], Any]
  place_batch: Callable[[dict], dict]
  step: Callable
  lay: Callable[..., dict[str, Any]] | None
  lower: Callable[..., Any] | None
  num_devices: int
  summary: str


def make_runner(mode: str, make_step: Callable[[Layout], Callable], batch_size: int, devices: list | None = None,
                options: Options = Options(), platform: str = "") -> Runner:
  """A runner of `make_step(layout)`.

  Args:
    platform: for which the step is made; "" is that of the devices.

  Raises:
    UsageError: unknown mode, a batch that the devices cannot share evenly, or options that do not fit.
  """
  devices = _of_mode(mode, devices, jax.devices)
  count = len(devices)
  if batch_size % count:
    raise UsageError(f"batch_size {batch_size} must be a multiple of the {count} devices")
  if options.fsdp < 1 or options.fsdp > 1 and mode != "mesh" or count % options.fsdp:
    raise UsageError(f"train.fsdp={options.fsdp}: a divisor of the {count} device(s) is needed, and"
                     f" train.parallel=mesh, which is {mode}")
  _require_mesh(mode)
  share = batch_size // count
  passes = share // _largest_divisor(share, options.microbatch or share)
  layout = Layout(passes=passes, unroll=(platform or devices[0].platform) == "cpu")
  summary = f"batch {batch_size} = {count} device(s) x {passes} pass(es) x {share // passes}"
  if options.fsdp > 1:
    summary += f"; mesh of data {count // options.fsdp} x fsdp {options.fsdp}"
  if mode == "mesh":
    return _mesh(make_step, devices, layout, options, summary)
  return {"single": _single, "pmap": _pmap}[mode](make_step, devices, layout, summary)


def _require_mesh(mode: str) -> None:
  if mode != "mesh" and jax.process_count() > 1:
    raise UsageError(f"train.parallel={mode} runs in one process, and there are {jax.process_count()};"
                     " set it to mesh")


def _largest_divisor(number: int, most: int) -> int:
  return next(d for d in range(min(number, most), 0, -1) if number % d == 0)


def _of_mode(mode, devices, default):
  if mode not in MODES:
    raise UsageError(unknown("parallel mode", mode, MODES))
  devices = list(devices or default())
  return devices[:1] if mode == "single" else devices


def spread(mode: str, devices: list | None = None, together: bool = False) -> Devices:
  """The devices of a mode for work without a TrainState: one, or a mesh of all of this process.

  Args:
    together: of all processes; each then has to do the same work with the same arrays.

  Raises:
    UsageError: unknown mode; together in several processes, whose mode is not mesh.
  """
  if together:
    _require_mesh(mode)
  devices = _of_mode(mode, devices, jax.devices if together else jax.local_devices)
  places = _Places(devices, Options())
  return Devices(len(devices), lambda tree: _put(tree, places.split), lambda tree: _put(tree, places.whole), to_host)


def local(tree):
  """A tree that this process can read alone; every process has to call it if there are several."""
  if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)):
    return tree
  return jax.tree.map(to_host, tree)


class _Places:
  """Shardings over the mesh of some devices.

  The devices keep JAX's order, in which those of a process are neighbours: `fsdp`, the inner axis, stays
  within a process as far as it fits, and each process holds consecutive examples of the batch.
  """

  def __init__(self, devices: list, options: Options):
    self._options = options
    self._rules = [_rule(text) for text in options.rules]
    self.mesh = Mesh(np.array(devices).reshape(-1, options.fsdp), AXES)
    self.split, self.whole = (NamedSharding(self.mesh, spec) for spec in (PartitionSpec(AXES), PartitionSpec()))

  def params(self, tree):
    """Shardings of a network's parameters (arrays or ShapeDtypeStructs)."""
    named = {name: self._of(name, leaf.shape) for name, leaf in flatten(tree).items()}
    return jax.tree.unflatten(jax.tree.structure(tree), named.values())

  def _of(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
    where = next((where for pattern, where in self._rules if pattern.search(name)), LARGEST)
    if self._options.fsdp == 1 or where == WHOLE:
      return self.whole
    if where == LARGEST:
      return self._largest(shape)
    if where not in self._fits(shape):
      raise UsageError(f"train.sharding: axis {where} of {name} {list(shape)} is not there or no multiple of"
                       f" train.fsdp={self._options.fsdp}; use another axis, {LARGEST} or {WHOLE}")
    return self._along(where)

  def _largest(self, shape: tuple[int, ...]) -> NamedSharding:
    fits = self._fits(shape)
    if self._options.fsdp == 1 or not fits or math.prod(shape) < self._options.min_size:
      return self.whole
    return self._along(max(fits, key=lambda axis: (shape[axis], axis)))

  def _fits(self, shape: tuple[int, ...]) -> list[int]:
    return [axis for axis, size in enumerate(shape) if size and size % self._options.fsdp == 0]

  def _along(self, axis: int) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXES[1]))

  def optimizer(self, opt, params):
    """Shardings of an optimizer's state: what mirrors a parameter lies as that does, the rest by its largest axis."""
    own, shapes = flatten(self.params(params)), {name: leaf.shape for name, leaf in flatten(params).items()}

    def of(name, leaf):
      folders = name.split("/")
      for start in range(1, len(folders)):
        tail = "/".join(folders[start:])
        if shapes.get(tail) == leaf.shape:
          return own[tail]
      return self._largest(leaf.shape)

    return jax.tree.unflatten(jax.tree.structure(opt), [of(name, leaf) for name, leaf in flatten(opt).items()])

  def state(self, state: TrainState) -> TrainState:
    """Shardings of all of a training state."""
    return TrainState(
        self.whole, {name: self.params(p) for name, p in state.params.items()},
        {name: self.optimizer(opt, state.params[name]) for name, opt in state.opt.items()},
        {name: self.params(p) for name, p in state.ema.items()}, self.dist(state.dist), self.whole)

  def networks(self, networks: Networks) -> Networks:
    """Shardings of all that a step reads."""
    params, ema, teacher = networks
    return Networks(*({name: self.params(p) for name, p in trees.items()} for trees in (params, ema)),
                    self.params(teacher))

  def dist(self, dist):
    """Shardings of a state distribution's state: by example."""
    return jax.tree.map(lambda v: self.split if v.ndim else self.whole, dist)

  def on_devices(self, learn, due, networks: Networks, dist, batch, step, root):
    """`Layout.on_devices`: networks are gathered once each, gradients summed to the place of their parameters.

    Said device by device: left to choose, the compiler sums whole gradients everywhere where the mesh has both axes.
    """
    shardings, examples = self.networks(networks), self.dist(dist)

    def here(networks, *arguments):
      grads, losses, dist = learn(due, jax.tree.map(_gathered, networks, shardings), *arguments)
      scattered = {name: jax.tree.map(_mean_in_place, tree, shardings.params[name]) for name, tree in grads.items()}
      return scattered, losses, dist

    spec, whole = lambda tree: jax.tree.map(lambda sharding: sharding.spec, tree), PartitionSpec()  # noqa: E731
    mapped = jax.shard_map(
        here, mesh=self.mesh, in_specs=(spec(shardings), spec(examples), PartitionSpec(AXES), whole, whole),
        out_specs=({name: spec(shardings.params[name]) for name in due}, whole, spec(examples)), check_vma=False)
    return mapped(networks, dist, batch, step, root)


def _axis(sharding: NamedSharding) -> int | None:
  """That which is split over `fsdp`."""
  return next((axis for axis, name in enumerate(sharding.spec) if name == AXES[1]), None)


def _gathered(part, sharding):
  axis = _axis(sharding)
  return part if axis is None else jax.lax.all_gather(part, AXES[1], axis=axis, tiled=True)


def _mean_in_place(gradient, sharding):
  axis = _axis(sharding)
  if axis is None:
    return jax.lax.pmean(gradient, AXES)
  part = jax.lax.psum_scatter(gradient, AXES[1], scatter_dimension=axis, tiled=True)
  return jax.lax.psum(part, AXES[0]) / sharding.mesh.size


def _rule(text: str) -> tuple[re.Pattern, str | int]:
  """A compiled rule of `Options.rules`. Raises UsageError."""
  pattern, _, where = text.rpartition("=")
  try:
    compiled = re.compile(pattern)
  except re.error as error:
    raise UsageError(f"train.sharding: {text!r}: {error}") from None
  if not pattern or where not in (LARGEST, WHOLE) and not where.isdecimal():
    raise UsageError(f"train.sharding: {text!r} must be REGEX=AXIS with a number, {LARGEST} or {WHOLE} for AXIS,"
                     " such as 'film/kernel=1'")
  return compiled, int(where) if where.isdecimal() else where


def _eagerly(make_state, key, teacher, batch):
  return make_state(key, teacher, jax.tree.map(jnp.asarray, batch))


def _single(make_step, devices, layout, summary) -> Runner:
  put = lambda tree: jax.device_put(tree, devices[0])  # noqa: E731
  step = jax.jit(make_step(layout), donate_argnums=0, static_argnums=4)
  places = _Places(devices, Options())
  return Runner(shapes=jax.eval_shape, create=lambda *arguments: put(_eagerly(*arguments)),
                place=put, fetch=lambda s: s, place_frozen=put, place_batch=put,
                step=step, lay=functools.partial(_lay, places), lower=functools.partial(_lower, step, places),
                num_devices=1, summary=summary)


def _at(tree, shardings):
  return jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), tree, shardings)


def _lay(places, make_state, teacher, batch):
  state = jax.eval_shape(make_state, jax.eval_shape(jax.random.key, 0), teacher, batch)
  return {"state": _at(state, places.state(state)), "frozen": {"teacher": _at(teacher, places.params(teacher))},
          "batch": _at(batch, jax.tree.map(lambda _: places.split, batch))}


def _lower(step, places, given, due):
  return step.lower(*given.values(), _at(jax.eval_shape(jax.random.key, 0), places.whole), due)


def _mesh(make_step, devices, layout, options, summary) -> Runner:
  places = _Places(devices, options)
  train_step = make_step(layout._replace(axis_name=AXES, on_devices=places.on_devices))

  def step(state, frozen, batch, key, due):
    state, metrics = train_step(state, frozen, batch, key, due)
    # Said here, since the compiler is free to choose for the results of a program.
    return jax.lax.with_sharding_constraint((state, metrics), (places.state(state), places.whole))

  def place_batch(batch):
    if jax.process_count() == 1:
      return jax.device_put(batch, places.split)
    return {name: jax.make_array_from_process_local_data(places.split, v) for name, v in batch.items()}

  def shapes(make_state, key, teacher, batch):
    found = jax.eval_shape(make_state, key, teacher, place_batch(batch))
    return jax.tree.map(lambda v, sharding: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding),
                        found, places.state(found))

  def create(make_state, key, teacher, batch):
    out = jax.tree.map(lambda leaf: leaf.sharding, shapes(make_state, key, teacher, batch))
    # Unoptimised, as in `models/base.py`: it runs once. No device ever holds all of the state.
    make = jax.jit(make_state, out_shardings=out, compiler_options={"xla_backend_optimization_level": 0})
    return make(_put(key, places.whole), put_params(teacher), place_batch(batch))

  def put_params(tree):
    return _put(tree, places.params(tree))

  jitted = jax.jit(step, donate_argnums=0, static_argnums=4)
  return Runner(
      shapes=shapes, create=create, place=lambda state: _put(state, places.state(state)), fetch=lambda state: state,
      place_frozen=lambda frozen: {name: put_params(tree) for name, tree in frozen.items()}, place_batch=place_batch,
      step=jitted, lay=functools.partial(_lay, places), lower=functools.partial(_lower, jitted, places),
      num_devices=len(devices), summary=summary)


def _put(tree, shardings):
  """What every process has whole, or what is global already, to its place."""
  def put(leaf, sharding):
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return jax.device_put(leaf, sharding)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)
  return jax.tree.map(put, tree, jax.tree.broadcast(shardings, tree))


def _pmap(make_step, devices, layout, summary) -> Runner:
  count = len(devices)
  # Placed as the step's results are: a first call with arrays elsewhere would be compiled apart.
  mapped = NamedSharding(Mesh(np.array(devices), AXES[:1]), PartitionSpec(AXES[0]))
  put = lambda v: jax.device_put(v, mapped)  # noqa: E731
  spread = lambda v: put(v.reshape((count, v.shape[0] // count) + v.shape[1:]))  # noqa: E731
  repeat = lambda v: put(jnp.broadcast_to(v, (count,) + v.shape))  # noqa: E731

  def place(state: TrainState):
    whole = jax.tree.map(repeat, state._replace(dist=()))
    return whole._replace(dist=jax.tree.map(lambda v: spread(v) if v.ndim else repeat(v), state.dist))

  def fetch(state) -> TrainState:
    whole = jax.tree.map(lambda v: v[0], state._replace(dist=()))
    join = lambda v: v.reshape((-1,) + v.shape[2:]) if v.ndim > 1 else v[0]  # noqa: E731
    return whole._replace(dist=jax.tree.map(join, state.dist))

  def learned(learn, *arguments):
    grads, *rest = learn(*arguments)
    return jax.lax.pmean(grads, AXES[0]), *rest

  train_step = make_step(layout._replace(axis_name=AXES[0], on_devices=learned))
  step = jax.pmap(train_step, AXES[0], in_axes=(0, 0, 0, None), devices=devices, donate_argnums=0,
                  static_broadcasted_argnums=4)

  def run(state, frozen, batch, key, due):
    state, metrics = step(state, frozen, batch, key, due)
    return state, jax.tree.map(lambda v: v[0], metrics)

  return Runner(shapes=jax.eval_shape, create=lambda *arguments: place(_eagerly(*arguments)), place=place, fetch=fetch,
                place_frozen=lambda tree: jax.tree.map(repeat, tree),
                place_batch=lambda batch: jax.tree.map(lambda v: spread(jnp.asarray(v)), batch), step=run,
                lay=None, lower=None, num_devices=count, summary=summary)
