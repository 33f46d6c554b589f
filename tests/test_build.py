"""Configs become the parts that they name: DDIL reduces to the base, priors are schedules, devices agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax import build as build_lib
from ddil_jax import config as config_lib
from ddil_jax import keys as keys_lib
from ddil_jax import runs, samplers
from ddil_jax.data import pipeline
from ddil_jax.diffusion.rollout import prior, rollout
from ddil_jax.errors import UsageError
from ddil_jax.evaluation import features
from ddil_jax.states.base import SOURCES, Context
from ddil_jax.training import hlo
from ddil_jax.training.parallel import make_runner
from ddil_jax.training.step import Layout, due_players, init_state, make_train_step
from tests.running import shared  # noqa: F401 (a fixture)

pytestmark = pytest.mark.xdist_group("build")


def load(spec, **fields):
  return config_lib.load(f"configs/{spec}", {name.replace("__", "."): str(v) for name, v in fields.items()})


def steps_of(config):
  """The built parts, the fresh state, the teacher and the step's maker."""
  built = build_lib.build(config)
  teacher = built.init_teacher(jax.random.key(7))
  batches = pipeline.batches(built.dataset, config.train.batch_size, config.seed)
  parts = (built.objective, built.distribution, built.optimizers, built.ema_decays)
  state = init_state(*parts, jax.random.key(0), teacher, jax.tree.map(jnp.asarray, batches[0]))

  def make(layout):
    return make_train_step(*parts, config.train.batch_size, config.states.rollout_params, layout)

  return built, state, teacher, batches, make


def train(config, mode="single", steps=3, parts=None):
  built, state, teacher, batches, make = parts or steps_of(config)
  runner = make_runner(mode, make, config.train.batch_size)
  state = runner.place(jax.tree.map(jnp.array, state))
  frozen = runner.place_frozen({"teacher": teacher})
  for i in range(steps):
    state, metrics = runner.step(state, frozen, runner.place_batch(batches[i]), jax.random.key(1),
                                 due_players(built.objective, i))
    assert float(metrics["skipped"].total) == 0
  return jax.device_get(runner.fetch(state))


def test_forward_only_is_the_base_method():
  """DDIL with the prior (1, 0, 0): the same compiled program, so the same bits."""
  base = load("digits_pd.py:smoke", train__stages="()")
  ddil = load("digits_pd.py:ddil,smoke", train__stages="()", states__forward=2.0, states__student=0.0,
              states__teacher=0.0)
  texts, states = [], []
  for config in (base, ddil):
    parts = steps_of(config)
    built, state, teacher, batches, make = parts
    assert built.distribution.sources == ("forward",)
    step = jax.jit(make(Layout()), static_argnums=4)
    texts.append(step.lower(state, {"teacher": teacher}, batches[0], jax.random.key(1), ("student",)).as_text())
    states.append(train(config, parts=parts))
  assert texts[0] == texts[1]
  for a, b in zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]), strict=True):
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("priors, sources", [
    (dict(forward=0.5, student=0.25, teacher=0.25), ("forward", "student", "teacher")),
    (dict(forward=0.5, student=0.5), ("forward", "student")), (dict(forward=0.0, dagger=1.0), ("dagger",)),
    (dict(student="('linear', 0.0, 0.0, 0.5)"), ("forward",)),
    (dict(student="('piecewise', 0.0, 0.5, 0.1)"), ("forward", "student"))])
def test_a_source_that_is_never_drawn_does_not_exist(priors, sources):
  config = load("digits_pd.py:smoke", train__stages="()", **{f"states__{name}": v for name, v in priors.items()})
  assert build_lib.build(config).distribution.sources == sources


def test_schedules_as_priors():
  """('linear', a, b, fraction) from the command line: exact shares of the batch at the beginning and after."""
  config = load("digits_pd.py:smoke", train__stages="()", train__batch_size=10, train__steps=100,
                states__forward="('linear', 1.0, 0.6, 0.5)", states__student="('linear', 0.0, 0.4, 0.5)",
                states__selection="per_example", states__replay=False)
  built = build_lib.build(config)
  teacher = built.init_teacher(jax.random.key(7))
  batch = jax.tree.map(jnp.asarray, pipeline.batches(built.dataset, 10, 0)[0])

  @jax.jit
  def shares(step, teacher, batch):
    key = jax.random.fold_in(jax.random.key(3), step)
    ctx = Context(step, key, keys_lib.per_example(key, batch["lane"]), batch, teacher, teacher, 10)
    states, _ = built.distribution.sample(built.distribution.init(ctx), ctx)
    return jnp.bincount(states.source, length=len(SOURCES))

  found = {step: np.asarray(shares(jnp.int32(step), teacher, batch)).tolist() for step in (0, 25, 50, 99)}
  expected = {0: [10, 0], 25: [8, 2], 50: [6, 4], 99: [6, 4]}
  assert found == {step: counts + [0] * (len(SOURCES) - 2) for step, counts in expected.items()}


