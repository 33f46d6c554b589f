"""The study: parts of configs/study/, each a sweep over students of one teacher, on digits but for the last two.

    python -m launch.study methods --workdir=runs/study --workers=2
    python -m launch.study --list

A part can be stopped and continued. Its rows go to results.csv and results.parquet in its folder.
"""

import argparse
import itertools
import os
import pathlib
import re
import sys
from collections.abc import Sequence

from ddil_jax import config as config_lib
from ddil_jax import build, files, trained
from ddil_jax import sweep as sweeps
from ddil_jax.errors import RunError, UsageError
from ddil_jax.evaluation import family, inference, report_figures, report_rows, shift_quality, teacher_acts
from ddil_jax.sweep import Trial
from launch.sweep import at_least_one, compile_cache, exit_code, run_all

INTERVENTION, CORRELATION, INFERENCE, FAMILY = "intervention", "correlation", "inference", "family"
DIGITS = ("methods", "methods_dmd2", "guided", "sources", "sources_dmd2", "priors", "replay", "reflection",
          "reflection_target", "regimes", "regimes_dmd2")
ALONE = ("fashion_mnist", FAMILY)  # for a GPU; for hours
PARTS = (*DIGITS, "fashion_mnist_small", *ALONE)
# What is added to the teacher's sampler; {} is nothing.
TRANSFORMS = ({}, {"cache": "deep0"}, {"cache": "skips"}, {"time_shift": 0.02, "time_shift_cutoff": 0.2},
              {"time_shift": 0.1, "time_shift_cutoff": 0.2})
# Of the parts that name none of their own. The scales at which it is measured are those of its students.
TEACHER = {"config": "configs/digits_teacher.py", "eval.guidance_scales": (1.0, 2.0, 3.0, 5.0)}


def run(part: str, workdir: pathlib.Path, workers: int, retry: bool = False, train: bool = True,
        others: Sequence[str] = ()) -> dict[str, str]:
  """Trains the teacher where it is not there yet, then the trials of a part; returns {name: error}.

  Args:
    train: False gathers the results there are.
    others: see `compare_family`; their runs are not made again.
  """
  elsewhere = {row.run for path in others for row in report_rows.rows_of_table(path)} if part == FAMILY else ()
  own = getattr(config_lib.module(f"configs/study/{part}.py"), "TEACHER", None)
  # Compile flags that are for networks of a few pixels.
  name, digits = (f"{part}_teacher", False) if own else ("teacher", True)
  if train:
    _train_teacher(name, own or TEACHER, workdir, digits)
  trials = sweeps.trials(f"configs/study/{part}.py", {"teacher.path": str(workdir / name)}, workdir / part)
  folder = workdir / part
  sweeps.save(trials, folder)
  trials = [trial for trial in trials if trial.name not in elsewhere]
  failed = run_all(trials, folder, workers, retry, small=digits) if train else {}
  rows = sweeps.gather(trials, folder)
  sweeps.write_table(rows, folder)
  if part == FAMILY:
    print(compare_family(workdir, others))
  return failed


def _train_teacher(name: str, fields: dict, workdir: pathlib.Path, small: bool) -> None:
  own = {field: repr(value) for field, value in fields.items() if field not in ("config", "arg")}
  failed = run_all([Trial(name, fields["config"], own)], workdir, 1, retry=True, small=small)
  if failed:
    raise RunError(f"the teacher failed: {failed[name]}")


