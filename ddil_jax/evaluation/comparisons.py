"""Settings compared by a metric: means over seeds, paired differences to a baseline, and what is missing.

Values are compared only under one full metric name (`fd@2000/test/digits-cnn-1a2b3c4d`) and, between
settings, only over the seeds that both have.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import meanings, report_labels, statistics
from ddil_jax.evaluation.report_labels import Setting
from ddil_jax.evaluation.report_rows import Row, order
from ddil_jax.evaluation.results import MetricName
from ddil_jax.evaluation.statistics import Difference, Interval


class Cell(NamedTuple):
  """One metric of one setting.

  Attributes:
    setting: what it is.
    evaluations: of a network for one sample, one number but for runs that differ in it.
    values: finite values by seed.
    failed: {seed: (what happened, why)} of the others: "not finite", "diverged", "failed".
    interval: of the mean over seeds; None without values.
    baseline: label of the setting it is compared with, or None.
    difference: to the baseline, value - baseline over shared seeds, or None.
    holm: the difference is significant after Holm's correction for the comparisons of its table.
  """
  setting: Setting
  evaluations: list[float]
  values: dict[int, float]
  failed: dict[int, tuple[str, str]]
  interval: Interval | None
  baseline: str | None
  difference: Difference | None
  holm: bool = False

  @property
  def mean(self):
    return self.interval.mean if self.interval else None

  @property
  def mark(self):
    """"*" where the interval of the difference excludes 0, "**" where it does so after Holm's correction."""
    return "**" if self.holm else "*" if self.difference and self.difference.significant else ""

  @property
  def fates(self):
    """{what happened to seeds without a value: how many}."""
    kinds = [kind for kind, _ in self.failed.values()]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def summarise(rows: list[Row], metric: str | None = None, baseline: str | None = None) -> list[dict]:
  """A table for each full name of a metric: unlike ones never share a table.

  Args:
    rows: labelled, each once; see `report_rows`.
    metric: a kind ("fd", the default) or a full name.
    baseline: what settings are compared with: a label, a variant, or FIELD=VALUE. Where several settings fit,
      each is compared with the one that is like it in all else. By default the variant base, where there
      is none the first setting.

  Returns:
    [{"metric", "better": "lower" | "higher" | "", "size": the median, "labels": [label],
    "baselines": [label], "unnamed": [what labels do not name], "comparisons": differences that have an interval,
    "teacher": [group] of the one teacher, "groups": [group]}], with group = {"objective", "steps", "guidance_scale",
    "teacher": mean of the one teacher's own sampler at as many steps and that scale, "evaluations",
    "cells": {label: Cell}}.

  Raises:
    UsageError: an unknown metric or baseline; it lists those there are.
  """
  known = sorted({m for r in rows for m in r.metrics})
  names = [m for m in known if (metric or "fd") in (m, m.partition("@")[0])]
  if metric and not names:
    kinds = ", ".join(dict.fromkeys(m.partition("@")[0] for m in known))
    raise UsageError(f"no run has the metric '{metric}'; there are: {kinds or 'none'}")
  found = _grouped(rows)
  _require_baseline(found, baseline)
  return [_table(found, name, baseline, names) for name in names]


def _grouped(rows) -> dict:
  """{group: {label: rows}} in the order of the tables."""
  found = {}
  for row in sorted(rows, key=lambda r: (order(r.group), r.setting.order)):
    found.setdefault(row.group, {}).setdefault(row.label, []).append(row)
  return found