def test_a_wider_teacher():
  config = load("digits_pd.py:ddil,smoke", train__stages="()", teacher__channels=16,
                teacher__channel_mult="(1, 1, 1)")
  built = build_lib.build(config)
  teacher = jax.eval_shape(built.init_teacher, jax.random.key(0))
  params = jax.eval_shape(built.objective.init, jax.random.key(0), teacher)
  assert teacher["conv_in"]["kernel"].shape == (3, 3, 1, 16) and "down_2_0" in teacher
  assert params["student"]["conv_in"]["kernel"].shape == (3, 3, 1, 8) and "down_2_0" not in params["student"]


def test_each_player_has_its_learning_rate():
  config = load("digits_dmd2.py:smoke", optimizer__name="sgd", optimizer__clip=0.0, optimizer__learning_rate=0.25,
                optimizer__critic_learning_rate=0.5)
  optimizers = build_lib.build(config).optimizers
  for player, rate in (("student", 0.25), ("critic", 0.5)):
    updates, _ = optimizers[player].update({"w": jnp.ones(2)}, optimizers[player].init({"w": jnp.ones(2)}))
    assert updates["w"].tolist() == [-rate, -rate]


@pytest.mark.slow
def test_devices_agree_on_the_unet():
  """Mesh and pmap on 8 devices give all of one device's state to 1e-6 after 3 steps.

  What it has to disagree on are convolutions, normalisation and replay. All methods are compared on toy networks
  in contract/test_objectives.py.
  """
  config = load("digits_pd.py:smoke", train__stages="()", optimizer__name="sgd", optimizer__learning_rate=0.1,
                states__forward=0.5, states__student=0.5)
  parts = steps_of(config)
  assert parts[0].distribution.sources == ("forward", "student")
  single = train(config, parts=parts)
  pairs = zip(jax.tree.leaves(single.params), jax.tree.leaves(parts[1].params), strict=True)
  moved = max(float(np.abs(a - b).max()) for a, b in pairs)
  assert moved > 1e-4
  for mode in ("mesh", "pmap"):
    other = train(config, mode, parts=parts)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(single), jax.tree.leaves(other), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6, err_msg=f"{mode} {jax.tree_util.keystr(path)}")


def test_a_sampling_grid_of_ones_own():
  """It replaces the step counts, and what it samples is what its times say."""
  config = load("digits_cd.py:smoke", eval__sampler_times="(1.0, 0.5, 0.0)")
  built = build_lib.build(config)
  own, = samplers.samplers(config, built)
  assert own.grid.tolist() == [1.0, 0.5, 0.0] and (own.steps, own.network_evaluations) == (2, 2)
  two = samplers.samplers(config, built, steps=2)[0]
  assert two.grid[:-1].tolist() == [1.0, 0.5]  # the same times by count
  params = built.objective.init(jax.random.key(0), built.init_teacher(jax.random.key(1)))["student"]
  keys, cond = jax.random.split(jax.random.key(2), 3), {"label": jnp.arange(3)}
  np.testing.assert_array_equal(own.sample(params, keys, cond), two.sample(params, keys, cond))


def test_sets_of_prompts_alone_differ_by_their_prompts():
  """Their images are all NaN."""
  data = build_lib.load_data(load("emoji_lcm.py:smoke"), "train")
  blind = data._replace(images=np.full_like(data.images, np.nan))
  name, rows = next(iter(sorted(data.cond.items())))
  others = blind._replace(cond={**data.cond, name: np.asarray(rows)[::-1]})
  assert runs.data_hash(blind) == runs.data_hash(blind._replace(cond=dict(data.cond))) != runs.data_hash(others)
  assert runs.data_hash(data) != runs.data_hash(blind)


def test_students_of_all_stages_are_told_the_scale(tmp_path):
  """Stage two of guided distillation: each student is measured at every scale, since none has one folded in."""
  guided, told = (runs._stage_configs(load(f"digits_pd.py:smoke,{arg}", train__stages="(4, 2)"), tmp_path)
                  for arg in ("guided", "stage_two"))
  scales = lambda stage: [s.guidance_scale for s in samplers.samplers(stage, build_lib.build(stage))]  # noqa: E731
  assert [scales(stage) for stage in told] == [[1.0, 3.0], [1.0, 3.0]]
  assert [scales(stage) for stage in guided] == [[3.0], [3.0]]
  assert [stage.teacher.folded_guidance_scale for stage in (*told, *guided)] == [0, 0, 0, 3.0]


def test_a_step_aside_calls_no_network():
  """A rollout that visits times between those of its grid costs what the walk costs. (Compilers for CPUs compute a
  network twice that is written twice.)"""
  config = load("digits_pd.py:smoke", train__stages="()", model__channel_mult="(1,)")
  built = build_lib.build(config)
  teacher, keys = built.init_teacher(jax.random.key(0)), jax.random.split(jax.random.key(1), 2)
  grid, x_T, cond = built.parts.make_grid(4), jnp.ones((2, *built.parts.image_shape)), {"label": jnp.arange(2)}

  def program(**how):
    walk = lambda teacher: rollout(samplers.teacher_policy(built, teacher), x_T, grid, cond, keys, **how)  # noqa: E731
    return jax.jit(walk).lower(teacher).compile().as_text()

  walked, visited = hlo.operations(program(path=True)), hlo.operations(program(visit=jnp.full((4, 2), 0.1)))
  assert visited == walked and walked.least > 0


