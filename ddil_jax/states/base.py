"""Where training states come from: the types.

A *source* makes states: `fresh(ctx)` one state per example; `path(ctx)` all states that one
rollout visits, [B,K,...], for a replay buffer. A *distribution* chooses among sources and may keep
state (the buffers): `init(ctx) -> dist_state`, `sample(dist_state, ctx) -> (States, dist_state)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ddil_jax.types import DATA_COND, Array, Cond, Params

SOURCES = ("forward", "student", "teacher", "dagger", "pairs")
WITH_X0 = ("forward", "pairs")


class States(NamedTuple):
  """Training states: x_t [B,H,W,C] at time t [B], index k int32 [B] of the objective's grid.

  `source` int32 [B] indexes SOURCES. `x0` [B,H,W,C] is the clean image of forward states, and of
  teacher pairs the image to which the teacher's flow carries their noise (WITH_X0); on rollout
  states it is the batch's image, of which x_t knows nothing: no loss may use it there. Their `path`
  has none (None).
  """
  x_t: Array
  t: Array
  k: Array
  cond: Cond
  source: Array
  x0: Array


class Context(NamedTuple):
  """What a source may use: all of it pure values.

  Attributes:
    step: int32, the training step.
    key: the step's key, the same on every device.
    keys: [B], the step's keys, one per example.
    batch: "image" [B,H,W,C] in the data's range, "label" int32 [B], "lane" int32 [B].
    student: parameters with which the student acts (raw or EMA).
    teacher: the frozen parameters.
    batch_size: examples over all devices.
  """
  step: Array
  key: Array
  keys: Array
  batch: dict[str, Array]
  student: Params
  teacher: Params
  batch_size: int


class Source(NamedTuple):
  """A source of states; `path` is None where states are not visited by a rollout."""
  name: str
  fresh: Callable[[Context], States]
  path: Callable[[Context], States] | None


class StateDistribution(NamedTuple):
  """Draws a batch of training states; `sources` are the names it can return."""
  sources: tuple[str, ...]
  init: Callable[[Context], Any]
  sample: Callable[[Any, Context], tuple[States, Any]]


def cond_of(batch: dict[str, Array]) -> Cond:
  """The conditioning entries of a batch."""
  return {name: batch[name] for name in DATA_COND if name in batch}
