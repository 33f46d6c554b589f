"""Where arrays live. The only module that names Mesh or pmap.

One step function for all modes: "single" (jit on one device), "mesh" (jit over a mesh, arrays are
global, the compiler inserts the collectives), "pmap" (one program per device; the step averages
over its axis). The batch and the replay buffers are split along axis 0; everything else is
replicated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddil_jax.errors import UsageError
from ddil_jax.registry import unknown
from ddil_jax.training.step import TrainState
from ddil_jax.types import Devices

MODES = ("single", "mesh", "pmap")
AXIS = "data"


class Runner(NamedTuple):
  """How a step runs.

  Attributes:
    place, fetch: a TrainState in the plain layout (as on one device) to and from the devices.
    place_frozen, place_batch: the same for the frozen parameters and a host batch.
    step: (state, frozen, batch, key, due) -> (state, metrics); the state is donated.
    num_devices: over how many devices the batch is split.
  """
  place: Callable[[TrainState], Any]
  fetch: Callable[[Any], TrainState]
  place_frozen: Callable[[Any], Any]
  place_batch: Callable[[dict], dict]
  step: Callable
  num_devices: int


def make_runner(mode: str, make_step: Callable[[str | None], Callable], batch_size: int,
                devices: list | None = None) -> Runner:
  """A runner of `make_step(axis_name)`.

  Raises:
    UsageError: unknown mode, or a batch that the devices cannot share evenly.
  """
  devices = _of_mode(mode, devices)
  if batch_size % len(devices):
    raise UsageError(f"batch_size {batch_size} must be a multiple of the {len(devices)} devices")
  return {"single": _single, "mesh": _mesh, "pmap": _pmap}[mode](make_step, devices)


def _of_mode(mode, devices):
  if mode not in MODES:
    raise UsageError(unknown("parallel mode", mode, MODES))
  devices = list(devices or jax.devices())
  return devices[:1] if mode == "single" else devices


def spread(mode: str, devices: list | None = None) -> Devices:
  """The devices of a mode for work without a TrainState: one, or a mesh of all of them.

  Raises:
    UsageError: unknown mode.
  """
  devices = _of_mode(mode, devices)
  split, whole = _layouts(devices)
  return Devices(len(devices), lambda tree: jax.device_put(tree, split), lambda tree: jax.device_put(tree, whole))


def _layouts(devices) -> tuple[NamedSharding, NamedSharding]:
  """Split along axis 0, and a copy on every device."""
  mesh = Mesh(np.array(devices), (AXIS,))
  return NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())


def _single(make_step, devices) -> Runner:
  put = lambda tree: jax.device_put(tree, devices[0])  # noqa: E731
  return Runner(put, lambda s: s, put, put, jax.jit(make_step(None), donate_argnums=0, static_argnums=4), 1)


def _mesh(make_step, devices) -> Runner:
  split, whole = _layouts(devices)

  def shardings(state: TrainState) -> TrainState:
    replicated = jax.tree.map(lambda _: whole, state)
    return replicated._replace(dist=jax.tree.map(lambda v: split if jnp.ndim(v) else whole, state.dist))

  return Runner(
      place=lambda state: jax.device_put(state, shardings(state)),
      fetch=lambda state: state,
      place_frozen=lambda tree: jax.device_put(tree, whole),
      place_batch=lambda batch: jax.device_put(batch, split),
      step=jax.jit(make_step(None), donate_argnums=0, static_argnums=4), num_devices=len(devices))


def _pmap(make_step, devices) -> Runner:
  count = len(devices)
  spread = lambda v: v.reshape((count, v.shape[0] // count) + v.shape[1:])  # noqa: E731
  repeat = lambda v: jnp.broadcast_to(v, (count,) + v.shape)  # noqa: E731

  def place(state: TrainState):
    whole = jax.tree.map(repeat, state._replace(dist=()))
    return whole._replace(dist=jax.tree.map(lambda v: spread(v) if v.ndim else repeat(v), state.dist))

  def fetch(state) -> TrainState:
    whole = jax.tree.map(lambda v: v[0], state._replace(dist=()))
    join = lambda v: v.reshape((-1,) + v.shape[2:]) if v.ndim > 1 else v[0]  # noqa: E731
    return whole._replace(dist=jax.tree.map(join, state.dist))

  step = jax.pmap(make_step(AXIS), AXIS, in_axes=(0, 0, 0, None), devices=devices, donate_argnums=0,
                  static_broadcasted_argnums=4)

  def run(state, frozen, batch, key, due):
    state, metrics = step(state, frozen, batch, key, due)
    return state, jax.tree.map(lambda v: v[0], metrics)

  return Runner(place, fetch, lambda tree: jax.tree.map(repeat, tree),
                lambda batch: jax.tree.map(lambda v: spread(jnp.asarray(v)), batch), run, count)
