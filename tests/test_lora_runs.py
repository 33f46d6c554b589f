"""Runs with a LoRA: continued, evaluated, sampled, and as teachers of others."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax import build, lora, trained
from ddil_jax import config as config_lib
from ddil_jax.errors import UsageError
from ddil_jax.main import main
from ddil_jax.training import params as params_lib
from tests.running import SHORT, refuse, shared  # noqa: F401 (fixtures)
from tests.running import trained as states  # noqa: F401 (a fixture)

pytestmark = pytest.mark.xdist_group("lora_runs")
DMD2 = ("train", "--config=configs/digits_dmd2.py:smoke", "--config.model.lora=1", "--config.model.critic_lora=1",
        "--config.objective.gan_weight=0.1", "--config.objective.period=2", "--config.train.steps=4",
        "--config.train.checkpoint_every=2", *SHORT)
PD = ("train", "--config=configs/digits_pd.py:smoke", "--config.model.lora=1", *SHORT)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, shared):  # noqa: F811
  """A file of a network that has learned something: one that starts has zeros before its output."""
  built = build.build(config_lib.load("configs/digits_pd.py:smoke", {"objective.num_steps": "2"}))
  params = jax.tree.map(lambda v: v + 0.1 * jnp.cos(jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape),
                        built.init_teacher(jax.random.key(0)))
  path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
  params_lib.save_params(path, params, {})
  return path


def load(workdir):
  """(config, its parts, the run's student as it is sampled)."""
  config = trained.saved_config(workdir)
  built = build.build(config)
  return config, built, trained.params_of(config, built, workdir)[0]


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow  # tests/parity/test_diffusers_lora.py has a shorter run
def test_continued_evaluated_and_sampled(tmp_path, states, refuse, teacher):  # noqa: F811
  """Bit for bit; all that is saved of student and critic are factors, and the head."""
  run = tmp_path / "run"
  command = [*DMD2, f"--workdir={run}", f"--config.teacher.path={teacher}"]
  assert main(command) == 0
  shutil.rmtree(run / "checkpoints" / "4")
  assert main(command) == 0
  whole, continued = states
  same(whole, continued)
  names = params_lib.flatten({"params": whole.params, "ema": whole.ema, "opt": whole.opt})
  assert all(np.any(v) for name, v in names.items() if name.startswith("params/") and name.endswith("/b"))
  of_networks = [name for name in names if "kernel" in name and "/head/" not in name]
  assert len(of_networks) > 10 and all(name.rpartition("/")[2] in ("a", "b") for name in of_networks)

  config, built, params = load(run)
  same(params, lora.merge(trained.load_teacher(config, built), whole.ema[config.eval.ema]))
  rows = json.loads((run / "results.json").read_text())
  again = trained.evaluate(config, run, say=lambda line: None)
  assert [row["metrics"] for row in again] == [row["metrics"] for row in rows]
  assert main(["sample", f"--workdir={run}", f"--out={tmp_path / 'samples.png'}", "--num_samples=2"]) == 0
  line = refuse("export", run, f"--out={tmp_path / 'out'}")
  assert "the project's own UNet" in line


@pytest.mark.slow
def test_each_stage_is_merged_for_the_next(tmp_path, teacher):
  """The teacher of the second stage is the student of the first, and a run of a whole student takes the last."""
  run, own = tmp_path / "run", tmp_path / "teacher.safetensors"
  shutil.copy(teacher, own)
  assert main([*PD, f"--workdir={run}", f"--config.teacher.path={own}"]) == 0
  config, built, student = load(run / "stage_4")
  later, later_built, last = load(run / "stage_2")
  same(trained.load_teacher(later, later_built), student)
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), student, trained.load_teacher(config, built))
  assert any(jax.tree.leaves(moved))

  checkpoint = max((run / "stage_2" / "checkpoints").glob("*[0-9]"))
  assert main([*PD[:2], f"--workdir={tmp_path / 'other'}", "--config.train.stages=()", *SHORT,
               f"--config.teacher.path={checkpoint}", f"--config.teacher.ema={config.eval.ema}"]) == 0
  config, built, _ = load(tmp_path / "other")
  same(trained.load_teacher(config, built), last)

  params_lib.save_params(own, student, {})
  with pytest.raises(UsageError, match=f"stage_4 is the part of .* the one at {own} has other parameters"):
    trained.load_teacher(later, later_built)


@pytest.mark.slow
def test_what_the_teacher_has_not_trains_whole(tmp_path, teacher):
  """LCM's embedding of the guidance scale, which starts at 0."""
  run = tmp_path / "run"
  assert main(["train", "--config=configs/digits_lcm.py:guided,smoke", f"--workdir={run}", "--config.model.lora=1",
               f"--config.teacher.path={teacher}", *SHORT]) == 0
  config = trained.saved_config(run)
  built = build.build(config)
  own, _ = trained.own_params_of(config, built, run)
  whole = [name for name in params_lib.flatten(own) if name.rpartition("/")[2] not in ("a", "b")]
  assert len(whole) == 1 and "guidance" in whole[0] and np.any(params_lib.flatten(own)[whole[0]])
  params, _ = trained.params_of(config, built, run)
  assert set(params_lib.flatten(params)) == set(params_lib.flatten(trained.load_teacher(config, built))) | set(whole)
