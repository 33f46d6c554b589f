"""The method that docs/adding_a_method.md adds: its code blocks, as they stand there, train on every source."""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddil_jax.objectives
from ddil_jax import build, registry
from ddil_jax import config as config_lib
from ddil_jax.data import pipeline
from ddil_jax.errors import UsageError
from ddil_jax.states.base import SOURCES
from ddil_jax.training.parallel import make_runner
from ddil_jax.training.step import due_players, init_state, make_train_step

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "adding_a_method.md"


@pytest.fixture
def config_file(tmp_path, monkeypatch):
  """Writes each code block to the file that the page names above it, below tmp_path."""
  blocks = dict(re.findall(r"^`(\S+\.py)`:\n\n```python\n(.*?)```", PAGE.read_text(), re.M | re.S))
  assert sorted(blocks) == ["configs/digits_kd.py", "ddil_jax/objectives/kd.py"]
  for name, code in blocks.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
  folder = str(tmp_path / "ddil_jax" / "objectives")
  monkeypatch.setattr(ddil_jax.objectives, "__path__", [*ddil_jax.objectives.__path__, folder])
  yield tmp_path / "configs" / "digits_kd.py"
  sys.modules.pop("ddil_jax.objectives.kd", None)


def test_trains_on_every_source(config_file):
  """Two steps of one mixture that draws from each source at each step: every source has a finite loss."""
  config = config_lib.load(f"{config_file}:smoke,reflected")
  assert "kd" in registry.names("objectives")
  config.unlock()
  config.states.update({name: 1 / len(SOURCES) for name in SOURCES}, selection="per_example")
  config.train.batch_size = 2 * len(SOURCES)
  config.model.channel_mult, config.states.replay = (1,), False  # compiles faster
  built = build.build(config)
  assert set(built.distribution.sources) == set(SOURCES)
  teacher = built.init_teacher(jax.random.key(1))
  # Networks start as the zero function, and so would the label.
  teacher = jax.tree.map(lambda v: jnp.asarray(v + 0.05 * np.cos(np.arange(v.size, dtype=v.dtype)).reshape(v.shape)),
                         jax.device_get(teacher))
  batches = pipeline.batches(built.dataset, config.train.batch_size, config.seed)
  root = jax.random.key(config.seed)
  runner = make_runner("single", lambda layout: make_train_step(
      built.objective, built.distribution, built.optimizers, built.ema_decays, config.train.batch_size,
      layout=layout), config.train.batch_size)
  start = init_state(built.objective, built.distribution, built.optimizers, built.ema_decays, root, teacher, batches[0])
  before = jax.device_get(start.params["student"])
  state, frozen = runner.place(start), runner.place_frozen({"teacher": teacher})
  for step in range(config.train.steps):
    state, metrics = runner.step(state, frozen, runner.place_batch(batches[step]), root,
                                 due_players(built.objective, step))
    assert float(metrics["skipped"].total) == 0
    for name in SOURCES:
      mean = metrics[f"student/loss@{name}"]
      assert float(mean.count) == 2
      assert np.isfinite(float(mean.total)) and float(mean.total) > 0
  moved = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), before, state.params["student"])
  assert max(jax.tree.leaves(moved)) > 0


def test_an_unknown_option_lists_those_of_the_page(config_file):
  config = config_lib.load(f"{config_file}:smoke")
  config.unlock()
  config.objective.label_stepz = 3
  with pytest.raises(UsageError, match="did you mean label_steps"):
    build.build(config)
