"""LoRA: what a delta is, and methods whose student or critic is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddil_jax import build, lora, registry
from ddil_jax import config as config_lib
from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import transforms
from ddil_jax.errors import UsageError
from ddil_jax.lora import LoRA
from ddil_jax.objectives.base import View, bind, completed, low_rank
from ddil_jax.states.base import States
from ddil_jax.training import params as params_lib
from ddil_jax.training.parallel import Options
from ddil_jax.training.step import due_players, init_state, make_train_step
from tests import building, toys
from tests.contract.test_objectives import OPTIONS

TEACHER = toys.toy_init(jax.random.key(7))
KERNELS = {"W1", "W2", "label"}  # of the toy network; "time" is a vector
# Methods whose critic is made of the teacher's network; that of VSD is a LoRA already, other critics are heads alone.
CRITICS = {"dmd", "dmd2", "sid", "diff_instruct", "f_distill", "moment_matching", "ufogen"}
CASES = [("pd", ("student",)), ("lcm", ("student",)), ("dmd2", ("student", "critic")), ("dmd2", ("critic",)),
         ("vsd", ("student",))]


def make(name, players, **options):
  parts = toys.toy_parts(reflect=transforms.reflect(transforms.clip()))
  objective = registry.load("objectives", name).make(parts, **OPTIONS.get(name, {}) | options)
  return parts, low_rank(objective, dict.fromkeys(players, LoRA(1)))


def moved(tree, by=0.1):
  return jax.tree.map(lambda v: v + by * jnp.cos(jnp.arange(v.size, dtype=v.dtype).reshape(v.shape)), tree)


# Trees -------------------------------------------------------------------------------------


def test_a_delta_starts_as_the_base_and_is_smaller():
  base = {"conv": {"kernel": jnp.ones((3, 3, 4, 5)), "bias": jnp.ones(5)}, "table": {"embedding": jnp.ones((9, 8))},
          "out": {"kernel": -jnp.ones((16, 12))}, "small": {"kernel": jnp.ones((2, 2))}}
  net = base | {"new": {"kernel": jnp.ones((6, 6))}}
  delta = lora.init(jax.random.key(0), net, base, LoRA(2))
  shapes = {name: leaf.shape for name, leaf in params_lib.flatten(delta).items()}
  assert shapes == {"conv/kernel/a": (36, 2), "conv/kernel/b": (2, 5), "out/kernel/a": (16, 2),
                    "out/kernel/b": (2, 12), "new/kernel": (6, 6)}
  jax.tree.map(np.testing.assert_array_equal, lora.merge(base, delta), net)
  np.testing.assert_allclose(np.std(delta["conv"]["kernel"]["a"]), 2**-0.5, rtol=0.25)

  change = lora.merge(base, moved(delta), scale=3.0)
  a, b = (np.asarray(moved(delta)["conv"]["kernel"][name]) for name in "ab")
  np.testing.assert_allclose(change["conv"]["kernel"], 1 + 3 * (a @ b).reshape(3, 3, 4, 5), rtol=1e-5)
  assert change["conv"]["bias"] is base["conv"]["bias"]  # no copy of what does not change


def test_targets_choose_the_kernels():
  base = {"mid_attn": {"qkv": {"kernel": jnp.ones((8, 8))}}, "conv": {"kernel": jnp.ones((3, 3, 8, 8))}}
  delta = lora.init(jax.random.key(0), base, base, LoRA(1, targets="qkv|to_q"))
  assert set(delta) == {"mid_attn"}


def test_gradient_is_the_chain_rule_on_the_merged_kernel():
  """For W + s A B and G = dL/dW: dL/dA = s G B^T, dL/dB = s A^T G."""
  rng = np.random.default_rng(0)
  base = {"w": {"kernel": jnp.asarray(rng.standard_normal((3, 3, 2, 6)), jnp.float32)}}
  delta = moved(lora.init(jax.random.key(0), base, base, LoRA(2)))
  loss = lambda tree: jnp.sum(jnp.sin(tree["w"]["kernel"]))  # noqa: E731
  found = jax.grad(lambda d: loss(lora.merge(base, d, 0.5)))(delta)["w"]["kernel"]
  by_kernel = np.asarray(jax.grad(loss)(lora.merge(base, delta, 0.5))["w"]["kernel"]).reshape(18, 6)
  a, b = (np.asarray(delta["w"]["kernel"][name]) for name in "ab")
  np.testing.assert_allclose(found["a"], 0.5 * by_kernel @ b.T, atol=1e-5)
  np.testing.assert_allclose(found["b"], 0.5 * a.T @ by_kernel, atol=1e-5)


@pytest.mark.parametrize("change, options, said", [
    ({}, LoRA(64), "factors of rank 64"), ({}, LoRA(1, targets="nothing"), "targets 'nothing' matches none"),
    ({"W2": jnp.ones((8, 3))}, LoRA(1), "1 of the teacher's 4 parameters.*, such as W2")])
def test_networks_that_take_no_lora(change, options, said):
  with pytest.raises(UsageError, match=said):
    lora.init(jax.random.key(0), TEACHER | change, TEACHER, options)


# Methods -----------------------------------------------------------------------------------


# Student and critic in one; the others in `make test-all`, since nearly all of the time is compiling.
@pytest.mark.parametrize("name, players", [
    pytest.param(*case, marks=[] if case == CASES[0] else [pytest.mark.slow]) for case in CASES])
def test_single_equals_split_mesh_equals_pmap(name, players):
  """Factors and heads learn, nothing else is kept of a player, and devices do not matter."""
  parts, objective = make(name, players)
  distribution = building.ddil(parts, objective)
  start, _ = building.run(objective, distribution, TEACHER, steps=0)
  start = jax.device_get(start)
  single, _ = building.run(objective, distribution, TEACHER, start=start)
  for player in players:
    trees = [single.params[player]] + (list(single.ema.values()) if player == "student" else [])
    for tree in trees:
      net = tree if player == "student" else tree["net"]
      assert set(net) == KERNELS and all(set(net[kernel]) == {"a", "b"} for kernel in net)
      assert all(np.any(net[kernel]["b"]) for kernel in net)  # they start at 0
  for mode, options in (("mesh", Options(fsdp=2, min_size=0)), ("pmap", Options())):
    other, _ = building.run(objective, distribution, TEACHER, mode, start=start, options=options)
    for one, two in zip(jax.tree.leaves(single), jax.tree.leaves(other), strict=True):
      np.testing.assert_allclose(np.asarray(one, float), np.asarray(two, float), atol=1e-6)


@functools.cache
def setting(name, players):
  """(objective with LoRA, the method's own, whole parameters and deltas of the same networks, what a loss sees)."""
  parts, objective = make(name, players)
  plain = registry.load("objectives", name).make(parts, **OPTIONS.get(name, {}))
  batch = toys.toy_batch(3)
  deltas = objective.init(jax.random.key(0), TEACHER)
  deltas = {player: moved(tree) for player, tree in deltas.items()}
  base = {"student": TEACHER, "critic": {"net": TEACHER}}
  whole = {player: lora.merge(base[player], tree) if player in players else tree for player, tree in deltas.items()}
  states = States(jnp.asarray(batch["image"]), jnp.full(3, 0.6), jnp.ones(3, jnp.int32),
                  {"label": jnp.asarray(batch["label"]), "guidance_scale": jnp.ones(3)}, jnp.zeros(3, jnp.int32),
                  jnp.asarray(batch["image"]))
  return objective, plain, whole, deltas, (states, batch, keys_lib.per_example(jax.random.key(0), jnp.arange(3)))


@pytest.mark.parametrize("name, players", CASES[:3])
def test_losses_are_those_of_the_merged_networks(name, players):
  objective, plain, whole, deltas, given = setting(name, players)
  for with_lora, without in zip(objective.players, plain.players, strict=True):
    found, expected = (
        player.loss(tree[player.name], View(tree, {name: tree["student"] for name in objective.targets}, TEACHER,
                                            jnp.zeros((), jnp.int32)), *given)[0]
        for player, tree in ((with_lora, deltas), (without, whole)))
    np.testing.assert_array_equal(found, expected)
    assert np.all(found > 0)
  jax.tree.map(np.testing.assert_array_equal, completed(objective, deltas["student"], TEACHER), whole["student"])


def test_students_start_as_their_teacher():
  parts, objective = make("pd", ("student",))
  own = objective.init(jax.random.key(0), TEACHER)["student"]
  x, t, cond = jnp.ones((2,) + toys.IMAGE), jnp.full(2, 0.5), {"label": jnp.array([0, 1])}
  np.testing.assert_array_equal(bind(objective.student, completed(objective, own, TEACHER))(x, t, cond),
                                bind(parts.teacher, TEACHER)(x, t, cond))


def test_kernels_that_a_method_freezes_get_no_factors():
  _, objective = make("gdd", ("student",))
  assert set(objective.init(jax.random.key(0), TEACHER)["student"]) == KERNELS - {"W1"}


@pytest.mark.parametrize("name, players, said", [
    ("pd", ("critic",), "objective 'pd' has no critic"), ("denoising", ("student",), "'denoising' has no teacher"),
    ("ladd", ("critic",), "LoRA of the critic of objective 'ladd': 4 of the teacher's 4 parameters"),
    ("vsd", ("critic",), "LoRA of the critic of objective 'vsd': .* are not in it"),
    ("agd", ("student",), "LoRA of the student of objective 'agd': 4 of the teacher's 4"),
    ("msd", ("student",), "LoRA of the student of objective 'msd': 4 of the teacher's 4")])
def test_players_that_take_no_lora(name, players, said):
  with pytest.raises(UsageError, match=said):
    _, objective = make(name, players)
    objective.init(jax.random.key(0), TEACHER)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(registry.names("objectives")) - {"agd", "denoising", "msd"}))
