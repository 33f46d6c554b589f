"""Runs the trials of a config's `sweep()`: here on worker processes, or as a SLURM or Kubernetes job.

    python -m launch.sweep --config=configs/digits_pd.py --workdir=runs/sweep --config.teacher.path=runs/teacher
    python -m launch.sweep --workdir=runs/sweep            # continues it
    python -m launch.sweep --workdir=runs/sweep --retry    # failed trials again
    python -m launch.sweep --workdir=runs/sweep --slurm && sbatch runs/sweep/slurm.sh
    python -m launch.sweep --config=configs/digits_pd.py --workdir=/data/sweep --config.teacher.path=/data/teacher \\
        --k8s --image=IMAGE --claim=CLAIM --dry_run | kubectl apply -f -

Every trial has its own run directory; a sweep can be stopped and continued at any time. The results of
all trials, with the config fields that vary, lie in results.csv and results.parquet.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import pathlib
import queue as queues
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from ddil_jax import config as config_lib
from ddil_jax import files
from ddil_jax import sweep as sweeps
from ddil_jax.errors import RunError, UsageError
from ddil_jax.sweep import Trial
from launch import k8s

# Networks of a few pixels run as fast, and compile in half the time.
SMALL = "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"

PATIENCE = 10.0  # seconds without a trial that ended, until a line says what is under way


def train(trial: Trial, workdir: pathlib.Path) -> None:
  """One trial, in this process; its own output goes to log.txt. An error leaves `failed.json` and is raised."""
  from ddil_jax import runs
  from ddil_jax.training.loop import Stopped
  folder, config = workdir / trial.name, None
  folder.mkdir(parents=True, exist_ok=True)
  (folder / sweeps.FAILED).unlink(missing_ok=True)
  with open(folder / "log.txt", "a", buffering=1) as log:
    old, sys.stdout = sys.stdout, log
    try:
      config = trial.config()
      if trial.after and (workdir / trial.after / sweeps.FAILED).exists():
        raise RunError(f"the run of its teacher, {trial.after}, failed")
      runs.train(config, folder)
    except Stopped:
      raise
    except Exception as error:
      expected = isinstance(error, RunError | UsageError)
      if not expected:
        traceback.print_exc(file=log)
      text = str(error) if expected else f"{type(error).__name__}: {error}"
      known = {"config": config_lib.to_dict(config), "variant": _variant(config)} if config else {}
      files.write_json(folder / sweeps.FAILED, {"error": " ".join(text.split())} | known)
      raise
    finally:
      sys.stdout = old


def _variant(config) -> str:
  """What a report calls a run of this config; "not built" where it cannot be."""
  from ddil_jax import build, measure
  try:
    return measure.variant(config, build.build(config))
  except Exception:  # whatever ended the run may stand in the way here too, and is told already
    return "not built"


def worker(index: int, count: int, todo, outcomes, workdir: str, small: bool) -> None:
  """Takes trials until there are none; one that fails is reported and the next one taken."""
  # Ctrl-C is for the parent alone, which asks its workers to save and stop; so does its death.
  os.setsid()
  threading.Thread(target=_stop_with_parent, daemon=True).start()
  # Its share of the cores: small nets run no faster on two than on one.
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  if count > 1 and len(cores) >= count:
    os.sched_setaffinity(0, cores[index::count])
  if small:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {SMALL}"
  compile_cache(pathlib.Path(workdir))
  from ddil_jax.training.loop import Stopped
  for trial in iter(todo.get, None):
    try:
      train(trial, pathlib.Path(workdir))
      outcomes.put((trial.name, ""))
    except (Stopped, KeyboardInterrupt):
      return
    except Exception as error:  # one failed trial must not end the sweep; it is listed at the end
      outcomes.put((trial.name, f"{type(error).__name__}: {error}"))


def compile_cache(workdir: pathlib.Path) -> None:
  """Compiled programs are kept in the work directory, where they go with it; also the small ones, which are many."""
  from ddil_jax.training import compiling
  compiling.keep_programs(str(workdir.resolve() / ".jax_cache"), least_seconds=0)


def _stop_with_parent():
  multiprocessing.parent_process().join()
  os.kill(os.getpid(), signal.SIGTERM)


def run_all(trials: list[Trial], workdir: pathlib.Path, workers: int, retry: bool = False,
            small: bool = False) -> dict[str, str]:
  """Runs trials on worker processes with a steady progress line.

  Args:
    retry: failed ones are tried again; else they are left and listed.
    small: compile flags for networks of a few pixels.

  Returns:
    {name: error} of the failed ones.
  """
  states = {trial.name: sweeps.status(trial, workdir) for trial in trials}
  failed = {} if retry else {trial.name: files.read_json(workdir / trial.name / sweeps.FAILED)["error"]
                             for trial in trials if states[trial.name] == "failed"}
  todo = [trial for trial in trials if states[trial.name] != "done" and trial.name not in failed]
  done_before = sum(state == "done" for state in states.values())
  if done_before or failed:
    print(f"{done_before} of {len(trials)} trials are done already" + (
        f", {len(failed)} failed before (--retry runs these again)" if failed else ""), flush=True)
  if not todo:
    return failed
  context = multiprocessing.get_context("spawn")
  count, outcomes = min(workers, len(todo)), context.Queue()
  todos = [context.Queue() for _ in range(count)]
  for queue in todos:
    queue.cancel_join_thread()  # else a stopped sweep waits for ever for a worker to take the trial that it was given
  processes = [context.Process(target=worker, daemon=True, args=(i, count, todos[i], outcomes, str(workdir), small))
               for i in range(count)]
  for process in processes:
    process.start()
  try:
    failed |= _follow(todo, processes, todos, outcomes, workdir)
  except BaseException:
    print("stopping: the trials under way save their state", flush=True)
    for process in processes:
      process.terminate()
    raise
  finally:
    for process in processes:
      process.join()
  return failed


def setting(trial: Trial):
  """What the seeds of a trial have in common; in one worker they share what was built and compiled."""
  return trial.spec, {field: value for field, value in trial.overrides.items() if field not in ("seed", "teacher.path")}


def choose(ready: list[Trial], last: Trial | None, others: list[Trial]) -> Trial | None:
  """The next trial of a worker: another seed of its `last`, else a setting that none of the `others` has, else any."""
  own = [trial for trial in ready if last and setting(trial) == setting(last)]
  free = [trial for trial in ready if setting(trial) not in [setting(other) for other in others]]
  return next(iter(own or free or ready), None)


def _follow(todo, processes, todos, outcomes, workdir) -> dict[str, str]:
  """Hands trials out, those with a teacher among them after it, and prints how they fare; returns {name: error}."""
  began, failed, left = time.monotonic(), {}, list(todo)
  unfinished = {trial.name for trial in todo}
  taken: list[Trial | None] = [None] * len(processes)  # by each worker, the last one or under way
  while unfinished:
    for i, process in enumerate(processes):
      if process.is_alive() and (taken[i] is None or taken[i].name not in unfinished):
        ready = [trial for trial in left if trial.after not in unfinished]
        trial = choose(ready, taken[i], [t for t in taken[:i] + taken[i + 1:] if t and t.name in unfinished])
        if trial:
          left.remove(trial)
          taken[i] = trial
          todos[i].put(trial)
    try:
      name, error = outcomes.get(timeout=PATIENCE)
    except queues.Empty:
      if not any(p.is_alive() and t and t.name in unfinished for p, t in zip(processes, taken)):
        raise RunError("the worker processes ended (out of memory?); the same command continues") from None
      print(f"  {_running(workdir, todo)}", flush=True)
      continue
    unfinished.remove(name)
    if error:
      failed[name] = error
    spent, done = time.monotonic() - began, len(todo) - len(unfinished)
    print(f"[{done}/{len(todo)}] {name}: {'FAILED: ' + error if error else 'done'};"
          f" {spent:.0f} s, about {spent / done * len(unfinished):.0f} s left", flush=True)
  for queue in todos:
    queue.put(None)
  return failed


@contextlib.contextmanager
def sigterm_as_interrupt():
  """SIGTERM, as schedulers send it, does what Ctrl-C does."""
  def interrupt(number, frame):
    raise KeyboardInterrupt  # not by SIGINT, which a background process may ignore

  old = signal.signal(signal.SIGTERM, interrupt)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, old)


def at_least_one(**arguments: int) -> None:
  """Raises UsageError for an argument below 1."""
  for name, value in arguments.items():
    if value < 1:
      raise UsageError(f"--{name}={value}: at least 1 is needed")


def exit_code(run: Callable[[], int]) -> int:
  """The code of run(); mistakes (2), failures (1) and interrupts (130) are one line on stderr."""
  try:
    with sigterm_as_interrupt():
      return run()
  except UsageError as error:
    print(f"ddil: {error}", file=sys.stderr)
    return 2
  except RunError as error:
    print(f"ddil: run failed: {error}", file=sys.stderr)
    return 1
  except OSError as error:
    print(f"ddil: run failed: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("ddil: stopped; the same command continues", file=sys.stderr)
    return 130


def _running(workdir, todo) -> str:
  """The newest logged step of the trials that are under way."""
  newest = []
  for trial in todo:
    for path in sorted((workdir / trial.name).glob("**/metrics.jsonl")):
      if time.time() - path.stat().st_mtime < 30 and path.stat().st_size:
        line = json.loads(path.read_text().splitlines()[-1])
        loss, rate = line.get("student/loss"), line.get("steps_per_second")
        newest.append((path.stat().st_mtime, f"{path.parent.relative_to(workdir)} step {line['step']}"
                       + (f" loss {loss:.4g}" if loss is not None else "") + (f" {rate:.0f} steps/s" if rate else "")))
  return "; ".join(text for _, text in sorted(newest)[-2:]) or "starting"


# Elsewhere ----------------------------------------------------------------------------------


def commands(trials: list[Trial], workdir: pathlib.Path) -> list[str]:
  """A shell line for each trial, quoted."""
  return [shlex.join(["python", "-m", "ddil_jax", "train", f"--config={t.spec}", f"--workdir={workdir / t.name}",
                      *(f"--config.{field}={text}" for field, text in t.overrides.items())]) for t in trials]


def slurm_script(trials: list[Trial], workdir: pathlib.Path) -> str:
  """A job array, a task for each trial; a preempted task is queued again and continues."""
  return f"""#!/bin/bash
