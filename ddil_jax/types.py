"""The vocabulary of the project: plain arrays, pure functions, NamedTuples of functions.

Shapes: B examples, H x W pixels, C channels. Images are NHWC float32 in [-1, 1].
Times `t` are float32 [B] in the unit of the process (see `diffusion/process.py`).
A condition `cond` is a dict of arrays with leading axis B; `{}` is unconditional:

    "label":          int32 [B]    class index; the index `num_classes` is the null class
    "guidance_scale": float32 [B]  g of `u + g (c - u)`, for networks that read it
    "end_time":       float32 [B]  where the jump ends, in the unit of the process, for networks that
                                   read it (CTM, MeanFlow, TwinFlow); t itself is no jump
    "time_sign":      float32 [B]  +1 or -1, multiplies the network's time inputs (TwinFlow)
    "text":           float32 [B,L,D]  states of the prompt's tokens, for networks that read text
    "text_pooled":    float32 [B,D]    SDXL: the prompt in one vector
    "time_ids":       float32 [B,6]    SDXL: original size, crop, target size, height first

Keys `keys` are typed JAX keys of shape [B], one per example, so that a draw does
not depend on how the batch is laid out over devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

Array = jax.Array
Params = Any
Cond = dict[str, Array]

# The entries that come with the data; the others are added by methods and samplers.
DATA_COND = ("label", "text", "text_pooled", "time_ids")


class NetFn(Protocol):
  """A raw network: what it predicts is the business of `diffusion/prediction.py`.

  `t` is the *network's* time input (`process.time_input(t)`, about 0..1000).
  `keys` [B] switch dropout on; None is deterministic. With `features`, a tuple of
  names, it returns `(out, {name: array})`. Some networks also take features of an earlier call, by
  a last argument `reuse`: `models/unet.py`.
  """

  def __call__(self, params: Params, x: Array, t: Array, cond: Cond, keys: Array | None = None,
               features: tuple[str, ...] = ()) -> Any: ...


class Denoiser(Protocol):
  """A network seen as x0 estimator: `(params, x_t [B,H,W,C], t [B], cond) -> x0 [B,H,W,C]`."""

  def __call__(self, params: Params, x_t: Array, t: Array, cond: Cond, keys: Array | None = None,
               features: tuple[str, ...] = ()) -> Any: ...


class DenoiseFn(Protocol):
  """A denoiser with its parameters bound: `(x_t [B,H,W,C], t [B], cond) -> x0 [B,H,W,C]`."""

  def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array: ...


class Devices(NamedTuple):
  """Over which devices something without a TrainState is spread, an evaluation for instance.

  Attributes:
    count: of devices.
    split: tree of arrays [B, ...] -> the same, split along axis 0; B is a multiple of `count`.
    whole: tree of arrays -> the same with a copy on every device.
    fetch: array that was computed from those -> all of it on the host. Where the devices are those of several
      processes, each of them has to call what is here, with the same.
  """
  count: int
  split: Callable[[Any], Any]
  whole: Callable[[Any], Any]
  fetch: Callable[[Any], np.ndarray] = np.asarray

  def round_up(self, batch_size: int) -> int:
    """The smallest multiple of `count` that is at least `batch_size`."""
    return -(-batch_size // self.count) * self.count


ONE_DEVICE = Devices(1, jax.device_put, jax.device_put)
