"""Strict numerics for every test: 8 virtual devices, no silent broadcasting, warnings are errors."""

import os

# The cheapest compile: the nets are tiny, and nearly all of the tests' time is compiling.
CHEAP = ("--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
         " --xla_cpu_use_fusion_emitters=false --xla_cpu_use_xnnpack=false")
# Set before jax is imported: 8 CPU devices for the mesh and pmap tests.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {CHEAP}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["DDIL_COMPILE_CACHE"] = "off"  # nothing is left in the user's folders

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
