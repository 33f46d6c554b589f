"""The peak memory that `ddil plan` predicts beside the one that is measured, on virtual CPU devices.

Measured is by how much the process grows: its peak resident set (VmHWM) in three steps, above what it was before there
were arrays. In a process of its own: `python -m launch.bench.memory rows.json`.
"""

import contextlib
import ctypes
import gc
import json
import pathlib
import statistics
import sys
import tempfile

import jax

from ddil_jax import build as build_lib
from ddil_jax import config as config_lib
from ddil_jax import plan as plan_lib
from ddil_jax.data.dataset import Dataset
from ddil_jax.training import compiling
from launch.bench.growth import compiled_step
from launch.bench.measure import Size, in_a_process, row

TARGET, DEVICES = 1.1, 4
WIDE = {"data.image_size": "8", "model.channels": "96", "train.batch_size": "8", "states.capacity": "256"}
# What most of the memory is; config, fields, devices.
CASES = (
    ("parameters", "lcm.py:ddil", WIDE, 1),
    ("parameters, fsdp 4", "lcm.py:ddil", WIDE | {"train.fsdp": "4"}, 4),
    ("activations", "teacher.py", {"data.image_size": "32", "model.channels": "32", "train.batch_size": "64"}, 1),
)


def _status(field: str) -> int:
  """Bytes of a field of /proc/self/status."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _three_steps(step, count: int) -> float:
  """Bytes by which this process grows for the step's arguments and three runs of it, by device."""
  gc.collect()
  with contextlib.suppress(OSError, AttributeError):  # what is left free would be taken first, unseen
    ctypes.CDLL("libc.so.6").malloc_trim(0)
  before = _status("VmRSS")
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
  state, frozen, batch, key = step.arguments()
  for _ in range(3):
    state, metrics = step.run(state, frozen, batch, key)
    jax.block_until_ready((state, metrics))
  return (_status("VmHWM") - before) / count


def measured_peaks(step, count: int, repeats: int) -> list[float]:
  """Bytes of a device, of each measurement but the first, which pays for threads and code pages too."""
  return [_three_steps(step, count) for _ in range(1 + repeats)][1:]


def measure(size: Size) -> list[dict]:
  """The rows, in this process."""
  rows = []
  assert len(jax.devices()) == DEVICES  # before a plan asks for as many as it needs
  with tempfile.TemporaryDirectory() as folder:
    compiling.keep_programs(folder)  # the step is compiled once, for the plan
    for name, method, fields, count in CASES[:1] if size.smoke else CASES:
      config = config_lib.load(f"configs/digits_{method}", {"data.name": "fake"} | fields)
      dataset = build_lib.load_data(config, "train")
      predicted = plan_lib.plan(config, f"cpu:{count}", say=lambda said: None).peak
      measured = measured_peaks(compiled_step(config, dataset, count), count, size.repeats)
      about = {"predicted_mib": round(predicted / 2**20, 1),
               "measured_mib": round(statistics.median(measured) / 2**20, 1)}
      rows.append(row(f"ddil plan: peak measured / predicted, most of it {name}", "ratio",
                      [value / predicted for value in measured], TARGET, "within", devices=count, **about))
  return rows


def memory(dataset: Dataset, network, size: Size) -> list[dict]:
  """The peak of a step of LCM+DDIL and of denoising, predicted and measured."""
  del dataset, network
  return in_a_process("launch.bench.memory", size, f"--xla_force_host_platform_device_count={DEVICES}",
                      NPROC=str(2 * DEVICES))  # see launch/local.py::environment


if __name__ == "__main__":
  from launch.bench.measure import SMOKE
  pathlib.Path(sys.argv[1]).write_text(json.dumps(measure(SMOKE if "--smoke" in sys.argv else Size())))