#SBATCH --job-name=ddil-sweep
#SBATCH --array=0-{len(trials) - 1}
#SBATCH --gres=gpu:1
#SBATCH --requeue
#SBATCH --output={shlex.quote(str(workdir / "slurm-%a.txt"))}
set -euo pipefail
srun python -m launch.sweep --workdir={shlex.quote(str(workdir))} --only="$SLURM_ARRAY_TASK_ID"
"""


def k8s_manifest(trials: list[Trial], workdir: pathlib.Path, options: list[str], name: str, given: k8s.Needs) -> str:
  """An indexed Job, a pod for each trial; one that fails leaves the others alone.

  Args:
    workdir: as the pods see it.
    options: --config and its fields, by which the pods make the sweep; none where it is there already.
    name, given: of the Job, and of each pod.

  Raises:
    UsageError: a folder that is not on the pods' volume, or a name that Kubernetes would not take.
  """
  if not workdir.is_relative_to(k8s.VOLUME):
    raise UsageError(f"--workdir={workdir}: pods keep what lies in {k8s.VOLUME}, where they have the volume of --claim")
  command = ["python", "-m", "launch.sweep", f"--workdir={workdir}", *options]
  spec = k8s.pod([*map(k8s.literal, command), "--only=$(JOB_COMPLETION_INDEX)"], given)
  return json.dumps(k8s.job(name, len(trials), spec, each=True), indent=2) + "\n"


class Job(NamedTuple):
  """What a scheduler gets: a file's name and text, and the command that starts it."""
  file: str
  text: str
  start: str


