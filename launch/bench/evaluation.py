"""What it takes to measure 50,000 images in files."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from ddil_jax.data.dataset import Dataset
from ddil_jax.files import read_json
from launch.bench.measure import Size, once

EVALUATION_SECONDS, EVALUATION_MIB = 600, 2048  # of 50,000 images 32x32 on two cores


def evaluation(dataset: Dataset, network, size: Size) -> list[dict]:
  """`ddil evaluate` of images against as many others, both in files, with all default metrics: wall time and peak
  memory of a process that has nothing cached, so that it trains the small classifier too."""
  del dataset, network
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    kinds = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3)).repeat(size.side // 4, 1).repeat(size.side // 4, 2)
    labels = np.arange(size.images) % 10
    for seed, name in enumerate(("images", "reference")):
      noise = np.random.default_rng([1, seed]).integers(0, 100, (size.images, size.side, size.side, 3), np.uint8)
      noise += (0.6 * kinds).astype(np.uint8)[labels]
      np.savez(folder / f"{name}.npz", images=noise, labels=labels)
    del noise
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ddil_jax", "evaluate", f"--images={folder}/images.npz",
                    f"--reference={folder}/reference.npz", f"--data_dir={folder}", f"--out={folder}/out.json"],
                   check=True, stdout=subprocess.DEVNULL, env=os.environ | {"DDIL_COMPILE_CACHE": "off"})
    seconds, result = time.perf_counter() - began, read_json(folder / "out.json")
  what = f"evaluation of {size.images:,} images {size.side}x{size.side}"
  return [once(what, "s", round(seconds, 1), EVALUATION_SECONDS, metrics=len(result["metrics"])),
          once(f"{what}, peak memory", "MiB", result["peak_memory_mib"], EVALUATION_MIB)]
