"""The demo: a teacher and its students on digits, evaluated and reported, on a laptop.

    python -m launch.demo --workdir=runs/demo

Every run has its own directory and can be stopped and continued; so can the demo. Worker processes
(one per core) take the runs from one list.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import sys
import time
import traceback
from typing import NamedTuple

VARIANTS = ("", "ddil", "reflected", "ddil,reflected")


class Job(NamedTuple):
  """One run: its directory's name, its config, and the fields that differ."""
  name: str
  spec: str
  overrides: dict[str, str]


# The demo's students, the most telling first, so that a stopped demo shows something: name, config,
# its argument, fields that differ (shorter runs than the configs' own), and the number of seeds.
FAMILIES = (
    ("pd", "digits_pd", "", {"train.steps": "150"}, 2),
    ("lcm", "digits_lcm", "", {"train.steps": "200"}, 2),
    ("dmd2-4", "digits_dmd2", "", {"train.steps": "400", "optimizer.learning_rate": "4e-4"}, 2),
    ("pd-guided", "digits_pd", "guided", {"train.steps": "150"}, 2),
    ("dmd2-2", "digits_dmd2", "two_steps", {"train.steps": "400", "optimizer.learning_rate": "4e-4"}, 1),
)
TEACHER = {"train.steps": "1600", "eval.guidance_scales": "(1.0, 3.0)"}


def jobs(teacher: str, data_dir: str = "", smoke: bool = False) -> list[Job]:
  """The students' runs; with `smoke` two steps each, on fake data."""
  common = {"teacher.path": teacher} | ({"data.data_dir": data_dir} if data_dir else {})
  out = []
  for seed in range(max(family[-1] for family in FAMILIES)):
    for name, config, arg, overrides, seeds in FAMILIES:
      if seed >= seeds:
        continue
      for variant in VARIANTS:
        args = ",".join(a for a in (arg, variant, "smoke" if smoke else "") if a)
        label = "+".join(variant.split(",")) if variant else "base"
        out.append(Job(f"{name}-{label}-seed{seed}", f"configs/{config}.py:{args}",
                       {"seed": str(seed)} | ({} if smoke else common | overrides)))
  return out


def train(job: Job, workdir: pathlib.Path) -> None:
  """One run, in this process; its own output goes to log.txt."""
  from ddil_jax import config, runs
  folder = workdir / job.name
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / "log.txt", "a", buffering=1) as log:
    old, sys.stdout = sys.stdout, log
    try:
      runs.train(config.load(job.spec, job.overrides), folder)
    finally:
      sys.stdout = old


def worker(index: int, count: int, todo, outcomes, workdir: str) -> None:
  """Takes jobs until there are none; a job that fails is reported and the next one taken."""
  # One core each: nets this small run no faster on two.
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  if count > 1 and len(cores) >= count:
    os.sched_setaffinity(0, cores[index::count])
  # Networks of this size run as fast, and compile in half the time.
  os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"
                             " --xla_llvm_disable_expensive_passes=true")
  import jax
  jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(workdir).resolve() / ".jax_cache"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  for job in iter(todo.get, None):
    try:
      train(job, pathlib.Path(workdir))
      outcomes.put((job.name, ""))
    except Exception as error:  # one failed run must not end the demo; it is listed at the end
      with open(pathlib.Path(workdir) / job.name / "log.txt", "a") as log:
        traceback.print_exc(file=log)
      outcomes.put((job.name, f"{type(error).__name__}: {error}"))


def finished(job: Job, workdir: pathlib.Path) -> bool:
  """Whether this very run was trained and evaluated before."""
  from ddil_jax import config
  folder = workdir / job.name
  if not ((folder / "results.json").exists() and (folder / "config.json").exists()):
    return False
  return json.loads((folder / "config.json").read_text()) == config.to_dict(config.load(job.spec, job.overrides))


