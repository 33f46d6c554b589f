"""What the text of a compiled program says of one run of it: sums over instructions, loops and branches included.

XLA's own account counts a loop's body once and the dearest branch of a conditional: a rollout of 16 steps as one, and
in every step the rollouts that refill the replay buffers in a few.
"""

import collections
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Shapes = dict[str, tuple[int, ...]]  # {instruction: its dimensions} of a computation, of arrays


class Range(NamedTuple):
  """Of a run with the cheapest and of one with the dearest branch of each conditional."""
  least: float
  most: float


def totals(text: str, measure: Callable[[str, Shapes], dict[str, float]]) -> dict[str, Range]:
  """{kind: sum over all instructions that run}.

  What lies in a loop counts as often as the loop is known to run, once where that is not known.

  Args:
    text: of an optimised program.
    measure: (a line, the shapes in its computation) -> {kind: value}.
  """
  computations, entry = _computations(text)

  def total(name):
    least, most = collections.Counter(), collections.Counter()
    for line, shapes in computations[name]:
      own = measure(line, shapes)
      least.update(own)
      most.update(own)
      for alternatives, times in _calls(line, computations):
        found = [total(called) for called in alternatives if called in computations]
        kinds = {kind for pair in found for kind in pair[1]}
        least.update({kind: times * min(low[kind] for low, _ in found) for kind in kinds})
        most.update({kind: times * max(high[kind] for _, high in found) for kind in kinds})
    return least, most

  low, high = total(entry)
  return {kind: Range(low[kind], high[kind]) for kind in high}


def _computations(text: str) -> tuple[dict[str, list[tuple[str, Shapes]]], str]:
  """({name: its lines, each with the shapes of all}, name of the one that runs)."""
  found, entry, lines, shapes = {}, "", [], {}
  for line in text.splitlines():
    head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
    if head:
      lines, shapes = [], {}
      found[head[2]], entry = lines, head[2] if head[1] else entry
      continue
    defined = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]", line)
    if defined:
      shapes[defined[1]] = _dims(defined[2])
    lines.append((line, shapes))
  return found, entry


def _calls(line: str, computations):
  """([computations of which one runs], how often) of an instruction."""
  branches = []
  for role, several in re.findall(r"(body|calls|to_apply|branch_computations|true_computation|false_computation)="
                                  r"(\{[^}]*\}|%?[\w.\-]+)", line):
    called = re.findall(r"[\w.\-]+", several)
    if role in ("body", "calls", "to_apply"):
      yield from (([name], _trips(line, computations) if role == "body" else 1) for name in called)
    else:
      branches += called
  if branches:
    yield branches, 1


def _trips(line: str, computations) -> int:
  """How often a loop runs: by its configuration (CPU), or by its condition, i < N, since JAX counts from 0 (TPU)."""
  known = re.search(r'"known_trip_count":\{"n":"?(\d+)', line)
  if known:
    return int(known[1])
  condition = re.search(r"condition=%?([\w.\-]+)", line)
  lines = [line for line, _ in computations.get(condition[1], ())] if condition else []
  compared = next((found for text in lines if (found := re.search(
      r"ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", text))), None)
  limits = [re.search(rf"%?{re.escape(compared[1])} = s32\[\]\S* constant\((\d+)\)", text) for text in lines] \
      if compared else []
  return next((int(limit[1]) for limit in limits if limit), 1)


def operations(text: str) -> Range:
  """Of matrix products and convolutions; a multiplication and an addition are two.

  Taps of a convolution that lie in its padding, or between the pixels of a dilated image, are not counted.
  """
  return totals(text, _operations).get("operations", Range(0.0, 0.0))


def _operations(line: str, shapes: Shapes) -> dict[str, float]:
  found = re.search(r"= \w+\[([\d,]*)\]\S* (dot|convolution)\((?:[^%)]*)%?([\w.\-]+), (?:[^%)]*)%?([\w.\-]+)\)", line)
  if not found:
    return {}
  out, first, second = _dims(found[1]), shapes[found[3]], shapes[found[4]]
  if found[2] == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
    inner = math.prod(first[axis] for axis in _dims(contracted[1])) if contracted else 1
    return {"operations": 2.0 * math.prod(out) * inner}
  image, kernel, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line).groups()
  window = re.search(r"window=\{([^}]*)\}", line)
  options = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
  pairs = 1
  for i, label in enumerate(sorted(label for label in result if label.isdigit())):
    low = int(options["pad"].split("x")[i].partition("_")[0]) if "pad" in options else 0
    stride, between, apart = (int(options[name].split("x")[i]) if name in options else 1
                              for name in ("stride", "lhs_dilate", "rhs_dilate"))
    size, taps, places = first[image.index(label)], second[kernel.index(label)], out[result.index(label)]
    at = np.arange(places)[:, None] * stride + np.arange(taps) * apart - low
    pairs *= int(np.sum((at >= 0) & (at <= (size - 1) * between) & (at % between == 0)))
  channels = out[result.index("b")] * out[result.index("f")] * second[kernel.index("i")]
  return {"operations": 2.0 * pairs * channels}


def _dims(text: str) -> tuple[int, ...]:
  return tuple(int(d) for d in text.split(",") if d)
