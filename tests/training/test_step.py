"""What the training step does beside the losses."""

import jax
import numpy as np
import optax
import pytest

from ddil_jax.objectives import dmd2, pd
from ddil_jax.training import optim
from ddil_jax.training.parallel import Options, make_runner
from ddil_jax.training.step import due_players, init_state, make_train_step
from tests import building, toys


@pytest.mark.parametrize("period", [1, 2])
def test_averages_follow_the_students_updates(period):
  """EMAs by hand: constant, and warm, which counts the student's own updates."""
  parts = toys.toy_parts()
  objective = dmd2.make(parts, num_steps=2, period=period)
  states = building.on_policy(building.sources(parts, objective)["forward"])
  decays = {"constant": 0.9, "warm": optim.warm_ema(0.3)}
  optimizers, teacher = {p.name: optax.sgd(1.0) for p in objective.players}, toys.toy_init(jax.random.key(7))
  runner = make_runner("single", lambda layout: make_train_step(objective, states, optimizers, decays, 8, layout=layout), 8)
  frozen = runner.place_frozen({"teacher": teacher})
  state = runner.place(init_state(objective, states, optimizers, decays, jax.random.key(0), teacher, toys.toy_batch()))
  expected = dict.fromkeys(decays, np.asarray(state.params["student"]["W1"], np.float64))
  updates = 0
  for step in range(6):
    before = jax.tree.map(np.array, state.ema)  # the step frees what it is given
    state, _ = runner.step(state, frozen, runner.place_batch(toys.toy_batch(8, step)), jax.random.key(1),
                           due_players(objective, step))
    if step % period:
      assert all((state.ema[name]["W1"] == before[name]["W1"]).all() for name in decays)
      continue
    student = np.asarray(state.params["student"]["W1"], np.float64)
    for name, decay in {"constant": 0.9, "warm": min(0.3, (1 + updates) / (10 + updates))}.items():
      expected[name] = decay * expected[name] + (1 - decay) * student
      np.testing.assert_allclose(state.ema[name]["W1"], expected[name], rtol=1e-6, atol=1e-7)
    updates += 1
  assert not np.allclose(expected["warm"], expected["constant"], rtol=1e-3)


def test_a_warm_average_forgets_its_start():
  decay, weight = optim.warm_ema(0.999), 1.0
  for n in range(200):
    weight *= float(decay(n))
  assert weight < 1e-6 < 0.999**200 and float(decay(10**6)) == np.float32(0.999)


def walk(objective, distribution, steps, batch_of=toys.toy_batch, mode="single", batch_size=8):
  """The metrics of every step."""
  optimizers = {p.name: optax.sgd(1e-2) for p in objective.players}
  runner = make_runner(mode, lambda layout: make_train_step(objective, distribution, optimizers, {}, batch_size,
                                                          layout=layout), batch_size)
  teacher = toys.toy_init(jax.random.key(7))
  state = runner.place(init_state(objective, distribution, optimizers, {}, jax.random.key(0), teacher,
                                  toys.toy_batch(batch_size)))
  frozen, seen = runner.place_frozen({"teacher": teacher}), []
  for i in range(steps):
    state, metrics = runner.step(state, frozen, runner.place_batch(batch_of(batch_size, i)), jax.random.key(1),
                                 due_players(objective, i))
    seen.append({name: (float(m.total), float(m.count)) for name, m in metrics.items()})
  return seen, runner.fetch(state)


@pytest.mark.parametrize("mode", ["single", "pmap"])
def test_gradient_norms_by_source(mode):
  """With one source a step, each step's norm is that source's."""
  parts = toys.toy_parts()
  objective = pd.make(parts)
  names = ("forward", "student", "teacher")
  seen, _ = walk(objective, building.ddil(parts, objective), 12, mode=mode)
  drawn = set()
  for metrics in seen:
    (source,) = [name for name in names if metrics[f"student/loss@{name}"][1]]
    drawn.add(source)
    assert metrics[f"student/loss@{source}"] == pytest.approx(metrics["student/loss"])
    assert metrics["student/grad_norm"][0] > 0 and metrics["student/grad_norm"][1] == 1
    for name in names:
      expected = metrics["student/grad_norm"] if name == source else (0, 0)
      assert metrics[f"student/grad_norm@{name}"] == expected
  assert drawn == set(names)
  assert not any("dagger" in name for name in seen[0])  # a source that does not exist has no metrics


