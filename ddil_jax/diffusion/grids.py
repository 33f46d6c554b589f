"""Decreasing time grids: numpy [N+1], whose last entry is the clean end.

A grid of N steps has N times at which a network is called and the end (`process.t_clean`, or any
time below it). Grids of discrete processes count steps 0..T-1 and end at -1.
"""

import numpy as np

from ddil_jax.diffusion.process import Process
from ddil_jax.errors import UsageError

SPACINGS = ("leading", "linspace", "trailing")


def _check_steps(n: int, most: int | None = None) -> None:
  if n < 1:
    raise UsageError(f"time grid: {n} steps; it takes at least 1")
  if most is not None and n > most:
    raise UsageError(f"time grid: {n} steps of a process that has {most}")


def check_grid(grid: np.ndarray) -> np.ndarray:
  """Returns the grid as float64 [N+1]. Raises UsageError unless it is decreasing with N >= 1."""
  grid = np.asarray(grid, np.float64)
  if grid.ndim != 1 or len(grid) < 2:
    raise UsageError(f"time grid of shape {grid.shape}: it takes at least 1 step, so 2 times")
  bad = np.flatnonzero(~(np.diff(grid) < 0))
  if bad.size:
    i = int(bad[0])
    raise UsageError(f"grid not decreasing at index {i + 1}: {grid[i]:g} is followed by {grid[i + 1]:g}")
  return grid


def _with_end(times: np.ndarray) -> np.ndarray:
  return check_grid(np.append(np.asarray(times, np.float64), -1))


def uniform(n: int, process: Process) -> np.ndarray:
  """`t_i = t_clean + (t_max - t_clean) (N - i) / N`.

  On the 1000-step table this is DDIM's "trailing" spacing where N divides 1000.
  """
  _check_steps(n)
  end = process.t_clean if np.isfinite(process.t_clean) else -1.0
  return check_grid(end + (process.t_max - end) * np.arange(n, -1, -1) / n)


def ddim_timesteps(n: int, spacing: str = "trailing", steps_offset: int = 0, num_train_timesteps: int = 1000,
                   keep_surplus: bool = False) -> np.ndarray:
  """The n timesteps of a DDIM sampler, int64, decreasing (arXiv 2305.08891, table 2).

  Args:
    spacing: "leading" `(T // n) i + offset`, "trailing" `round(T - i T / n) - 1`, or "linspace"
      `round(i (T - 1) / (n - 1))`; the offset acts on "leading" only.
    keep_surplus: diffusers' "trailing" has for some n (61, 103, ...) one timestep more, -1, by a
      rounding; keep it.
  """
  _check_steps(n, num_train_timesteps)
  i = np.arange(n)
  if spacing == "leading":
    times = i[::-1] * (num_train_timesteps // n) + steps_offset
  elif spacing == "trailing":
    # By repeated subtraction of a rounded T / n, as np.arange does: it decides how halves round.
    times = np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / n)) - 1
    times = times if keep_surplus else times[:n]
  elif spacing == "linspace":
    times = np.round(np.linspace(0, num_train_timesteps - 1, n))[::-1]
  else:
    raise UsageError(f"unknown spacing '{spacing}'; there are: {', '.join(SPACINGS)}")
  return times.astype(np.int64)


def ddim(n: int, spacing: str = "trailing", steps_offset: int = 0,
         num_train_timesteps: int = 1000) -> np.ndarray:
  """The grid of `ddim_timesteps`."""
  return _with_end(ddim_timesteps(n, spacing, steps_offset, num_train_timesteps))


def ddim_previous(timesteps: np.ndarray, n: int, num_train_timesteps: int = 1000) -> np.ndarray:
  """Where diffusers' n-step DDIM lands from each timestep: `t - T // n`, not the next timestep.

  The two differ where n does not divide T (trailing) and for "linspace". Negative means the end.
  """
  return np.asarray(timesteps) - num_train_timesteps // n


