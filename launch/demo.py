"""The demo: a teacher and its students on digits, evaluated and reported, on a laptop.

    python -m launch.demo --workdir=runs/demo

Every run has its own directory and can be stopped and continued; so can the demo. Worker processes
(one per core) take the runs from one list.
"""

import argparse
import json
import os
import pathlib
import sys
import time

from ddil_jax import files
from ddil_jax.sweep import Trial
from launch.sweep import at_least_one, exit_code, run_all

# The demo's students, the most telling first, so that a stopped demo shows something: name, config,
# its argument, fields that differ: shorter runs than the configs' own. Most of the time is compiling, so that a
# second seed (`--seeds=2`) costs less than the first.
DMD2 = {"train.steps": "600", "objective.period": "3"}
FAMILIES = (
    ("pd", "digits_pd", "", {"train.steps": "160"}),
    ("lcm", "digits_lcm", "", {}),
    ("dmd2-4", "digits_dmd2", "", DMD2),
    ("pd-guided-4", "digits_pd", "guided", {"train.steps": "200", "train.stages": "()"}),
    ("dmd2-2", "digits_dmd2", "two_steps", DMD2),
)
# Two at a time: neighbours have unlike programs, so that the later two find theirs compiled.
VARIANTS = ("", "reflected", "ddil", "ddil,reflected")
TEACHER = {"eval.guidance_scales": "(1.0, 3.0)", "eval.sampler_steps": "(2, 4)"}


def trials(teacher: str, seeds: int = 1, data_dir: str = "", smoke: bool = False) -> list[Trial]:
  """The students' runs; with `smoke` two steps each, on fake data."""
  common = {"teacher.path": teacher, "eval.shift_samples": "300"} | ({"data.data_dir": data_dir} if data_dir else {})
  out = []
  for seed in range(seeds):
    for name, config, arg, overrides in FAMILIES:
      for variant in VARIANTS:
        args = ",".join(a for a in (arg, variant, "smoke" if smoke else "") if a)
        label = "+".join(variant.split(",")) if variant else "base"
        out.append(Trial(f"{name}-{label}-seed{seed}", f"configs/{config}.py:{args}",
                         {"seed": str(seed)} | ({} if smoke else common | overrides)))
  return out


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, 2 for wrong usage, 1 where a run failed, 130 when interrupted."""
  args = argparse.ArgumentParser(prog="launch.demo", description=__doc__.splitlines()[0])
  args.add_argument("--workdir", default="runs/demo", help="everything of the demo lies here")
  args.add_argument("--data_dir", default="", help="where the data is prepared (default: $DDIL_DATA or data/)")
  args.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
  args.add_argument("--seeds", type=int, default=1, help="training seeds of every student (default: 1)")
  args.add_argument("--smoke", action="store_true", help="two steps of everything on fake data")
  args = args.parse_args(argv)
  return exit_code(lambda: demo(args))


def demo(args) -> int:
  """Runs what is not done yet, then reports; returns the exit code."""
  at_least_one(seeds=args.seeds, workers=args.workers)
  workdir = pathlib.Path(args.workdir)
  files.make_folder(workdir)
  began = time.monotonic()

  students = trials(str(workdir / "teacher"), args.seeds, args.data_dir, args.smoke)
  data = {"data.data_dir": args.data_dir} if args.data_dir else {}
  teacher = Trial("teacher", "configs/digits_teacher.py" + ":smoke" * args.smoke, {} if args.smoke else TEACHER | data)
  print(f"DDIL on digits: one teacher, then {len(students)} students, {args.workers} at a time; stop it with"
        " Ctrl-C at any time, the same command continues", flush=True)
  failed = run_all([teacher], workdir, 1, retry=True, small=True)
  if not failed:
    failed = run_all(students, workdir, args.workers, retry=True, small=True)

  rows = gather([teacher, *students], workdir, overview)
  if rows:
    print(f"report: {workdir / 'report.html'}   rows: {workdir / 'results.json'}   "
          f"({time.monotonic() - began:.0f} s in this sitting)")
  for name, error in failed.items():
    print(f"FAILED {name}: {error} (see {workdir / name / 'log.txt'}; the same command continues)", file=sys.stderr)
  return 1 if failed else 0


def gather(done: list[Trial], workdir: pathlib.Path, draw) -> list[dict]:
  """Merges the runs' rows, writes the report, draws the picture with `draw(rows, workdir)`, prints the table."""
  from ddil_jax.evaluation import report
  folders = [workdir / trial.name for trial in done if (workdir / trial.name / "results.json").exists()]
  rows = [row | {"samples": f"{folder.name}/{row['samples']}"}
          for folder in folders for row in json.loads((folder / "results.json").read_text())]
  if rows:
    files.write_json(workdir / "results.json", rows)
    report.write_report(folders, workdir / "report.html")
    draw(rows, workdir)
    print(report.terminal_table(rows))
  return rows


def overview(rows: list[dict], workdir: pathlib.Path) -> None:
  """One picture, overview.png: the teacher with many and few steps, and each student, from the same noise."""
  from matplotlib.figure import Figure
  from PIL import Image
  names = {"pd": "PD", "lcm": "LCM", "dmd2": "DMD2", "teacher": "teacher"}
  wanted = [row for row in rows if row["guidance_scale"] == 1 and row["seed"] == 0 and row["steps"] in (2, 4, 32)
            and row["variant"] in ("", "base", "+ddil")]
  order = sorted(wanted, key=lambda r: (r["objective"] != "teacher", -r["steps"]))
  figure = Figure(figsize=(5, 0.46 * len(order)), dpi=150)
  for i, row in enumerate(order):
    picture = Image.open(workdir / row["samples"])
    axes = figure.add_axes((0.36, 1 - (i + 1) / len(order), 0.64, 0.9 / len(order)))
    axes.imshow(picture.crop((0, 0, picture.width, picture.width // 10)), cmap="gray")
    axes.axis("off")
    figure.text(0.01, 1 - (i + 0.55) / len(order), va="center", fontsize=8,
                s=f"{names[row['objective']]} {row['variant'].replace('base', '')} {row['steps']} steps")
  figure.savefig(workdir / "overview.png")


if __name__ == "__main__":
  sys.exit(main())