def run_all(todo: list[Job], workdir: pathlib.Path, workers: int) -> dict[str, str]:
  """Runs jobs on worker processes with a steady progress line; returns {name: error} of failed ones."""
  before = len(todo)
  todo = [job for job in todo if not finished(job, workdir)]
  if len(todo) < before:
    print(f"{before - len(todo)} of {before} runs are done already", flush=True)
  if not todo:
    return {}
  context = multiprocessing.get_context("spawn")
  queue, outcomes = context.Queue(), context.Queue()
  for job in todo + [None] * workers:
    queue.put(job)
  processes = [context.Process(target=worker, args=(i, workers, queue, outcomes, str(workdir)), daemon=True)
               for i in range(workers)]
  for process in processes:
    process.start()
  began, done, failed = time.monotonic(), 0, {}
  while done < len(todo):
    try:
      name, error = outcomes.get(timeout=10)
    except multiprocessing.queues.Empty:
      if not any(p.is_alive() for p in processes):
        raise SystemExit("ddil: run failed: the worker processes ended; the same command continues") from None
      print(f"  {_running(workdir, todo)}", flush=True)
      continue
    done += 1
    if error:
      failed[name] = error
    spent = time.monotonic() - began
    left = spent / done * (len(todo) - done)
    print(f"[{done}/{len(todo)}] {name}: {'FAILED: ' + error if error else 'done'};"
          f" {spent:.0f} s, about {left:.0f} s left", flush=True)
  for process in processes:
    process.join()
  return failed


def _running(workdir, todo) -> str:
  """The newest logged step of the runs that are under way."""
  newest = []
  for job in todo:
    for path in sorted((workdir / job.name).glob("**/metrics.jsonl")):
      if time.time() - path.stat().st_mtime < 30 and path.stat().st_size:
        line = json.loads(path.read_text().splitlines()[-1])
        loss, rate = line.get("student/loss"), line.get("steps_per_second")
        newest.append((path.stat().st_mtime, f"{path.parent.relative_to(workdir)} step {line['step']}"
                       + (f" loss {loss:.4g}" if loss is not None else "") + (f" {rate:.0f} steps/s" if rate else "")))
  return "; ".join(text for _, text in sorted(newest)[-2:]) or "starting"


def main(argv: list[str] | None = None) -> int:
  args = argparse.ArgumentParser(prog="launch.demo", description=__doc__.splitlines()[0])
  args.add_argument("--workdir", default="runs/demo", help="everything of the demo lies here")
  args.add_argument("--data_dir", default="", help="where the data is prepared (default: $DDIL_DATA or data/)")
  args.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
  args.add_argument("--smoke", action="store_true", help="two steps of everything on fake data")
  args = args.parse_args(argv)
  workdir = pathlib.Path(args.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  began = time.monotonic()

  students = jobs(str(workdir / "teacher"), args.data_dir, args.smoke)
  data = {"data.data_dir": args.data_dir} if args.data_dir else {}
  teacher = Job("teacher", "configs/digits_teacher.py" + ":smoke" * args.smoke, {} if args.smoke else TEACHER | data)
  print(f"DDIL on digits: one teacher, then {len(students)} students, {args.workers} at a time; stop it with"
        " Ctrl-C at any time, the same command continues", flush=True)
  failed = run_all([teacher], workdir, 1)
  if not failed:
    failed = run_all(students, workdir, args.workers)

  rows = gather([teacher, *students], workdir)
  if rows:
    print(f"report: {workdir / 'report.html'}   rows: {workdir / 'results.json'}   "
          f"({time.monotonic() - began:.0f} s in this sitting)")
  for name, error in failed.items():
    print(f"FAILED {name}: {error} (see {workdir / name / 'log.txt'}; the same command continues)", file=sys.stderr)
  return 1 if failed else 0


def gather(done: list[Job], workdir: pathlib.Path) -> list[dict]:
  """Merges the runs' rows, writes the report, prints the table."""
  from ddil_jax.evaluation import report
  from ddil_jax.training.workdir import write_json_atomic
  folders = [workdir / job.name for job in done if (workdir / job.name / "results.json").exists()]
  rows = [row | {"samples": f"{folder.name}/{row['samples']}"}
          for folder in folders for row in json.loads((folder / "results.json").read_text())]
  if rows:
    write_json_atomic(workdir / "results.json", rows)
    report.write_report(folders, workdir / "report.html")
    overview(rows, workdir)
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