def _table(found, metric, baseline, names) -> dict:
  better = meanings.of(metric).better
  counts = {name: name.partition("@")[2].partition("/")[0] for name in names}

  def belongs(row):  # a run that failed would have been measured with as many samples as its config says
    n = str(row.config.get("eval.num_samples"))
    return metric in row.metrics or (row.error and (counts[metric] == n or n not in counts.values()))

  groups = []
  for (objective, steps, scale), by_label in found.items():
    of = {label: own for label, rows in by_label.items() if (own := [r for r in rows if belongs(r)])}
    if any(metric in r.metrics for own in of.values() for r in own):
      cells = _cells(of, metric, baseline)
      evaluations = sorted({n for cell in cells.values() for n in cell.evaluations})
      groups.append(dict(objective=objective, steps=steps, guidance_scale=scale, evaluations=evaluations, cells=cells))
  teachers = [g for g in groups if g["objective"] == "teacher"]
  if len({label for g in teachers for label in g["cells"]}) > 1:
    teachers = []  # settings like all others: no one of them is the teacher
  means = {(g["steps"], g["guidance_scale"]): cell.mean for g in teachers for cell in g["cells"].values()}
  for g in groups:
    g["teacher"] = means.get((g["steps"], g["guidance_scale"]))
  groups = [g for g in groups if g not in teachers]
  _correct([g["cells"] for g in groups])
  cells = [cell for g in (*teachers, *groups) for cell in g["cells"].values()]
  settings = {label: cell.setting for g in groups for label, cell in g["cells"].items()}
  return dict(
      metric=metric, better=better, size=float(np.median([c.mean for c in cells if c.values] or [0])),
      labels=[s.label for s in sorted(settings.values(), key=lambda s: s.order)],
      baselines=list(dict.fromkeys(c.baseline for c in cells if c.difference)),
      unnamed=_unnamed(groups), comparisons=sum(bool(c.difference and c.difference.half is not None) for c in cells),
      teacher=teachers, groups=groups)


def _unnamed(groups) -> list[str]:
  """What goes without saying in labels: "clip=1", or where methods differ "train.steps=300 (pd, lcm)"."""
  found = {}
  for g in groups:
    for cell in g["cells"].values():
      for field, name in cell.setting.unnamed.items():
        found.setdefault(field, {}).setdefault(name, []).append(g["objective"])
  return [name + (f" ({', '.join(dict.fromkeys(of))})" if len(names) > 1 else "")
          for field, names in sorted(found.items()) for name, of in names.items()]


def _cells(by_label, metric, baseline) -> dict[str, Cell]:
  values = {label: {r.seed: v for r in rows if (v := r.metrics.get(metric)) is not None}
            for label, rows in by_label.items()}
  compared = baselines(_settings(by_label), baseline)
  cells = {}
  for label, rows in by_label.items():
    own, other = values[label], compared.get(label)
    failed = {r.seed: (r.fate, r.error) if r.error else ("not finite", f"the metric of {r.run} is not finite")
              for r in rows if r.seed not in own}
    interval = statistics.mean_interval(list(own.values())) if own else None
    difference = statistics.paired_difference(own, values[other]) if other is not None else None
    evaluations = sorted({r.network_evaluations for r in rows} - {None})
    cells[label] = Cell(rows[0].setting, evaluations, own, failed, interval, other, difference)
  return cells


def _correct(groups):
  """Marks what is significant after Holm's correction for all comparisons of a table."""
  tested = [(cells, label) for cells in groups for label, cell in cells.items()
            if cell.difference and cell.difference.p is not None]
  for (cells, label), holds in zip(tested, statistics.holm([cells[label].difference.p for cells, label in tested])):
    cells[label] = cells[label]._replace(holm=holds)


# What is compared with what --------------------------------------------------------------------


def _settings(by_label) -> list[Setting]:
  return [rows[0].setting for rows in by_label.values()]


def baselines(settings: list[Setting], wanted: str | None = None) -> dict[str, str]:
  """{label: label of its baseline} for the settings of one group; see `summarise`. Baselines have none."""
  candidates, apart = _candidates(settings, wanted)

  def alike(s, c):  # in all that both have, but for what makes the baseline
    return (apart("variant") or s.variant == c.variant) and all(
        s.values[f] == v for f, v in c.values.items() if f in s.values and not apart(f))

  found = {}
  for s in settings:
    fitting = [c for c in candidates if alike(s, c)] if len(candidates) > 1 else candidates
    if s not in candidates and len(fitting) == 1:
      found[s.label] = fitting[0].label
  return found


def _candidates(settings, wanted):
  """The settings that a baseline's name may mean, and field -> whether others may differ from their own in it."""
  default = "base" if any(s.variant == "base" for s in settings) else settings[0].label
  exact = [s for s in settings if s.label == (wanted or default)]
  if exact and (wanted or default != "base"):
    return exact, lambda field: True
  wanted = wanted or default
  of_variant = [s for s in settings if s.variant == wanted]
  if of_variant:
    return of_variant, lambda field: field in ("variant", *report_labels.IN_VARIANT)
  name, _, value = wanted.partition("=")
  named = lambda field: field == name or field.endswith(f".{name}")  # noqa: E731
  try:
    value = report_labels.text(float(value))
  except ValueError:
    value = {"true": "yes", "false": "no"}.get(value.lower(), value)
  return [s for s in settings if any(named(f) and report_labels.text(v) == value for f, v in s.values.items())], named


