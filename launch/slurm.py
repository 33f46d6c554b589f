"""One run as a SLURM job: a process for each GPU, on one or more nodes; a preempted job is queued again and continues.

    python -m launch.slurm --nodes=2 --gpus=8 --time=24:00:00 --out=run.sh -- train \\
        --config=configs/cifar10_dmd2.py:ddil --workdir=runs/dmd2 --config.teacher.path=runs/teacher \\
        --config.train.parallel=mesh
    sbatch run.sh

The processes find each other by what SLURM sets. Two minutes before a job's time is over SLURM sends SIGTERM: the
run finishes its step, saves, and ends with 130. Then it is queued again. So is a run that failed, but not for wrong
usage, and not when its job has been queued again --restarts times.
"""

import re
import shlex
import sys

from ddil_jax.errors import UsageError
from launch import rendering

SECONDS_TO_SAVE = 120


def script(arguments: list[str], nodes: int, gpus: int, time: str, name: str = "ddil", restarts: int = 100,
           log: str = "%x-%j.txt") -> str:
  """The batch script.

  Args:
    arguments: of `python -m ddil_jax`, beginning with "train".
    nodes, gpus: how many nodes, and GPUs of each.
    time: limit as SLURM has it, "24:00:00" or "2-00:00:00".
    name: of the job.
    restarts: a run that fails is queued again while SLURM has queued its job less often than that, for any reason.
    log: file of the output; SLURM fills in %x and %j.

  Raises:
    UsageError: a value that SLURM would not take.
  """
  if nodes < 1 or gpus < 1:
    raise UsageError(f"--nodes={nodes} --gpus={gpus}: at least 1 of each is needed")
  if restarts < 0:
    raise UsageError(f"--restarts={restarts}: at least 0 is needed")
  if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", time):
    raise UsageError(f"--time={time}: a limit such as 24:00:00 or 2-00:00:00 is needed")
  if not re.fullmatch(r"[\w.-]+", name):
    raise UsageError(f"--name={name}: letters, digits, '.', '_' and '-' only")
  command = shlex.join(["python", "-m", "ddil_jax", *rendering.job_arguments(arguments)])
  return f"""#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --signal=TERM@{SECONDS_TO_SAVE}
#SBATCH --open-mode=append
#SBATCH --output={shlex.quote(log)}
set -uo pipefail
# A process that dies takes the others with it: they could not go on.
srun --kill-on-bad-exit=1 {command}
code=$?
case "$code" in
  0|2) exit "$code" ;;
  130) ;;
  *) if (( ${{SLURM_RESTART_COUNT:-0}} >= {restarts} )); then
       echo "run ended with $code, and its job was queued again {restarts} times or more" >&2
       exit "$code"
     fi ;;
esac
scontrol requeue "$SLURM_JOB_ID"
"""


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code."""
  args = rendering.parser("launch.slurm", __doc__, "run.sh")
  args.add_argument("--nodes", type=int, default=1)
  args.add_argument("--gpus", type=int, default=1, help="of each node; a process for each")
  args.add_argument("--time", default="24:00:00", help="limit of the job")
  args.add_argument("--name", default="ddil")
  args.add_argument("--restarts", type=int, default=100, help="times the job is queued again when the run fails")
  found = args.parse_args(argv)
  return rendering.deliver("launch.slurm", found, lambda: script(found.arguments, found.nodes, found.gpus, found.time,
                                                                 found.name, found.restarts), "sbatch")


if __name__ == "__main__":
  sys.exit(main())
