"""Several processes that train one run: how they find each other, what they have to agree on.

Every process runs the same program on its own devices and its own share of each batch; process 0 alone
writes. What one process finds wrong before training starts, all of them say, so that none waits for
another that has given up.
"""

import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from ddil_jax.errors import RunError, UsageError
from ddil_jax.registry import unknown
from ddil_jax.training.workdir import differences

METHODS = ("auto", "none", "slurm", "kubernetes", "tpu")
_PATIENCE = 24 * 3600  # seconds
_meetings = itertools.count()
# Set by the manifest of `launch/k8s.py`; the index is Kubernetes' own.
COORDINATOR, NUM_PROCESSES, INDEX = "DDIL_COORDINATOR", "DDIL_NUM_PROCESSES", "JOB_COMPLETION_INDEX"


class Cluster(NamedTuple):
  """How this process finds the others; what is None is found out by JAX with `method`."""
  method: str
  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None


def find(method: str = "auto", coordinator: str | None = None, num_processes: int | None = None,
         process_id: int | None = None, environ: Mapping[str, str] = os.environ) -> Cluster | None:
  """How processes find each other, or None for one process.

  Args:
    method: an entry of METHODS. "auto" takes what is there: the three flags, SLURM with several tasks, the
      variables of an indexed Job, several TPU workers; else it is one process.
    coordinator, num_processes, process_id: flags, all or none: "HOST:PORT" of process 0, how many, which.

  Raises:
    UsageError: an unknown method, or a part that is missing or wrong.
  """
  if method not in METHODS:
    raise UsageError(unknown("--cluster", method, METHODS))
  flags = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
  given = [name for name, value in flags.items() if value is not None]
  if given:
    if method != "auto" or len(given) < len(flags):
      raise UsageError(f"{', '.join(given)}: {', '.join(flags)} go together, and without --cluster")
    return _explicit("flags", coordinator, num_processes, process_id)
  if method == "slurm" or method == "auto" and int(environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environ:
    return Cluster("slurm")
  if method == "kubernetes" or method == "auto" and COORDINATOR in environ:
    missing = [name for name in (COORDINATOR, NUM_PROCESSES, INDEX) if not environ.get(name)]
    if missing:
      raise UsageError(f"--cluster=kubernetes: the variable(s) {', '.join(missing)} are not set; `launch.k8s` renders"
                       " a manifest that sets them")
    return _explicit("kubernetes", *(environ[name] for name in (COORDINATOR, NUM_PROCESSES, INDEX)))
  if method == "tpu" or method == "auto" and environ.get("TPU_WORKER_HOSTNAMES", "").count(","):
    return Cluster("tpu")
  return None


def _explicit(method, coordinator, num_processes, process_id) -> Cluster:
  try:
    count, index = int(num_processes), int(process_id)
  except ValueError:
    raise UsageError(f"{num_processes} processes, process {process_id}: whole numbers are needed") from None
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal():
    raise UsageError(f"coordinator {coordinator!r}: HOST:PORT of process 0 is needed, such as node0:8476")
  if not 0 <= index < count:
    raise UsageError(f"process {index} of {count}: 0 to {count - 1} is needed")
  return Cluster(method, coordinator, count, index)


def start(cluster: Cluster, timeout: int = 300) -> None:
  """Connects this process with the others; before anything else touches a device.

  Args:
    timeout: seconds to wait for the others.

  Raises:
    UsageError: JAX cannot find out who they are. RunError: they do not come.
  """
  detection = {"flags": "deactivate", "kubernetes": "deactivate", "slurm": "slurm", "tpu": None}[cluster.method]
  try:
    jax.distributed.initialize(cluster.coordinator, cluster.num_processes, cluster.process_id,
                               cluster_detection_method=detection, initialization_timeout=timeout)
  except ValueError as error:
    raise UsageError(f"--cluster={cluster.method}: {error}") from error
  except RuntimeError as error:
    raise RunError(f"the processes did not find each other within {timeout} s ({str(error).splitlines()[0]});"
                   " see whether all of them run and reach the coordinator") from error


def count() -> int:
  """How many processes train together."""
  return jax.process_count()


def is_first() -> bool:
  """Whether this is the process that writes."""
  return jax.process_index() == 0


def exchange(text: str) -> list[str]:
  """The texts of all processes, in their order."""
  if count() == 1:
    return [text]
  mine = np.frombuffer(text.encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(len(mine)))
  rows = multihost_utils.process_allgather(np.pad(mine, (0, int(lengths.max()) + 1 - len(mine))))
  return [bytes(row[:length]).decode() for row, length in zip(rows, lengths)]


def together(work: Callable[[], Any]):
  """`work()` in every process. Where it fails in one it fails in all, with the words of the first that failed."""
  if count() == 1:
    return work()
  result, mine = None, None
  try:
    result = work()
  except Exception as error:  # raised below, when the others know
    mine = error
  said = exchange("" if mine is None else json.dumps([isinstance(mine, UsageError), f"{mine}"]))
  if mine is not None:
    raise mine
  for index, text in enumerate(said):
    if text:
      usage, line = json.loads(text)
      raise (UsageError if usage else RunError)(f"process {index}: {line}")
  return result


def meet(what: str) -> None:
  """Waits for the others, also for hours: through the coordinator, since collectives give up after seconds or minutes.

  Args:
    what: they meet for; unlike what any of them meets for elsewhere at the same time.

  Raises:
    RunError: one of them is gone.
  """
  try:
    multihost.get_barrier_sync_fn()(key=f"{what} {next(_meetings)}", timeout_ms=_PATIENCE * 1000)
  except jax.errors.JaxRuntimeError as error:
    raise RunError(f"the other processes did not come to {what}: {str(error).splitlines()[0]}") from error


def require_agreement(about: dict) -> None:
  """Checks that all processes have the same of what they must have the same.

  Args:
    about: nested dicts of what JSON can hold, such as {"config": {...}, "code": "1a2b"}.

  Raises:
    UsageError: in every process, with the fields that differ.
  """
  everyone = [json.loads(text) for text in exchange(json.dumps(about, sort_keys=True))]
  for index, other in enumerate(everyone):
    differ = differences(everyone[0], other)
    if differ:
      parts = [f"{name} is {a!r} in process 0, {b!r} in process {index}" for name, (a, b) in differ.items()]
      more = f"; and {len(parts) - 6} more" if len(parts) > 6 else ""
      raise UsageError(f"the processes do not agree: {'; '.join(parts[:6])}{more}; start all with the same config,"
                       " code and data")


def code_hash() -> str:
  """sha256 (16 digits) of the package's source: what is committed and what is not."""
  package = pathlib.Path(__file__).parents[1]
  h = hashlib.sha256()
  for path in sorted(package.rglob("*.py")):
    h.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
  return h.hexdigest()[:16]


def array_hash(*arrays: np.ndarray) -> str:
  """sha256 (16 digits) of arrays."""
  h = hashlib.sha256()
  for x in arrays:
    h.update(f"{x.dtype.str}{x.shape}".encode())
    h.update(np.ascontiguousarray(x).data.cast("B") if x.size else b"")
  return h.hexdigest()[:16]