def test_every_method_takes_it(name):
  """Its step can be traced, and gives the state that it took; whatever else the student is told or reads."""
  parts, objective = make(name, ("student", "critic") if name in CRITICS else ("student",))
  distribution = building.ddil(parts, objective)
  optimizers, targets = {p.name: optax.sgd(0.1) for p in objective.players}, dict(objective.targets)
  batch = toys.toy_batch(4)

  def two_states(key):
    state = init_state(objective, distribution, optimizers, targets, key, TEACHER, batch)
    step = make_train_step(objective, distribution, optimizers, targets, 4)
    return state, step(state, {"teacher": TEACHER}, batch, key, due_players(objective, 0))[0]

  before, after = jax.eval_shape(two_states, jax.random.key(0))
  assert jax.tree.map(lambda v: (v.shape, v.dtype), before) == jax.tree.map(lambda v: (v.shape, v.dtype), after)


# Configs -----------------------------------------------------------------------------------


def kept(config):
  """Bytes of each player's parameters and optimizer, and of an average of the student."""
  built = build.build(config)
  make_state = functools.partial(init_state, built.objective, built.distribution, built.optimizers, built.ema_decays)
  teacher = jax.eval_shape(built.init_teacher, jax.random.key(0))
  batch = {"image": jnp.zeros((8, *built.parts.image_shape)), "label": jnp.zeros(8, jnp.int32),
           "lane": jnp.arange(8)}
  state = jax.eval_shape(make_state, jax.random.key(0), teacher, batch)
  size = lambda tree: sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(tree))  # noqa: E731
  return {name: size(state.params[name]) + size(state.opt[name]) for name in state.params} | {"ema": size(state.ema)}


