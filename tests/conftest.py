"""Strict numerics for every test: 8 virtual devices, no silent broadcasting, warnings are errors."""

import atexit
import gc
import os
import shutil
import tempfile

# The cheapest compile: the nets are tiny, and nearly all of the tests' time is compiling.
CHEAP = ("--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
         " --xla_cpu_use_fusion_emitters=false --xla_cpu_use_xnnpack=false")
# Set before jax is imported: 8 CPU devices for the mesh and pmap tests.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {CHEAP}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of XLA's pool. With as many as devices a collective, which keeps one for each, may wait for ever for work
# that is queued behind it.
os.environ.setdefault("NPROC", "16")
os.environ["DDIL_COMPILE_CACHE"] = "off"  # nothing is left in the user's folders
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # where each operation was traced is read by nobody
if "PYTEST_XDIST_WORKER" not in os.environ:
  # What one test compiled, others find, in all workers and sub-processes: they have this environment.
  _programs = tempfile.mkdtemp(prefix="ddil-tests-")
  atexit.register(shutil.rmtree, _programs, ignore_errors=True)
  os.environ |= {"JAX_COMPILATION_CACHE_DIR": _programs, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                 "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
# Thousands of traced programs are alive, and nearly all of them stay so: to look through them often finds nothing.
gc.set_threshold(200_000, 20, 20)

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
