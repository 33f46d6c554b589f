"""Comparisons as text: Markdown, CSV, and a table for the terminal."""

import csv
import io
import itertools
import math
import textwrap

import numpy as np

from ddil_jax.evaluation import comparisons, meanings, report_rows, statistics


def markdown(found: list[dict]) -> str:
  """Rows of `comparisons.compare` as Markdown: for each metric name a table and what its numbers mean."""
  parts = []
  for metric, rows in itertools.groupby(found, lambda row: row["metric"]):
    parts.append(_markdown_table(metric, list(rows)))
  return "\n".join(parts)


def _markdown_table(metric, rows) -> str:
  size = float(np.median([abs(r["mean"]) for r in rows if r["mean"] is not None] or [0]))
  teachers = {r["setting"] for r in rows if r["objective"] == "teacher"}
  if len(teachers) == 1:  # its values have a column
    rows = [r for r in rows if r["objective"] != "teacher"] or rows
  reasons = list(dict.fromkeys(reason for r in rows for reason in r["reasons"]))
  columns = {
      "method": [r["objective"] for r in rows], "steps": [str(r["steps"]) for r in rows],
      "guidance scale": [f"{r['guidance_scale']:g}" for r in rows],
      "setting": [r["setting"] or r["objective"] for r in rows],
      "teacher": [fmt(r["teacher"], size) for r in rows],
      metric.partition("@")[0]: [_value(r, size, reasons) for r in rows],
      "baseline": [r["baseline"] or "" for r in rows], "difference": [_difference(r, size) for r in rows],
      "lower in": [f"{r['lower']}/{r['shared_seeds']}" if r["shared_seeds"] else "" for r in rows]}
  only = list(dict.fromkeys(r["baseline"] for r in rows if r["difference"] is not None))
  dropped = ["guidance scale"] * (set(columns["guidance scale"]) == {"1"}) + ["baseline"] * (len(only) < 2)
  dropped += ["teacher"] * all(r["teacher"] is None or r["objective"] == "teacher" for r in rows)
  dropped += ["difference", "lower in"] * (not only)
  columns = {name: [" ".join(text.replace("|", "\\|").split()) for text in (name, *column)]
             for name, column in columns.items() if name not in dropped}
  widths = [max(map(len, column)) for column in columns.values()]
  lines = [[text.ljust(width) for text, width in zip(line, widths)] for line in zip(*columns.values())]
  lines.insert(1, ["-" * width for width in widths])
  table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
  notes = legend(metric, rows[0]["comparisons"], only, rows[0]["unnamed"])
  return "\n".join([f"`{metric}`", "", table, "", *notes, *[""] * bool(reasons),
                    *(f"[{i}] {reason}" for i, reason in enumerate(reasons, 1)), ""])


def _value(row, size, reasons) -> str:
  half = None if row["low"] is None else (row["high"] - row["low"]) / 2
  text = fmt(row["mean"], size) + (f" ± {fmt(half, size)}" if half is not None else "") + f" ({row['seeds']})"
  refs = "".join(f" [{reasons.index(reason) + 1}]" for reason in row["reasons"])
  lost = ", ".join(f"{n} {fate}" for fate, n in row["failed"].items()) + refs
  return ", ".join(([text] if row["seeds"] else []) + ([lost] if row["failed"] else []))


def _difference(row, size) -> str:
  if row["difference"] is None:
    return ""
  half = None if row["difference_low"] is None else (row["difference_high"] - row["difference_low"]) / 2
  mark = " **" if row["significant_holm"] else " *" if row["significant"] else ""
  return fmt(row["difference"], size, True) + (f" ± {fmt(half, size)}" if half is not None else "") + mark


def legend(metric: str, count: int, baselines: list[str], unnamed: list[str]) -> list[str]:
  """Sentences that say what the numbers of a table are."""
  meaning = meanings.of(metric)
  better = f", {meaning.better} is better" if meaning.better else ""
  lines = [f"{meaning.heading}{better}: mean ± half the 95 % t-interval over"
           f" training seeds (their number in brackets; fewer than {statistics.LEAST} seeds: no interval)."]
  if unnamed:
    lines.append(f"Where a setting names no value: {', '.join(unnamed)}.")
  if baselines:
    name = f"'{baselines[0]}'" if len(baselines) == 1 else "the baseline that is like it in all else"
    lines.append(f"Difference: mean paired difference to {name} over shared seeds ± half its 95 % t-interval.")
  if count:
    lines.append(f"*: that interval excludes 0; **: also after Holm's correction for the {count} comparisons made"
                 f" here (without any true difference, about {count * (1 - statistics.LEVEL):.2g} of these would"
                 " get a *).")
  return lines


