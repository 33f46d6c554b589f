"""One run as an indexed Kubernetes Job: a pod for each process, and a headless Service by which they find the first.

    python -m launch.k8s --name=dmd2 --image=IMAGE --claim=CLAIM --pods=4 --gpus=8 --out=run.json -- train \\
        --config=configs/cifar10_dmd2.py:ddil --workdir=/data/runs/dmd2 --config.train.parallel=mesh
    kubectl apply -f run.json

The manifest is JSON, which kubectl takes as it takes YAML. When a pod fails the others end too, since they cannot go on
without it; all are made again and continue from the last checkpoint. Wrong usage (exit code 2) ends the Job.
"""

import json
import re
import sys

from ddil_jax.errors import UsageError
from launch import rendering

PORT = 8476


def manifest(arguments: list[str], name: str, image: str, claim: str, pods: int, gpus: int) -> dict:
  """A List of the Service and the Job.

  Args:
    arguments: of `python -m ddil_jax`, beginning with "train".
    name: of Job and Service.
    image: a container image with this project installed.
    claim: a persistent volume claim that all pods can write to, mounted at /data.
    pods, gpus: how many pods, and GPUs of each.

  Raises:
    UsageError: a name that Kubernetes would not take, or numbers below 1.
  """
  if not re.fullmatch(r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?", name):
    raise UsageError(f"--name={name}: small letters, digits and '-' are possible, beginning with a letter")
  if pods < 1 or gpus < 0:
    raise UsageError(f"--pods={pods} --gpus={gpus}: at least 1 pod and 0 GPUs are needed")
  variables = {"DDIL_COORDINATOR": f"{name}-0.{name}:{PORT}", "DDIL_NUM_PROCESSES": str(pods)}
  container = {
      "name": "run", "image": image, "command": ["python", "-m", "ddil_jax", *rendering.job_arguments(arguments)],
      # Without buffers, so that what a pod said before it was killed is in its log.
      "env": [{"name": key, "value": value} for key, value in (variables | {"PYTHONUNBUFFERED": "1"}).items()],
      "ports": [{"containerPort": PORT}], "volumeMounts": [{"name": "data", "mountPath": "/data"}],
      "resources": {"limits": {"nvidia.com/gpu": gpus} if gpus else {}}}
  pod = {"subdomain": name, "restartPolicy": "Never", "terminationGracePeriodSeconds": 120, "containers": [container],
         "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}]}
  rules = [{"action": "FailJob", "onExitCodes": {"containerName": "run", "operator": "In", "values": [2]}}]
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name},
         "spec": {"completions": pods, "parallelism": pods, "completionMode": "Indexed", "backoffLimit": 100,
                  "podFailurePolicy": {"rules": rules},
                  "template": {"metadata": {"labels": {"run": name}}, "spec": pod}}}
  # Pods have to find each other before they are ready.
  service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
             "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"run": name}}}
  return {"apiVersion": "v1", "kind": "List", "items": [service, job]}


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code."""
  args = rendering.parser("launch.k8s", __doc__, "run.json")
  args.add_argument("--name", required=True)
  args.add_argument("--image", required=True, help="a container image with this project installed")
  args.add_argument("--claim", required=True, help="a volume claim for all pods, mounted at /data")
  args.add_argument("--pods", type=int, default=1)
  args.add_argument("--gpus", type=int, default=1, help="of each pod; 0 for none")
  found = args.parse_args(argv)

  def render():
    return json.dumps(manifest(found.arguments, found.name, found.image, found.claim, found.pods, found.gpus),
                      indent=2) + "\n"

  return rendering.deliver("launch.k8s", found, render, "kubectl apply -f")


if __name__ == "__main__":
  sys.exit(main())
