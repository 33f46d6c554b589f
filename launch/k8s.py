"""One run as an indexed Kubernetes Job: a pod for each process, and a headless Service by which they find the first.

    python -m launch.k8s --name=dmd2 --image=IMAGE --claim=CLAIM --pods=4 --gpus=8 --out=run.json -- train \\
        --config=configs/cifar10_dmd2.py:ddil --workdir=/data/runs/dmd2 --config.train.parallel=mesh
    kubectl apply -f run.json

The manifest is JSON, which kubectl takes as it takes YAML. The image has this project as its working directory. When a
pod fails the others end too, since they cannot go on without it; all are made again and continue from the last
checkpoint. Pods that have to make room are made again as often as it happens. Wrong usage (exit code 2) ends the Job.

TPUs: --resource=google.com/tpu --gpus=4 --node=cloud.google.com/gke-tpu-accelerator=tpu-v5-lite-podslice
--node=cloud.google.com/gke-tpu-topology=4x4, and as many --pods as the slice has hosts.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from ddil_jax.errors import UsageError
from launch import rendering

PORT = 8476
VOLUME = "/data"  # where pods have the claim


class Needs(NamedTuple):
  """What each pod is given.

  Attributes:
    image: a container image with this project as its working directory.
    claim: a persistent volume claim that all pods can write to, mounted at VOLUME.
    gpus: how many.
    resource: what is counted so, as Kubernetes calls it.
    node: {label: value} of the nodes on which it may run.
  """
  image: str
  claim: str
  gpus: int = 1
  resource: str = "nvidia.com/gpu"
  node: Mapping[str, str] = {}


def add_options(args) -> None:
  """The options that `needs` reads, to a parser or a group of one."""
  args.add_argument("--image", help="a container image with this project as its working directory")
  args.add_argument("--claim", help=f"a volume claim for all pods, mounted at {VOLUME}")
  args.add_argument("--gpus", type=int, default=1, help="of each pod; 0 for none")
  args.add_argument("--resource", default="nvidia.com/gpu", help="what --gpus counts; another is google.com/tpu")
  args.add_argument("--node", action="append", default=[], metavar="LABEL=VALUE",
                    help="a label of the nodes on which pods may run; as often as needed")


def needs(found: argparse.Namespace) -> Needs:
  """Raises UsageError for what is missing or wrong."""
  if not found.image or not found.claim:
    raise UsageError("--image=IMAGE and --claim=CLAIM are needed: what the pods run, and the volume that they share")
  if found.gpus < 0:
    raise UsageError(f"--gpus={found.gpus}: at least 0 are needed")
  for label in found.node:
    if not re.fullmatch(r"[^=]+=[^=]*", label):
      raise UsageError(f"--node={label}: LABEL=VALUE is needed")
  return Needs(found.image, found.claim, found.gpus, found.resource, dict(label.split("=") for label in found.node))


def literal(word: str) -> str:
  """A word of a pod's command as it is: in others Kubernetes puts the value of NAME for `$(NAME)`."""
  return word.replace("$", "$$")


def pod(command: list[str], given: Needs, variables: Mapping[str, str] = {}) -> dict[str, Any]:
  """The specification of a pod that runs a command, and has two minutes to save when it is asked to end."""
  # Without buffers, so that what a pod said before it was killed is in its log.
  variables = dict(variables) | {"PYTHONUNBUFFERED": "1"}
  container = {"name": "run", "image": given.image, "command": command,
               "env": [{"name": name, "value": value} for name, value in variables.items()],
               "volumeMounts": [{"name": "data", "mountPath": VOLUME}],
               "resources": {"limits": {given.resource: given.gpus} if given.gpus else {}}}
  return {"restartPolicy": "Never", "terminationGracePeriodSeconds": 120, "nodeSelector": dict(given.node),
          "containers": [container], "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": given.claim}}]}


def job(name: str, count: int, spec: dict[str, Any], each: bool) -> dict[str, Any]:
  """An indexed Job.

  Args:
    name: of the Job, and a label of its pods.
    count: of its pods.
    spec: of each of them.
    each: whether each pod has work of its own, and fails for itself, the fourth time; else all fail together.

  Raises:
    UsageError: a name that Kubernetes would not take.
  """
  if not re.fullmatch(r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?", name):
    raise UsageError(f"--name={name}: small letters, digits and '-' are possible, beginning with a letter")

  def exits(code):
    return {"onExitCodes": {"containerName": "run", "operator": "In", "values": [code]}}

  # The first rule that fits counts. A pod that has to make room, and those that save and stop with it, are no failures.
  rules = [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
           {"action": "Ignore"} | exits(130),
           {"action": "FailIndex" if each else "FailJob"} | exits(2)]
  tries = {"backoffLimitPerIndex": 3} if each else {"backoffLimit": 100}
  return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name},
          "spec": {"completions": count, "parallelism": count, "completionMode": "Indexed", **tries,
                   "podFailurePolicy": {"rules": rules},
                   "template": {"metadata": {"labels": {"run": name}}, "spec": spec}}}


def manifest(arguments: list[str], name: str, pods: int, given: Needs) -> dict[str, Any]:
  """A List of the Service and the Job.

  Args:
    arguments: of `python -m ddil_jax`, beginning with "train".
    name: of Job and Service.
    pods: how many.

  Raises:
    UsageError: a name that Kubernetes would not take, or no pods.
  """
  if pods < 1:
    raise UsageError(f"--pods={pods}: at least 1 pod is needed")
  variables = {"DDIL_COORDINATOR": f"{name}-0.{name}:{PORT}", "DDIL_NUM_PROCESSES": str(pods)}
  command = ["python", "-m", "ddil_jax", *map(literal, rendering.job_arguments(arguments))]
  run = job(name, pods, pod(command, given, variables) | {"subdomain": name}, each=False)
  # Pods have to find each other before they are ready.
  service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
             "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"run": name}}}
  return {"apiVersion": "v1", "kind": "List", "items": [service, run]}


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code."""
  args = rendering.parser("launch.k8s", __doc__, "run.json")
  args.add_argument("--name", required=True)
  args.add_argument("--pods", type=int, default=1)
  add_options(args)
  found = args.parse_args(argv)

  def render():
    return json.dumps(manifest(found.arguments, found.name, found.pods, needs(found)), indent=2) + "\n"

  return rendering.deliver("launch.k8s", found, render, "kubectl apply -f")


if __name__ == "__main__":
  sys.exit(main())