def _require_baseline(found, baseline):
  groups = [_settings(by_label) for by_label in found.values()]
  if baseline is None or any(_candidates(settings, baseline)[0] for settings in groups):
    return
  labels = dict.fromkeys(s.label for settings in groups for s in settings if s.label)
  fields = dict.fromkeys(f"{f}={report_labels.text(v)}" for settings in groups for s in settings
                         for f, v in s.values.items())
  raise UsageError(f"no setting is called '{baseline}'; there are: {'; '.join(labels) or 'none'}"
                   + (f"; and fields to name one by: {', '.join(fields)}" if fields else ""))


def _require_comparable(found, names):
  """Raises UsageError if several settings of a group were measured, but no two of any group alike."""
  why = None
  for group, by_label in found.items():
    # Seeds that diverged count: what is left of a comparison then is for the table to say.
    measured = {label: {name: {r.seed for r in rows if name in r.metrics or r.error} for name in names
                        if any(r.metrics.get(name) is not None for r in rows)} for label, rows in by_label.items()}
    for (a, of_a), (b, of_b) in itertools.combinations(measured.items(), 2):
      if any(of_a[name] & of_b[name] for name in of_a if name in of_b):
        return
      if of_a and of_b:
        why = why or _why_not(group, (a, b), (of_a, of_b))
  if why:
    raise UsageError(why)


def _why_not(group, labels, seeds) -> str:
  where = f"{group[0]}, {group[1]} steps, guidance scale {group[2]:g}: '{labels[0]}' and '{labels[1]}'"
  shared = [name for name in seeds[0] if name in seeds[1]]
  if shared:
    a, b = (", ".join(map(str, sorted(of[shared[0]]))) for of in seeds)
    return (f"{where} cannot be compared: they share no seed (there are {a} against {b}); differences are taken"
            " over seeds that both have, so train both with the same ones")
  x, y = (MetricName.parse(next(iter(of))) for of in seeds)
  unlike = "; ".join(f"{field} is {u} against {v}" for field, u, v in zip(MetricName._fields, x, y) if u != v)
  return f"{where} cannot be compared: they were measured in unlike ways ({unlike}); evaluate both alike"


def compare(rows: list[Row], baseline: str | None = None, metric: str | None = None) -> list[dict[str, Any]]:
  """The summary as flat rows, one for each metric name, method, step count, guidance scale and setting.

  Args:
    rows, baseline, metric: as for `summarise`.

  Returns:
    [{"metric", "objective", "steps", "guidance_scale", "setting": label, "variant", FIELD: value...,
    "network_evaluations", "teacher": as in `summarise`, "mean", "low", "high": 95 % interval over seeds,
    "seeds": number with a value, "failed": {what happened: number}, "reasons", "baseline": label,
    "difference", "difference_low", "difference_high", "p", "shared_seeds", "lower": shared seeds in which the
    value is below the baseline, "significant", "significant_holm", "comparisons", "unnamed": of the whole
    table}]; what is not there is None.

  Raises:
    UsageError: an unknown metric or baseline, or settings of which no two can be compared; it says why.
  """
  out = []
  tables = summarise(rows, metric, baseline)
  _require_comparable(_grouped(rows), [table["metric"] for table in tables])
  for table in tables:
    for g in (*table["teacher"], *table["groups"]):
      for label, c in g["cells"].items():
        interval, d = c.interval or Interval(None, None, None, 0), c.difference
        d = d or Difference(None, None, None, None, None, 0)
        out.append({
            "metric": table["metric"], "objective": g["objective"], "steps": g["steps"],
            "guidance_scale": g["guidance_scale"], "setting": label, "variant": c.setting.variant, **c.setting.values,
            "network_evaluations": c.evaluations[0] if len(c.evaluations) == 1 else None,
            "teacher": g["teacher"], "mean": interval.mean, "low": interval.low, "high": interval.high,
            "seeds": interval.n, "failed": c.fates, "reasons": list(dict.fromkeys(why for _, why in c.failed.values())),
            "baseline": c.baseline, "difference": d.mean, "difference_low": d.low, "difference_high": d.high,
            "p": d.p, "shared_seeds": d.n, "lower": d.lower, "significant": bool(c.mark),
            "significant_holm": c.holm, "comparisons": table["comparisons"],
            "unnamed": table["unnamed"]})
  return out