def test_the_teacher_takes_some_of_the_steps():
  """All of them: its own DDIM. None: the student's. One costs a guided evaluation more."""
  config = load("digits_pd.py:smoke,guided", train__stages="()")
  built = build_lib.build(config)
  # A fresh network's output is 0; these are unlike each other.
  teacher, student = (jax.tree.map(lambda v: v + 0.1 * jnp.cos(jnp.arange(v.size) + seed).reshape(v.shape),
                                   built.init_teacher(jax.random.key(seed))) for seed in (0, 1))
  keys, cond = jax.random.split(jax.random.key(2), 3), {"label": jnp.arange(3)}

  def sample(acts):
    mine = load("digits_pd.py:smoke,guided", train__stages="()", eval__teacher_acts=acts)
    sampler, = samplers.samplers(mine, built)
    return np.asarray(jax.jit(sampler.sample)((student, teacher), keys, cond)), sampler.network_evaluations

  grid = built.parts.make_grid(4)
  x_T = prior(built.parts.process, keys, jnp.zeros((3, *built.parts.image_shape)))
  whole = rollout(samplers.teacher_policy(built, teacher), x_T, grid, cond, keys)
  np.testing.assert_allclose(sample((0, 1, 2, 3))[0], whole, rtol=1e-5, atol=1e-5)
  own = samplers.samplers(config, built)[0].sample(student, keys, cond)
  halves = rollout(samplers.teacher_policy(built, teacher), x_T, grid[:2], cond, keys)
  halves = rollout(samplers.samplers(config, built)[0].policy(student), halves, grid[1:], cond, keys)
  first, evaluations = sample((0,))
  np.testing.assert_allclose(first, halves, rtol=1e-5, atol=1e-5)
  assert evaluations == 5 and not np.allclose(first, own, atol=1e-3) and not np.allclose(first, whole, atol=1e-3)
  for acts, message in (((4,), "0 to 3"), ((-1,), "0 to 3")):
    with pytest.raises(UsageError, match=message):
      sample(acts)


@pytest.fixture(scope="module")
def digits_with_a_fresh_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  config = load("digits_teacher.py", data__data_dir=folder)
  return config, build_lib.load_data(config, "train"), build_lib.load_data(config, "test"), folder / "extractors"


def test_the_classifier_of_digits_comes_with_the_package(digits_with_a_fresh_folder):
  """So its hash is the same everywhere, and nothing is trained."""
  config, train, test, folder = digits_with_a_fresh_folder
  extractor = build_lib.load_classifier(config, train)
  assert extractor.name == "digits-cnn-42dd9301" and not folder.exists()
  assert np.mean(extractor.logits(test.images).argmax(axis=1) == test.labels) > 0.97


@pytest.mark.slow
def test_the_classifier_of_digits_is_what_training_gives(digits_with_a_fresh_folder, monkeypatch):
  """Up to rounding, which makes a hash of its own on some processors."""
  config, train, test, folder = digits_with_a_fresh_folder
  shipped = build_lib.load_classifier(config, train)
  monkeypatch.setattr(features, "SHIPPED", folder / "none")
  own = build_lib.load_classifier(config, train)
  assert len(list(folder.glob("digits-cnn-*.safetensors"))) == 1
  np.testing.assert_allclose(own.features(test.images), shipped.features(test.images), rtol=1e-2, atol=1e-2)


def test_the_feature_network_of_a_data_set():
  """A classifier like that which measures, and not the same one; its layers by name, and an unknown one named."""
  config = load("digits_add.py:smoke")
  built = build_lib.build(config)
  images, net = built.dataset.images[:5], built.parts.feature_net("")
  measuring, other = (build_lib.load_classifier(config, built.dataset, seed) for seed in (0, 1))
  found = net.layers(net.load(), images, ("conv_0", "features"))
  assert found["conv_0"].shape == (5, 8, 8, 16)
  np.testing.assert_allclose(found["features"][:, 0, 0], other.features(images), rtol=1e-4, atol=1e-5)
  assert np.abs(found["features"][:, 0, 0] - measuring.features(images)).max() > 0.01
  fresh = net.layers(net.init(jax.random.key(0)), images, ("features",))["features"]
  assert np.abs(found["features"] - fresh).max() > 0.01
  with pytest.raises(UsageError, match="layer of Classifier 'norm_7'; .*there are: conv_0, conv_1, features"):
    build_lib.build(load("digits_add.py:smoke", objective__layers=("norm_7",)))
  with pytest.raises(UsageError, match="no file"):
    build_lib.build(load("digits_add.py:smoke", objective__feature_net="inception:nowhere.safetensors"))