def _job(args, rest, trials, workdir) -> Job:
  waiting = next((trial for trial in trials if trial.after), None)
  if waiting:
    raise UsageError(f"trial {waiting.name} has the run of {waiting.after} as its teacher, but the tasks of a job start"
                     " at once; run the sweep with --workers, or its commands (--dry_run) in order")
  if args.slurm:
    return Job("slurm.sh", slurm_script(trials, workdir), "sbatch")
  options = [f"--config={args.config}", *rest] if args.config else []
  return Job("job.json", k8s_manifest(trials, workdir, options, args.name, k8s.needs(args)), "kubectl apply -f")


def parser() -> argparse.ArgumentParser:
  """The command line's grammar; --config.FIELD=VALUE sets a field of every trial."""
  args = argparse.ArgumentParser(prog="launch.sweep", description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
  args.add_argument("--config", metavar="FILE.py[:ARG]", help="whose sweep() to run; not needed to continue")
  args.add_argument("--workdir", required=True, metavar="DIR", help="everything of the sweep lies here")
  args.add_argument("--workers", type=int, default=1, help="trials at a time on this machine")
  args.add_argument("--retry", action="store_true", help="run failed trials again")
  args.add_argument("--dry_run", action="store_true",
                    help="print a command for each trial, or what --slurm or --k8s would write; write and run nothing")
  what = args.add_mutually_exclusive_group()
  what.add_argument("--only", type=int, metavar="I", help="the I-th trial alone, counted from 0")
  what.add_argument("--slurm", action="store_true", help="write slurm.sh, a job array, to the work directory")
  what.add_argument("--k8s", action="store_true", help="write job.json, an indexed Job, to the work directory")
  what.add_argument("--table", action="store_true", help="gather the results there are, run nothing")
  pods = args.add_argument_group("with --k8s")
  pods.add_argument("--name", default="ddil-sweep", help="of the Job")
  k8s.add_options(pods)
  return args


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, 1 where a trial failed, 2 for a mistake in usage, 130 when interrupted."""
  args, rest = parser().parse_known_args(argv)
  return exit_code(lambda: _run(args, rest))


def _run(args, rest) -> int:
  from ddil_jax.main import overrides_of
  workdir = pathlib.Path(args.workdir)
  at_least_one(workers=args.workers)
  overrides = overrides_of(rest, "train")
  if overrides and not args.config:
    raise UsageError("--config.FIELD=VALUE needs --config=FILE.py: a sweep that is there keeps its trials")
  every = sweeps.trials(args.config, overrides, workdir) if args.config else sweeps.load(workdir)
  trials = every
  if args.only is not None:
    if not 0 <= args.only < len(trials):
      raise UsageError(f"--only={args.only}: this sweep has the trials 0 to {len(trials) - 1}")
    trials = [trials[args.only]]
  job = _job(args, rest, trials, workdir) if args.slurm or args.k8s else None
  if args.dry_run:
    print(job.text if job else "".join(f"{line}\n" for line in commands(trials, workdir)), end="")
    return 0
  if args.config:
    sweeps.save(every, workdir)
  if job:
    files.write_bytes(workdir / job.file, job.text.encode())
    print(f"wrote {workdir / job.file}; start it with: {job.start} {shlex.quote(str(workdir / job.file))}")
    return 0
  failed = {} if args.table else run_all(trials, workdir, args.workers, args.retry)
  if args.only is None:
    rows = sweeps.gather(trials, workdir)
    sweeps.write_table(rows, workdir)
    print(f"{sum(row['status'] == 'done' for row in rows)} rows of results: {workdir / 'results.csv'}, "
          f"{workdir / 'results.parquet'}")
  for name, error in failed.items():
    print(f"FAILED {name}: {error} (see {workdir / name / 'log.txt'}; --retry runs it again)", file=sys.stderr)
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
