"""Whole runs by the command line, for tests: shared data and compilations, and what was said."""

import os
import pathlib

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ddil_jax import runs
from ddil_jax.main import main

ROOT = pathlib.Path(__file__).parents[1]
# The shortest evaluation: whole runs are about something else here.
SHORT = ("--config.eval.num_samples=6", "--config.eval.batch_size=6", "--config.eval.shift_samples=0",
         "--config.eval.sampler_steps=()", "--config.eval.metrics=('saturation',)")
_CACHE = {"jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": 0.2,
          "jax_persistent_cache_min_entry_size_bytes": -1}


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory):
  """A data folder and a cache of compiled programs, the same for all workers and sub-processes."""
  base = tmp_path_factory.getbasetemp()
  root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
  wanted = _CACHE | {"jax_compilation_cache_dir": str(root / "compiled")}
  before = {name: getattr(jax.config, name) for name in wanted}
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("DDIL_DATA", str(root / "data"))
    for name, value in wanted.items():
      patch.setenv(name.upper(), str(value))
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield root
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture
def refuse(capsys):
  """Runs a command that must fail with one line, and returns the line."""
  def run(*arguments, code: int = 2) -> str:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == code
    line = capsys.readouterr().err
    assert line.startswith("ddil: ") and line.endswith("\n") and line.count("\n") == 1, line
    return line.strip()
  return run


@pytest.fixture
def trained(monkeypatch):
  """The last TrainStates of the runs that a test trains, in order."""
  states = []

  def spy(runner, *arguments):
    states.append(runner.fetch(run_loop(runner, *arguments)))
    return states[-1]

  run_loop = runs.loop.run_loop
  monkeypatch.setattr(runs.loop, "run_loop", spy)
  return states