def compare_family(workdir: pathlib.Path, others: Sequence[str | pathlib.Path] = ()) -> str:
  """10. The table of every method, also in family/table.md, beside the figure; of what was run so far.

  Args:
    others: tables of the same sweep whose rows are taken too, of other seeds that were run elsewhere.

  Raises:
    UsageError: no table, no rows, or a run that two tables have.
  """
  rows, origin = [], {}
  for path in (workdir / FAMILY / "results.csv", *others):
    found = report_rows.rows_of_table(path)
    twice = next((row.run for row in found if row.run in origin), None)
    if twice:
      raise UsageError(f"the run {twice} is in {origin[twice]} and in {path}; give tables of other seeds")
    origin |= {row.run: path for row in found}
    rows += found
  lines = family.lines(rows, config_lib.module(f"configs/study/{FAMILY}.py").FAMILIES)
  if not lines:
    raise UsageError(f"{workdir / FAMILY} has no results yet")
  measured = {metric for row in rows for metric in row.metrics}
  teacher = {(row.steps, row.guidance_scale): value
             for run in report_rows.runs_of([workdir / "teacher"], []) for row in run.rows
             for metric, value in row.metrics.items() if metric.startswith("fd@") and metric in measured}
  table = family.markdown(lines, teacher)
  files.write_bytes(workdir / FAMILY / "table.md", table.encode())
  report_figures.save([family.draw(lines, teacher)], workdir / FAMILY)
  return table


def transform(workdir: pathlib.Path, train: bool = True) -> str:
  """11. DeepCache, encoder propagation and shifted times in the teacher's sampler of 16, 8 and 4 steps.

  Three seeds of sampling, with guidance 1 and 3. No training, but for the teacher where it is not there yet.

  Returns:
    The table, also in inference/table.md, beside the rows.

  Raises:
    UsageError: train is False, and there are no rows yet.
  """
  if train:
    _train_teacher("teacher", TEACHER, workdir, small=True)
    compile_cache(workdir)
  rows = []
  for added, seed in itertools.product(TRANSFORMS, range(3)):
    kept = workdir / INFERENCE / f"{'-'.join(f'{k}={v}' for k, v in added.items()) or 'plain'}-eval.seed={seed}.json"
    if not kept.exists() and train:
      config = trained.saved_config(workdir / "teacher").copy_and_resolve_references().unlock()
      config.objective.sampler_steps, config.eval.sampler_steps = 16, (8, 4)
      config.eval.update(added, guidance_scales=(1.0, 3.0), metrics=("fd",), shift_samples=0, seed=seed)
      files.write_json(kept, [row | {"eval_seed": seed} for row in trained.measured(config, workdir / "teacher")])
      print(f"{kept.stem}: done", flush=True)
    rows += files.read_json(kept) if kept.exists() else []
  if not rows:
    raise UsageError(f"{workdir / INFERENCE} has no results yet")
  table = inference.markdown(rows)
  files.write_bytes(workdir / INFERENCE / "table.md", table.encode())
  return table


def intervene(workdir: pathlib.Path) -> str:
  """7. The teacher takes none, the first, the last, or more of four steps, in the students of `methods` and `guided`.

  Students are those with and without DDIL, unreflected. The teacher is the first one, also of a student in stages.

  Returns:
    The table, also in intervention/table.md, beside the rows and the figure.

  Raises:
    UsageError: no four-step students are there.
  """
  compile_cache(workdir)
  students = [path.parent for part in ("methods", "methods_dmd2", "guided")
              for path in sorted((workdir / part).glob("**/config.json")) if (path.parent / "checkpoints").exists()]
  rows = []
  for student in students:
    kept = workdir / INTERVENTION / f"{'-'.join(student.relative_to(workdir).parts)}.json"
    if kept.exists():
      rows += files.read_json(kept)
      continue
    config, own = trained.saved_config(student).copy_and_resolve_references().unlock(), []
    config.teacher = _first_teacher(config)
    if config.reflect.kind != "identity" or len(build.build(config).objective.sampler_grid) != 5:
      continue
    for acts in ((), (0,), (3,), (0, 1), (2, 3), (0, 1, 2), (0, 1, 2, 3)):
      config.eval.update(sampler_steps=(), teacher_acts=acts, shift_samples=0)
      own += trained.measured(config, student)
    files.write_json(kept, own)
    rows += own
    print(f"{student.relative_to(workdir)}: {len(own)} rows", flush=True)
  if not rows:
    raise UsageError(f"{workdir} has no four-step students: run the parts methods or guided first")
  files.write_json(workdir / INTERVENTION / "results.json", rows)
  found = teacher_acts.compare(rows)
  table = teacher_acts.markdown(found)
  files.write_bytes(workdir / INTERVENTION / "table.md", table.encode())
  report_figures.save([teacher_acts.draw(found)], workdir / INTERVENTION)
  return table