def test_a_mixed_batchs_gradient_belongs_to_no_source():
  parts = toys.toy_parts()
  objective = pd.make(parts)
  seen, _ = walk(objective, building.ddil(parts, objective, (0.5, 0.25, 0.25), "per_example"), 2)
  for metrics in seen:
    assert [metrics[f"student/loss@{name}"][1] for name in ("forward", "student", "teacher")] == [4, 2, 2]
    assert metrics["student/grad_norm"][1] == 1
    assert all(metrics[f"student/grad_norm@{name}"] == (0, 0) for name in ("forward", "student", "teacher"))


def test_each_player_counts_its_skipped_updates():
  """A real image that is not finite stops the critic's GAN term, and nothing of the student's."""
  parts = toys.toy_parts()
  objective = dmd2.make(parts, num_steps=2, period=1, gan_weight=0.1)
  states = building.on_policy(building.sources(parts, objective)["student"])

  def batch_of(size, step):
    batch = toys.toy_batch(size, step)
    return batch | {"image": batch["image"] * np.float32(np.inf)} if step == 1 else batch

  seen, state = walk(objective, states, 3, batch_of)
  assert [m["critic/skipped"] for m in seen] == [(0, 1), (1, 1), (0, 1)]
  assert [m["student/skipped"] for m in seen] == [(0, 1)] * 3
  assert [m["skipped"] for m in seen] == [(0, 1), (1, 1), (0, 1)]
  assert seen[1]["critic/loss"] == seen[1]["critic/grad_norm"] == seen[1]["critic/grad_norm@student"] == (0, 0)
  assert int(state.bad_steps) == 0


def test_parameters_that_do_not_learn_keep_their_values():
  """Player.trainable: no gradient and no weight decay reaches the others."""
  parts = toys.toy_parts()
  objective = pd.make(parts)
  only = lambda path: path == "W1"  # noqa: E731
  masked = objective._replace(players=(objective.players[0]._replace(trainable=only),))
  source = building.on_policy(building.sources(parts, objective)["forward"])
  teacher, optimizer = toys.toy_init(jax.random.key(7)), optax.adamw(1e-2, weight_decay=0.1)
  before, _ = building.run(masked, source, teacher, optimizer=optimizer, steps=0)
  after, _ = building.run(masked, source, teacher, optimizer=optimizer, steps=2)
  moved = {name: bool((after.params["student"][name] != before.params["student"][name]).any())
           for name in before.params["student"]}
  assert moved == {name: name == "W1" for name in moved}


@pytest.mark.parametrize("mode, microbatch, count", [("single", 0, 8), ("single", 4, 4), ("mesh", 0, 8), ("pmap", 0, 8)])
def test_what_a_batch_has_in_common(mode, microbatch, count):
  """The mean of the others over all devices, or of one pass; a key that is the step's, wherever it is asked for."""
  parts = toys.toy_parts()
  objective = pd.make(parts)

  def loss(params, view, states, batch, keys):
    value, _ = objective.players[0].loss(params, view, states, batch, keys)
    own = batch["lane"].astype(value.dtype) ** 2
    coin = jax.random.uniform(view.key)
    return value, {"others": view.others(own) ** 2, "coin": coin + 0 * value, "square": coin**2 + 0 * value}

  changed = objective._replace(players=(objective.players[0]._replace(loss=loss),))
  states = building.on_policy(building.sources(parts, objective)["forward"])
  optimizers, teacher = {"student": optax.sgd(1e-2)}, toys.toy_init(jax.random.key(7))
  runner = make_runner(mode, lambda layout: make_train_step(changed, states, optimizers, {}, 8, layout=layout), 8,
                       options=Options(microbatch=microbatch))
  state = runner.place(init_state(changed, states, optimizers, {}, jax.random.key(0), teacher, toys.toy_batch(8)))
  frozen, coins = runner.place_frozen({"teacher": teacher}), []
  for step in range(2):
    state, found = runner.step(state, frozen, runner.place_batch(toys.toy_batch(8, step)), jax.random.key(1),
                               ("student",))
    assert float(found["student/square"].total) / 8 == pytest.approx((float(found["student/coin"].total) / 8) ** 2)
    coins.append(float(found["student/coin"].total))
  groups = (np.arange(8.0) ** 2).reshape(-1, count)
  expected = [np.delete(group, i).mean() ** 2 for group in groups for i in range(count)]
  assert float(found["student/others"].total) == pytest.approx(np.sum(expected), rel=1e-5)
  assert coins[0] != coins[1]
