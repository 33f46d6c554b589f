"""Adapter guidance distillation: what it is before it learns, what learns, and runs whose student is only a part."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax import build, trained
from ddil_jax import config as config_lib
from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import weighting
from ddil_jax.errors import UsageError
from ddil_jax.main import main
from ddil_jax.objectives import agd
from ddil_jax.objectives.base import View, bind, completed
from ddil_jax.states.base import States
from tests import building, toys
from tests.running import SHORT, shared  # noqa: F401 (a fixture)

TIMES = jnp.array([0.35, 0.6, 0.85])
OPTIONS = dict(hidden=8, num_scales=8, sampler_steps=4)


def test_before_it_learns_it_is_the_conditional_network_short_of_all_guidance():
  """D_a = c to the bit, so L = w (g - 1)^2 mean (c - u)^2: nothing at g = 1."""
  parts, teacher, batch = toys.toy_parts(), toys.toy_init(jax.random.key(7)), toys.toy_batch(3)
  objective = agd.make(parts, **OPTIONS)
  x_t, label, scale = jnp.asarray(batch["image"]), {"label": jnp.asarray(batch["label"])}, jnp.array([1.0, 3.0, 6.0])
  cond = {**label, "guidance_scale": scale}
  own = objective.init(jax.random.key(1), teacher)["student"]
  c, u = (bind(parts.teacher, teacher)(x_t, TIMES, told) for told in (label, toys.null(label)))
  np.testing.assert_array_equal(bind(objective.student, completed(objective, own, teacher))(x_t, TIMES, cond), c)

  states = States(x_t, TIMES, jnp.zeros(3, jnp.int32), cond, jnp.zeros(3, jnp.int32), x_t)
  keys = keys_lib.per_example(jax.random.key(0), jnp.arange(3))
  loss, _ = objective.players[0].loss(own, View({}, {}, teacher, jnp.zeros((), jnp.int32)), states, batch, keys)
  expected = weighting.make("v_mse")(parts.process, TIMES) * (scale - 1) ** 2 * ((c - u) ** 2).mean((1, 2, 3))
  np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-12)
  assert loss[1] > 1e-4


@pytest.mark.parametrize("kind", agd.LOSSES)
def test_no_loss_for_the_guided_network(kind):
  rng = np.random.default_rng(0)
  x_t, conditional, guided = (jnp.asarray(rng.standard_normal((3,) + toys.IMAGE), jnp.float32) for _ in range(3))
  process = toys.toy_parts().process
  loss = agd.agd_loss(process, x_t, TIMES, guided, conditional, guided, kind)[0]
  np.testing.assert_array_equal(loss, 0)
  assert float(agd.agd_loss(process, x_t, TIMES, conditional, conditional, guided, kind)[0].min()) > 1e-3


def test_only_adapters_are_learned_and_kept():
  """They are all of the student and of its averages."""
  parts = toys.toy_parts()
  objective, teacher = agd.make(parts, **OPTIONS), toys.toy_init(jax.random.key(7))
  state, _ = building.run(objective, building.ddil(parts, objective), teacher)
  for params in (state.params["student"], state.ema["0.9"]):
    assert set(params) == {"in", "out"} and np.any(params["out"])


@pytest.mark.parametrize("options, said", [
    (dict(hidden=0), "hidden 0"), (dict(loss="l3"), "there are: cos, l1, l2, noise"),
    (dict(sampler_steps=40), "sampler_steps 40"), (dict(guidance_range=()), "must be"),
    (dict(guidance_range=(3.0, 2.0)), "g_min <= g_max")])
def test_mistakes_are_named(options, said):
  with pytest.raises(UsageError, match=said):
    agd.make(toys.toy_parts(), **options)


@pytest.mark.parametrize("lacks, said", [(dict(num_classes=0), "no classes"), (dict(adapt=None), "no adapters")])
def test_it_needs_guidance_and_a_network_that_takes_adapters(lacks, said):
  with pytest.raises(UsageError, match=said):
    agd.make(toys.toy_parts()._replace(**lacks))


def test_a_teacher_that_reads_the_scale_takes_no_adapters():
  config = config_lib.load("configs/digits_agd.py:smoke", {"teacher.guidance_embedding": "32"})
  with pytest.raises(UsageError, match="guidance_embedding=32"):
    build.build(config)


@pytest.mark.slow
def test_a_run_is_evaluated_on_its_teacher_and_on_no_other(tmp_path):
  """A checkpoint holds the adapters; the rest of the student is the teacher, which has to be the same one."""
  workdir = tmp_path / "run"
  assert main(["train", "--config=configs/digits_agd.py:smoke", f"--workdir={workdir}", *SHORT]) == 0
  rows = json.loads((workdir / "results.json").read_text())
  config = trained.saved_config(workdir)
  params, _ = trained.params_of(config, build.build(config), workdir)
  assert set(params) == {"base", "adapter"}
  assert all(name.endswith("_adapter") for name in params["adapter"]) and "conv_in" in params["base"]
  assert [row["metrics"] for row in trained.evaluate(config, workdir, say=lambda line: None)] == \
      [row["metrics"] for row in rows]
  other = config_lib.from_dict(config_lib.to_dict(config) | {"seed": 1})  # of which a smoke run's teacher is made
  with pytest.raises(UsageError, match="other parameters"):
    trained.params_of(other, build.build(other), workdir)
