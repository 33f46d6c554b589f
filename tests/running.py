"""Whole runs by the command line, for tests: shared data, and what was said."""

import os
import pathlib

import pytest

from ddil_jax import runs
from ddil_jax.main import main

ROOT = pathlib.Path(__file__).parents[1]
# The shortest evaluation: whole runs are about something else here.
SHORT = ("--config.eval.num_samples=6", "--config.eval.batch_size=6", "--config.eval.shift_samples=0",
         "--config.eval.sampler_steps=()", "--config.eval.metrics=('saturation',)")


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory):
  """A data folder, the same for all workers and sub-processes."""
  base = tmp_path_factory.getbasetemp()
  root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("DDIL_DATA", str(root / "data"))
    yield root


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
