"""Golden vectors: files of inputs and of what the original implementations computed from them.

A file holds `in/<name>`, `net/<role>/<parameter>`, `out/<name>` and `meta` (JSON). A case runner
computes every out array through the project's public functions and hands it to `check`, or gives
with `leave` the reason why it does not.
"""

import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np

HERE = pathlib.Path(__file__).parent
SAMPLE = HERE / "sample"

# float32: ten times what the original's own float32 run loses, at least a few roundings (32 ulps).
FLOAT32_FACTOR = 10.0
FLOAT32_FLOOR = 4e-6
# Tables that the originals computed in float32 are such also in the float64 runs.
TABLE_FLOOR = 1e-6


def folder() -> pathlib.Path:
  """DDIL_ORACLE_DIR, by default ../shared/oracle beside the repository; the committed sample where that is absent."""
  wanted = wanted_folder()
  return wanted if wanted.is_dir() else SAMPLE


def wanted_folder() -> pathlib.Path:
  """Where the golden vectors are looked for first."""
  return pathlib.Path(os.environ.get("DDIL_ORACLE_DIR") or HERE.parents[2] / "shared" / "oracle")


class Case:
  """One file in one floating-point type; collects what was compared and what failed."""

  def __init__(self, path: pathlib.Path, dtype):
    self.name, self.dtype = path.stem, jnp.dtype(dtype)
    with np.load(path, allow_pickle=False) as data:
      self._arrays = {key: data[key] for key in data.files if key != "meta"}
      self.meta = json.loads(str(data["meta"]))
    self.hyper = self.meta["hyper"]
    self.outs = {key.removeprefix("out/") for key in self._arrays if key.startswith("out/")}
    self.seen: set[str] = set()
    self.failures: list[str] = []

  @property
  def tight(self) -> bool:
    """Whether this is the float64 run."""
    return self.dtype == jnp.float64

  def _cast(self, array: np.ndarray):
    return jnp.asarray(array, self.dtype) if array.dtype.kind == "f" else jnp.asarray(array)

  def __contains__(self, name: str) -> bool:
    return f"in/{name}" in self._arrays

  def __getitem__(self, name: str):
    """The input `in/<name>`, floats in the type of the run."""
    return self._cast(self._arrays[f"in/{name}"])

  def table(self, name: str) -> np.ndarray:
    """The input as numpy float64: a schedule, which is data rather than a computed value."""
    return np.asarray(self._arrays[f"in/{name}"], np.float64)

  def net(self, role: str) -> dict:
    """Parameters of a network."""
    prefix = f"net/{role}/"
    return {key.removeprefix(prefix): self._cast(value) for key, value in self._arrays.items()
            if key.startswith(prefix)}

  def expected(self, name: str):
    """The stored output, cast; as input of a step that is tested on its own."""
    return self._cast(self._arrays[f"out/{name}"])

  def raw(self, name: str) -> np.ndarray:
    """The stored output as it is: what describes the case rather than a result."""
    return self._arrays[f"out/{name}"]

  def full(self, value: float, like):
    """[B] of one value."""
    return jnp.full(like.shape[:1], value, self.dtype)

  def leave(self, name: str, reason: str) -> None:
    """Accounts for an output that is not compared. The reason is part of the case."""
    assert reason
    self.seen.add(name)

  def figure(self, name: str) -> float:
    """What the original's float32 run loses on an output: its own entry or that of its group."""
    figures = self.meta.get("f32_vs_f64_scaled_max_err", {})
    while name and name not in figures:
      name = name.rpartition("/")[0]
    return float(figures.get(name, 0.0))

  def check_table(self, name: str, value: np.ndarray) -> None:
    """Compares a schedule, which the original computed in float32 in both runs."""
    allowed = max(TABLE_FLOOR, FLOAT32_FACTOR * self.figure(name))
    self.check(name, np.asarray(value, np.float64), allowed, allowed)

  def check(self, name: str, value, tight: float = 1e-9, loose: float | None = None, at_least: float = 0.0,
            mean_of: str | None = None, rounding: float = FLOAT32_FLOOR) -> None:
    """Compares with `out/<name>`; integers exactly.

    Args:
      tight: allowed scaled error in float64.
      loose: allowed scaled error in float32, default ten times the file's own figure.
      at_least: the scale is max|expected| or this: for quantities that may happen to be all near 0.
      mean_of: the output whose mean this is. The original's errors may happen to cancel in it, so the
        larger of the two figures counts.
      rounding: what float32 may lose at least, where an x0 estimate rounds more than what the original computed.
    """
    assert name in self.outs, f"{self.name} has no out/{name}"
    assert name not in self.seen, f"out/{name} is compared twice"
    self.seen.add(name)
    # Grids and tables are numpy and have one type in both runs.
    expected, is_table, value = self._arrays[f"out/{name}"], isinstance(value, np.ndarray), np.asarray(value)
    if value.shape != expected.shape:
      self.failures.append(f"out/{name}: shape {value.shape}, expected {expected.shape}")
    elif expected.dtype.kind not in "fc":
      if not np.array_equal(value, expected):
        self.failures.append(f"out/{name}: {value.ravel()[:8]}, expected {expected.ravel()[:8]}")
    else:
      figure = max(self.figure(name), self.figure(mean_of) if mean_of else 0.0)
      rounded = max(FLOAT32_FACTOR * figure, rounding) if loose is None else loose
      allowed = tight if self.tight else rounded
      if value.dtype != self.dtype and not is_table:
        self.failures.append(f"out/{name}: computed in {value.dtype} in the {self.dtype} run")
      error = scaled_error(value, expected, at_least)
      if not error <= allowed:
        self.failures.append(f"out/{name}: scaled error {error:.2e}, allowed {allowed:.2e}")

  def check_grads(self, prefix: str, grads: dict, tight: float = 1e-9, rounding: float = FLOAT32_FLOOR) -> None:
    """Compares `out/<prefix>/<parameter>` for every stored parameter."""
    for key in sorted(self.outs):
      if key.startswith(prefix + "/") and "/" not in key.removeprefix(prefix + "/"):
        self.check(key, grads[key.removeprefix(prefix + "/")], tight, rounding=rounding)

  def finish(self) -> list[str]:
    """All failures, unaccounted outputs included."""
    missed = [f"out/{name}: neither compared nor left out" for name in sorted(self.outs - self.seen)]
    return self.failures + missed


def scaled_error(value: np.ndarray, expected: np.ndarray, at_least: float = 0.0) -> float:
  """max|a - b| / max(max|b|, at_least); non-finite entries must coincide."""
  value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
  finite = np.isfinite(expected)
  if not np.array_equal(finite, np.isfinite(value)):
    return float("inf")
  gap = np.abs(value[finite] - expected[finite])
  if gap.size == 0 or gap.max() == 0:
    return 0.0
  size = max(np.abs(expected[finite]).max(), at_least)
  return float(gap.max() / size) if size else float("inf")
