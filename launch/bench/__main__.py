"""Overheads and speeds, measured in one run: a rollout beside its forward passes, a DDIL step beside the
base step, ours beside PyTorch's, how fast the demo's networks train and sample, how time and memory grow, what it
takes to measure 50,000 images, and, on an accelerator, steps of Stable Diffusion's size.

    python -m launch.bench --out=bench/results.json

Programs that are compared run in turns (A B A B ...), since the speed of a machine drifts; a ratio is the
median over these pairs. One process, on all cores that it may use; what needs several devices, or whose memory is
measured, has one of its own. `--only=evaluation` measures one part.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time
import traceback

import jax

from ddil_jax import build as build_lib
from ddil_jax.files import write_bytes, write_json
from ddil_jax.training import compiling
from ddil_jax.training.logging import versions
from launch.bench.against_torch import against_torch, perturbed, torch_version
from launch.bench.evaluation import evaluation
from launch.bench.growth import growth
from launch.bench.large import large
from launch.bench.measure import SMOKE, Size, cores, digits, leave_out, left_out
from launch.bench.memory import memory
from launch.bench.speed import gradient_in_scan, inputs, replay, rollouts, sampling, training


PARTS = (rollouts, training, replay, inputs, sampling, gradient_in_scan, against_torch, growth, memory, evaluation,
         large)
DIGITS = {"s": 1, "MiB": 1, "steps/s": 1, "samples/s": 1, "examples/s": 0, "relative": 7}  # 3 for all other units


def table(rows: list[dict]) -> list[tuple[str, str, str, str]]:
  """The rows as text: name, median and unit, range over the repeats, target and whether it was met."""
  lines = []
  for row in rows:
    digits_ = DIGITS.get(row["unit"], 3)
    value, low, high = (f"{row[name]:,.{digits_}f}" for name in ("value", "low", "high"))
    goal = "" if row["target"] is None else f"{row['bound']} {row['target']:g}: {'met' if row['met'] else 'MISSED'}"
    unit = "" if row["unit"] == "ratio" else f" {row['unit']}"
    lines.append((row["name"], value + unit, f"{low} .. {high}" if low != high else "", goal))
  return lines


def terminal(rows: list[dict]) -> str:
  """The table for the terminal."""
  lines = table(rows) or [("nothing was measured", "", "", "")]
  widths = [max(len(line[i]) for line in lines) for i in range(4)]
  return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def markdown(result: dict) -> str:
  """The table as Markdown, with where and when it was measured."""
  about = (f"{result['machine']}; load average {result['load_average']['before']} before and"
           f" {result['load_average']['after']} after; {result['seconds']:.0f} s; medians of {result['repeats']}.")
  versions_ = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
  about += "".join(f" Left out: {what}." for what in result["left_out"])
  lines = [("measured", "median", "lowest .. highest", "target"), ("---",) * 4, *table(result["rows"])]
  return "\n".join([f"{about} {versions_}.", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 1 where a part failed, the rows of the others are written."""
  args = argparse.ArgumentParser(prog="launch.bench", description="Measures overheads and speeds.")
  args.add_argument("--out", default="bench/results.json")
  args.add_argument("--data_dir", default="",
                    help="where data sets are prepared; default $DDIL_DATA, else data/")
  args.add_argument("--smoke", action="store_true", help="a few steps of one method on fake data")
  parts = {part.__name__: part for part in PARTS}
  args.add_argument("--only", choices=parts, help="measure one part")
  args = args.parse_args(argv)
  size = SMOKE if args.smoke else Size()
  began, load = time.monotonic(), os.getloadavg()[0]
  config = digits("pd", size)
  config.data.data_dir = args.data_dir
  dataset = build_lib.load_data(config, "train")

  # The network of the demo's teacher and students; untrained, since time does not depend on its values.
  network = perturbed(build_lib.build(config, dataset).init_teacher(jax.random.key(1)))
  rows, seconds, failed = [], {}, False
  for name, measure in parts.items():
    if args.only in (None, name):
      start = time.monotonic()
      try:
        rows += measure(dataset, network, size)
      except Exception:  # what took minutes to measure is not lost by it
        traceback.print_exc()
        leave_out(f"{name}, which failed")
        failed = True
      seconds[name] = round(time.monotonic() - start, 1)
      print(f"{name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)
  result = {
      "machine": f"{cores()} CPU cores, {jax.device_count()} device(s) of kind {jax.devices()[0].device_kind}",
      "load_average": {"before": round(load, 2), "after": round(os.getloadavg()[0], 2)},
      "versions": versions() | torch_version(), "seconds": round(time.monotonic() - began, 1), "seconds_of": seconds,
      "repeats": size.repeats, "left_out": left_out, "rows": rows}
  out = pathlib.Path(args.out)
  write_json(out, result)
  write_bytes(out.with_suffix(".md"), markdown(result).encode())
  print(terminal(rows))
  print(f"{result['machine']}; load average {load:.1f} before; medians of {size.repeats}; written to {out}")
  return 1 if failed else 0


if __name__ == "__main__":
  # Of a GPU's memory only what is needed: some parts have a process of their own on the same card.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  with tempfile.TemporaryDirectory() as cache:
    compiling.keep_programs(cache)  # several parts run the same program
    sys.exit(main())
