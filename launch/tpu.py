"""One run on all workers of a TPU pod slice; when one of them fails, all are started again and continue.

    python -m launch.tpu --name=pod --zone=europe-west4-b --folder=ddil_jax --out=run.sh -- train \\
        --config=configs/cifar10_dmd2.py:ddil --workdir=/mnt/runs/dmd2 --config.train.parallel=mesh
    bash run.sh

The script runs where `gcloud` is set up. The project and its environment `.venv` (with `jax[tpu]`) lie in the same
folder on every worker, the workdir on a file system that all of them see. The processes find each other by the TPU's
metadata. After a failure the script ends every `ddil_jax train` on the workers, whose chips only one run can have.
"""

import re
import shlex
import sys

from ddil_jax.errors import UsageError
from launch import rendering

SECONDS_TO_SAVE = 120


def script(arguments: list[str], name: str, zone: str, folder: str, restarts: int) -> str:
  """The script: an ssh to all workers, and again after a failure.

  Args:
    arguments: of `python -m ddil_jax`, beginning with "train".
    name, zone: of the TPU VM.
    folder: of the project on each worker, from the home directory there.
    restarts: how often all workers may be started again.

  Raises:
    UsageError: a name or zone that Google Cloud would not take, or a negative number.
  """
  for flag, value in (("name", name), ("zone", zone)):
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", value):
      raise UsageError(f"--{flag}={value}: small letters, digits and '-' are possible, beginning with a letter")
  if restarts < 0:
    raise UsageError(f"--restarts={restarts}: at least 0 is needed")
  train = shlex.join([".venv/bin/python", "-m", "ddil_jax", *rendering.job_arguments(arguments), "--cluster=tpu"])
  # The brackets keep a pattern from finding the shell that looks for it.
  left = "pgrep -f '[d]dil_jax train' >/dev/null"
  stop = (f"pkill -TERM -f '[d]dil_jax train'; for i in $(seq {SECONDS_TO_SAVE}); do {left} || exit 0; sleep 1; done;"
          " pkill -KILL -f '[d]dil_jax train'; true")
  return f"""#!/bin/bash
set -uo pipefail
on_all() {{
  gcloud compute tpus tpu-vm ssh {name} --zone={zone} --worker=all --command="$1"
}}
train={shlex.quote(f"cd {shlex.quote(folder)} && exec {train}")}
# What is left of the run on other workers holds their chips: it may finish its step and save, then it has to go.
stop={shlex.quote(stop)}
for attempt in $(seq 0 {restarts}); do
  # Its code is that of the first worker, in their order, whose code is not 0.
  on_all "$train"
  code=$?
  case "$code" in
    0|2) exit "$code" ;;
  esac
  echo "run ended with $code after $attempt restarts of at most {restarts}" >&2
  on_all "$stop"
done
exit "$code"
"""


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code."""
  args = rendering.parser("launch.tpu", __doc__, "run.sh")
  args.add_argument("--name", required=True, help="of the TPU VM")
  args.add_argument("--zone", required=True)
  args.add_argument("--folder", default="ddil_jax", help="of the project on each worker")
  args.add_argument("--restarts", type=int, default=100, help="of all workers, after one of them failed")
  found = args.parse_args(argv)
  return rendering.deliver("launch.tpu", found, lambda: script(found.arguments, found.name, found.zone, found.folder,
                                                               found.restarts), "bash")


if __name__ == "__main__":
  sys.exit(main())
