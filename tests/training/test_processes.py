"""How processes find each other, from flags and from what clusters set."""

import pytest

from ddil_jax.errors import UsageError
from ddil_jax.training import processes
from ddil_jax.training.processes import Cluster, find

JOB = {"DDIL_COORDINATOR": "run-0.run:8476", "DDIL_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"}
TASKS = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}


@pytest.mark.parametrize("flags, environ, expected", [
    ((), {}, None),
    (("auto", "node0:8476", 2, 1), TASKS, Cluster("flags", "node0:8476", 2, 1)),
    ((), TASKS, Cluster("slurm")),
    ((), TASKS | {"SLURM_NTASKS": "1"}, None),  # a task of an array job is alone
    ((), {"SLURM_NTASKS": "2"}, None),  # in the batch script, outside of srun
    (("none",), TASKS, None),
    ((), JOB, Cluster("kubernetes", "run-0.run:8476", 4, 3)),
    ((), {"TPU_WORKER_HOSTNAMES": "a,b"}, Cluster("tpu")),
    ((), {"TPU_WORKER_HOSTNAMES": "a"}, None),
    (("tpu",), {}, Cluster("tpu")),
])
def test_finds(flags, environ, expected):
  assert find(*flags, environ=environ) == expected


@pytest.mark.parametrize("flags, environ, words", [
    (("slrm",), {}, "did you mean slurm"),
    (("auto", "node0:8476"), {}, "go together"),
    (("slurm", "node0:8476", 2, 1), {}, "without --cluster"),
    (("auto", "node0", 2, 1), {}, "HOST:PORT"),
    (("auto", "node0:8476", 2, 2), {}, "0 to 1"),
    (("kubernetes",), {"DDIL_COORDINATOR": "a:1"}, "DDIL_NUM_PROCESSES, JOB_COMPLETION_INDEX are not set"),
    ((), JOB | {"DDIL_NUM_PROCESSES": "four"}, "whole numbers"),
])
def test_refuses(flags, environ, words):
  with pytest.raises(UsageError, match=words):
    find(*flags, environ=environ)


def test_alone():
  """One process agrees with itself, and its errors are its own."""
  assert processes.count() == 1 and processes.is_first()
  assert processes.exchange("a") == ["a"]
  assert processes.together(lambda: 3) == 3
  processes.require_agreement({"config": {"a": 1}})
  with pytest.raises(UsageError, match="^mine$"):
    processes.together(lambda: (_ for _ in ()).throw(UsageError("mine")))


def test_the_code_has_a_hash():
  assert processes.code_hash() == processes.code_hash() and len(processes.code_hash()) == 16