def _first_teacher(config):
  """config.teacher of the first stage: the teacher of a late one is a student itself."""
  of_teacher = trained.saved_config(config.teacher.path)
  return _first_teacher(of_teacher) if of_teacher.teacher.path else config.teacher


def correlate(workdir: pathlib.Path) -> str:
  """8. Does the measured shift predict the quality? Correlations over the settings of all digits parts that were run.

  Returns:
    The table, also in correlation/table.md, beside the figure.

  Raises:
    UsageError: fewer than six settings of one method, guidance scale and number of steps.
  """
  rows = []
  for part in DIGITS:
    for path in sorted((workdir / part).glob("*/results.json")):
      setting = f"{part}/" + re.sub(r"-?seed=\d+$", "", path.parent.name)
      rows += [(setting, row) for row in files.read_json(path)]
  points = shift_quality.points(rows)
  found = shift_quality.correlate(points)
  if not found:
    raise UsageError(f"{workdir} has results of {len(points)} settings; a correlation needs {shift_quality.LEAST} of"
                     " one method, guidance scale and number of steps: run more parts first")
  table = shift_quality.markdown(found)
  files.write_bytes(workdir / CORRELATION / "table.md", table.encode())
  report_figures.save([shift_quality.draw(points)], workdir / CORRELATION)
  return table


def parser() -> argparse.ArgumentParser:
  """The command line's grammar."""
  args = argparse.ArgumentParser(prog="launch.study", description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
  args.add_argument("parts", nargs="*", metavar="PART", help=f"some of: {', '.join(PARTS)}")
  args.add_argument("--all", action="store_true", help="all parts but fashion_mnist, which is for a GPU, and family")
  args.add_argument("--workdir", default="runs/study", help="everything of the study lies here")
  args.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
  args.add_argument("--retry", action="store_true", help="run failed trials again")
  args.add_argument("--table", action="store_true", help="gather the results there are, run nothing")
  args.add_argument("--rows", action="append", default=[], metavar="FILE.csv", help="of family: a table of the same"
                    " sweep, of seeds that were run elsewhere; its rows are taken too, and its runs not made again")
  args.add_argument("--list", action="store_true", help="say what each part asks, and its number of runs")
  return args


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, 1 where a trial failed, 2 for a mistake in usage, 130 when interrupted."""
  args = parser().parse_args(argv)
  return exit_code(lambda: _main(args))


def _main(args) -> int:
  at_least_one(workers=args.workers)
  # Those that train nothing, or a teacher alone.
  others = {INTERVENTION: intervene, CORRELATION: correlate, INFERENCE: transform}
  unknown = [part for part in args.parts if part not in (*PARTS, *others)]
  if unknown:
    raise UsageError(f"unknown part '{unknown[0]}' of the study; there are: {', '.join((*PARTS, *others))}")
  everything = (*(part for part in PARTS if part not in ALONE), INTERVENTION, CORRELATION)
  parts = everything if args.all else args.parts
  if args.list or not parts:
    for part in PARTS:
      about = config_lib.module(f"configs/study/{part}.py").__doc__.splitlines()[0]
      print(f"{part} ({len(sweeps.trials(f'configs/study/{part}.py'))} runs): {about}")
    for name, what in others.items():
      print(f"{name} (no runs): {what.__doc__.splitlines()[0]}")
    return 0
  code = 0
  for part in parts:
    if part in others:
      workdir = pathlib.Path(args.workdir)
      print(transform(workdir, not args.table) if part == INFERENCE else others[part](workdir))
      continue
    failed = run(part, pathlib.Path(args.workdir), args.workers, args.retry, not args.table, args.rows)
    for name, error in failed.items():
      print(f"FAILED {name}: {error}", file=sys.stderr)
    code |= bool(failed)
    print(f"{part}: {pathlib.Path(args.workdir) / part / 'results.csv'}", flush=True)
  return code


if __name__ == "__main__":
  sys.exit(main())