def test_what_is_kept_shrinks():
  """Three numbers a parameter (Adam), and one for an average, of the factors instead of the network."""
  load = lambda **model: config_lib.load("configs/digits_dmd2.py:smoke",  # noqa: E731
                                         {f"model.{name}": str(value) for name, value in model.items()})
  whole, critic, both = (kept(load(**model)) for model in ({}, dict(critic_lora=1), dict(lora=1, critic_lora=1)))
  assert critic["student"] == whole["student"] and critic["critic"] < 0.3 * whole["critic"]
  assert both["student"] < 0.3 * whole["student"] and both["ema"] < 0.3 * whole["ema"]


@pytest.mark.parametrize("config, fields, said", [
    ("pd", {"critic_lora": 4}, "objective 'pd' has no critic"), ("teacher", {"lora": 4}, "has no teacher"),
    ("pd", {"lora": -1}, "config.model.lora=-1: at least 0"),
    ("pd", {"lora": 2, "lora_targets": "("}, "lora_targets=\\( is no regular expression"),
    ("pd", {"lora_alpha": 4.0}, "set config.model.lora or critic_lora")])
def test_configs_that_do_not_fit(config, fields, said):
  with pytest.raises(UsageError, match=said):
    build.build(config_lib.load(f"configs/digits_{config}.py:smoke",
                                {f"model.{name}": str(value) for name, value in fields.items()}))
