"""What every measurement asks of its arrays: rows enough, finite, alike."""

import numpy as np

from ddil_jax.errors import UsageError


def finite(x, name: str) -> np.ndarray:
  """The array, if all its numbers are finite; else UsageError with the first bad row."""
  x = np.asarray(x)
  if not np.issubdtype(x.dtype, np.number):
    raise UsageError(f"{name} has dtype {x.dtype}; expected numbers")
  good = np.isfinite(x)
  if not good.all():
    rows = ~good.reshape(len(x), -1).all(axis=1)
    raise UsageError(f"{name} has non-finite numbers in {int(rows.sum())} of {len(x)} rows, "
                     f"first row {int(rows.argmax())}; expected finite values")
  return x


def rows(x, name: str, least: int = 1, dtype=np.float64) -> np.ndarray:
  """Samples flattened to [N, D] of the dtype (None: as they are); N >= least and all finite, else UsageError."""
  x = np.asarray(x)
  if x.ndim < 2:
    raise UsageError(f"{name} has shape {x.shape}; expected [N, ...] with at least two axes")
  if len(x) < least:
    raise UsageError(f"{name} has {len(x)} samples; at least {least} are needed")
  x = finite(x, name).reshape(len(x), -1)
  return x if dtype is None else x.astype(dtype)


def row_pair(a, b, names: tuple[str, str], least: int = 1, dtype=np.float64) -> tuple[np.ndarray, np.ndarray]:
  """Two sets of samples of one shape as [N, D] and [M, D]; see `rows`."""
  a, b = np.asarray(a), np.asarray(b)
  if a.shape[1:] != b.shape[1:]:
    raise UsageError(f"{names[0]} and {names[1]} are unlike: "
                     f"samples of shape {a.shape[1:]} and {b.shape[1:]}")
  return rows(a, names[0], least, dtype), rows(b, names[1], least, dtype)


def images(x, name: str, shape: tuple[int, int, int] | None = None) -> np.ndarray:
  """Finite float images [N,H,W,C], of the given [H,W,C] if one is given."""
  x = np.asarray(x)
  if x.ndim != 4:
    raise UsageError(f"{name} has shape {x.shape}; expected [N,H,W,C]")
  if not len(x):
    raise UsageError(f"{name} is empty; at least one image is needed")
  if shape is not None and x.shape[1:] != tuple(shape):
    raise UsageError(f"{name} has images of shape {x.shape[1:]}; expected {tuple(shape)}")
  if not np.issubdtype(x.dtype, np.floating):
    raise UsageError(f"{name} has dtype {x.dtype}; expected floats in [-1, 1]")
  return finite(x, name)


def class_labels(x, num: int, num_classes: int, name: str = "labels") -> np.ndarray:
  """Integer labels [num] in 0..num_classes-1."""
  x = np.asarray(x)
  if x.shape != (num,) or not np.issubdtype(x.dtype, np.integer):
    raise UsageError(f"{name} has shape {x.shape} and dtype {x.dtype}; expected {num} integers")
  if num and (x.min() < 0 or x.max() >= num_classes):
    raise UsageError(f"{name} lie in {x.min()}..{x.max()}; expected 0..{num_classes - 1}")
  return x