def to_csv(found: list[dict]) -> str:
  """Rows of `comparisons.compare` as CSV, with all digits."""
  names = list(dict.fromkeys(itertools.chain(*found)))
  text = io.StringIO()
  writer = csv.DictWriter(text, names, lineterminator="\n")
  writer.writeheader()
  for row in found:
    failed = "; ".join(f"{n} {fate}" for fate, n in row["failed"].items())
    writer.writerow(row | {"failed": failed} | {name: "; ".join(row[name]) for name in ("reasons", "unnamed")})
  return text.getvalue()


# For the terminal ------------------------------------------------------------------------------


def terminal_table(rows) -> str:
  """The Frechet distances as text of at most 100 columns.

  Args:
    rows: the list that results.json holds.
  """
  notes, lines = [], []
  checked = [report_rows.check(raw, notes) for raw in rows]
  tables = comparisons.summarise(report_rows.unique([r for r in checked if r], notes))
  for table in tables:
    lines += [*textwrap.wrap(f"Frechet distance, lower is better: {table['metric']}", 100), ""]
    for scale, own in itertools.groupby(table["teacher"], lambda g: g["guidance_scale"]):
      text = ", ".join(f"{g['steps']} step{'s' * (g['steps'] != 1)} {fmt(g['teacher'], table['size'])}"
                       for g in own)
      lines += textwrap.wrap(f"teacher at guidance scale {scale:g}: {text}", 100)
    lines += [""] * bool(table["teacher"])
    groups = table["groups"]
    if not groups:
      continue
    left = [["student"] + [_short(g["objective"], 12) for g in groups],
            ["steps"] + [str(g["steps"]) for g in groups],
            ["scale"] + [f"{g['guidance_scale']:g}" for g in groups],
            ["teacher"] + [fmt(g["teacher"], table["size"]) for g in groups]]
    right = [_text_column(v, [g["cells"].get(v) for g in groups], table["size"]) for v in table["labels"]]
    while True:  # settings that do not fit go into a further block
      block = list(left)
      while right and (len(block) == len(left) or _width([*block, right[0]]) <= 100):
        block.append(right.pop(0))
      pads = [str.rjust if 0 < i < len(left) else str.ljust for i in range(len(block))]
      columns = [[pad(text, max(map(len, c))) for text in c] for pad, c in zip(pads, block)]
      lines += ["  ".join(line).rstrip() for line in zip(*columns, strict=True)] + [""]
      if not right:
        break
  if not lines:
    return "No Frechet distance in the results.\n"
  students = [g for table in tables for g in table["groups"]]
  compared = any(cell.difference for g in students for cell in g["cells"].values())
  legend = "teacher: its own sampler at as many steps and that scale." * bool(students) + (
      f" In brackets: mean paired difference to base, and in how many shared seeds it is lower. *: its 95 % t-interval"
      f" (at least {statistics.LEAST} seeds) excludes 0; **: also after Holm's correction for all comparisons of the"
      " table.") * compared
  notes = [legend, *(f"note: {n}" for n in dict.fromkeys(notes))]
  return "\n".join(lines + [line for note in notes for line in textwrap.wrap(note, 100)]) + "\n"


def fmt(value, like=None, sign: bool = False) -> str:
  """A number with three significant digits or two decimals, as suits its size or the size of `like`."""
  if value is None:
    return "-"
  size = abs(value if like is None else like)
  decimals = 0 if size >= 1e3 else 2 if size >= 1 or size == 0 else 2 - math.floor(math.log10(size))
  kind = ".1e" if size >= 1e6 or decimals > 5 else f".{decimals}f"
  return f"{value:{'+' if sign else ''}{kind}}"


def _text_column(label, cells, size) -> list[str]:
  """Head and cells, the means right-aligned among themselves."""
  means = ["-" if c is None else fmt(c.mean, size) for c in cells]
  width = max(map(len, means))
  texts = [_short(label, 17)]
  for mean, c in zip(means, cells, strict=True):
    text = mean.rjust(width)
    if c is not None and c.difference is not None:
      text += f" ({fmt(c.difference.mean, size, True)}{c.mark} {c.difference.lower}/{c.difference.n})"
    texts.append(text)
  return texts


def _width(columns) -> int:
  return sum(max(map(len, c)) for c in columns) + 2 * (len(columns) - 1)


def _short(text, width):
  text = " ".join(text.split())
  return text if len(text) <= width else text[:width - 1] + "~"