def lcm_training_timesteps(n: int = 50, num_train_timesteps: int = 1000) -> np.ndarray:
  """The ascending solver times of consistency distillation, `(i + 1) T // n - 1` (arXiv 2310.04378)."""
  _check_steps(n, num_train_timesteps)
  return np.arange(1, n + 1) * (num_train_timesteps // n) - 1


def lcm_training_previous(timesteps: np.ndarray, num_train_timesteps: int = 1000) -> np.ndarray:
  """Where the solver lands from `lcm_training_timesteps`: the one below, and step 0 from the first."""
  return np.maximum(timesteps - num_train_timesteps // len(timesteps), 0)


def lcm_timesteps(n: int, original_steps: int = 50, num_train_timesteps: int = 1000,
                  strength: float = 1.0) -> np.ndarray:
  """The n timesteps of an LCM sampler: evenly spread indices into its training times, int64.

  Args:
    strength: share of the noise range that is used, for image-to-image.
  """
  skip = num_train_timesteps // original_steps
  times = (np.arange(1, int(original_steps * strength) + 1) * skip - 1)[::-1]
  _check_steps(n, len(times))
  return times[np.floor(np.linspace(0, len(times), n, endpoint=False)).astype(np.int64)]


def lcm(n: int, original_steps: int = 50, num_train_timesteps: int = 1000,
        strength: float = 1.0) -> np.ndarray:
  """The grid of `lcm_timesteps`."""
  return _with_end(lcm_timesteps(n, original_steps, num_train_timesteps, strength))


def dmd2_timesteps(n: int, num_train_timesteps: int = 1000) -> np.ndarray:
  """DMD2's denoising steps `T-1, T-1 - T//n, ... > 0` (arXiv 2405.14867); n + 1 of them for some odd n."""
  _check_steps(n, num_train_timesteps)
  return np.arange(num_train_timesteps - 1, 0, -(num_train_timesteps // n))


def dmd2(n: int, num_train_timesteps: int = 1000) -> np.ndarray:
  """The grid of the first n of `dmd2_timesteps`."""
  return _with_end(dmd2_timesteps(n, num_train_timesteps)[:n])


def karras_levels(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> np.ndarray:
  """n noise levels, evenly spaced in sigma^(1/rho), from sigma_max to sigma_min (arXiv 2206.00364, eq. 5)."""
  _check_steps(n)
  if not (0 < sigma_min < sigma_max or 0 < sigma_min == sigma_max and n == 1):
    raise UsageError(f"karras grid: needs 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")
  top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
  return (top + np.linspace(0, 1, n) * (bottom - top)) ** rho


def karras(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0,
           clean_end: bool = True) -> np.ndarray:
  """`karras_levels` as a grid.

  Args:
    clean_end: n levels and then 0; else n + 1 levels, the last sigma_min, as progressive
      distillation on this grid has it (arXiv 2303.01469).
  """
  if clean_end:
    return check_grid(np.append(karras_levels(n, sigma_min, sigma_max, rho), 0))
  _check_steps(n)
  return check_grid(karras_levels(n + 1, sigma_min, sigma_max, rho))


def discrete_levels(alphas_cumprod: np.ndarray, n: int, spacing: str = "linspace", steps_offset: int = 0,
                    levels: str = "interpolated", rho: float = 7.0) -> tuple[np.ndarray, np.ndarray]:
  """Noise levels sigma / alpha of a discrete table for samplers in that unit (Euler, DPM-Solver).

  Args:
    alphas_cumprod: [T].
    spacing: of the timesteps, see `ddim_timesteps`; "linspace" is not rounded.
    levels: "interpolated" at the timesteps; "karras" or "exponential" (even in the logarithm)
      between the first and the last of them, with timesteps read off the levels.

  Returns:
    timesteps float64 [n], levels float64 [n+1] ending at 0.
  """
  table = np.asarray(alphas_cumprod, np.float64)
  all_levels, steps = np.sqrt((1 - table) / table), np.arange(len(table))
  if spacing == "linspace":
    _check_steps(n, len(table))
    times = np.linspace(0, len(table) - 1, n)[::-1]
  else:
    times = ddim_timesteps(n, spacing, steps_offset, len(table)).astype(np.float64)
  sigmas = np.interp(times, steps, all_levels)
  if levels == "karras":
    sigmas = karras_levels(n, sigmas[-1], sigmas[0], rho)
  elif levels == "exponential":
    sigmas = np.exp(np.linspace(np.log(sigmas[0]), np.log(sigmas[-1]), n))
  elif levels != "interpolated":
    raise UsageError(f"unknown levels '{levels}'; there are: exponential, interpolated, karras")
  if levels != "interpolated":
    times = np.interp(np.log(sigmas), np.log(all_levels), steps)
  return times, check_grid(np.append(sigmas, 0))


# name -> (n, process, **options) -> grid, for configs.
GRIDS = {
    "uniform": uniform,
    "ddim": lambda n, process, **options: ddim(n, num_train_timesteps=_num_train(process), **options),
    "lcm": lambda n, process, **options: lcm(n, num_train_timesteps=_num_train(process), **options),
    "dmd2": lambda n, process, **options: dmd2(n, num_train_timesteps=_num_train(process), **options),
    "karras": lambda n, process, **options: _karras_of(n, process, **options),
}


def _num_train(process: Process) -> int:
  if process.t_max != int(process.t_max) or process.t_max < 2:
    raise UsageError(f"grids 'ddim', 'dmd2' and 'lcm' count discrete steps, but process '{process.name}' "
                     f"has t in [0, {process.t_max:g}]; use 'uniform'")
  return int(process.t_max) + 1


def _karras_of(n: int, process: Process, rho: float = 7.0, clean_end: bool = True) -> np.ndarray:
  if process.name != "edm":
    raise UsageError(f"grid 'karras' is in noise levels of process 'edm', not of '{process.name}'; "
                     "use 'uniform'")
  return karras(n, process.t_min, process.t_max, rho, clean_end)


def make(name: str, n: int, process: Process, **options) -> np.ndarray:
  """The grid of a process by name, float64 [n+1]. Raises UsageError with the names that exist."""
  if name not in GRIDS:
    raise UsageError(f"unknown time grid '{name}'; there are: {', '.join(sorted(GRIDS))}")
  return GRIDS[name](n, process, **options)
