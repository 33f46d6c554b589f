"""What inference transforms do to a sampler: a table of quality and cost, each against the plain sampler.

Rows are those of `results.json`, measured of one run with `eval.cache` or `eval.time_shift`, with a field `eval_seed`;
their variant says what was added.
"""

import collections
from collections.abc import Iterable

import numpy as np

from ddil_jax.evaluation import statistics
from ddil_jax.evaluation.report_table import fmt

PLAIN = "the sampler itself"


def markdown(rows: Iterable[dict]) -> str:
  """The table: a line for each transform and guidance scale, a column for each number of steps, most steps first.

  Differences to the plain sampler are paired over the seeds of sampling.
  """
  distance, evaluations = collections.defaultdict(dict), {}
  for row in rows:
    key = row["variant"], float(row["guidance_scale"]), row["steps"]
    distance[key][row["eval_seed"]] = next(v for name, v in row["metrics"].items() if name.startswith("fd@"))
    evaluations[key] = row["network_evaluations"]
  counts = sorted({steps for _, _, steps in distance}, reverse=True)
  size = float(np.median([v for of in distance.values() for v in of.values()]))

  def cell(variant, scale, steps):
    if (variant, scale, steps) not in distance:
      return "-"
    values, plain = distance[variant, scale, steps], distance.get(("", scale, steps), {})
    interval = statistics.mean_interval(list(values.values()))
    text = fmt(interval.mean, size) + (f" ± {fmt(interval.half, size)}" if interval.half is not None else "")
    difference = statistics.paired_difference(values, plain) if variant else None
    mark = "" if difference is None or not difference.significant else " *"
    return f"{text}{mark}, {evaluations[variant, scale, steps]:.3g}"

  heads = ["sampler", "guidance", *(f"fd, evaluations: {n} steps" for n in counts)]
  out = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
  for scale in sorted({scale for _, scale, _ in distance}):
    for variant in dict.fromkeys(variant for variant, *_ in distance):
      cells = [variant.lstrip("+") or PLAIN, f"{scale:g}", *(cell(variant, scale, n) for n in counts)]
      out.append(f"| {' | '.join(cells)} |")
  seeds = len({seed for of in distance.values() for seed in of})
  return "\n".join(out) + (
      f"\n\nFréchet distance, lower is better: mean ± half the 95 % t-interval over {seeds} seeds of sampling, and\n"
      "network evaluations of an image. *: the interval of the paired difference to the sampler itself excludes 0,\n"
      "without any correction.\n")
