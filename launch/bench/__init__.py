"""Overheads and speeds, measured in one run: see `__main__.py`."""

import os

if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
  # As in the demo's workers: half the compile time. Read when jax is imported.
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"
