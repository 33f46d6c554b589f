"""Parameters split over devices, and gradients accumulated, change where things are and nothing else."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

from ddil_jax.errors import UsageError
from ddil_jax.training import parallel
from ddil_jax.training.parallel import Options, make_runner
from tests import toys
from tests.splitting import BATCH, FSDP, Training, assert_close, batches, reference, training

pytestmark = pytest.mark.xdist_group("splitting")


def assert_same_training(found: Training, state):
  """As on one device: the state after three steps, and the metrics of each."""
  states, metrics = reference()
  assert_close(state, states[2])
  for one, other in zip(found.metrics[:3], metrics):
    assert one.keys() == other.keys()
    for name in other:
      assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name


def shard(array):
  """The shape of what one device holds."""
  (shape,) = {s.data.shape for s in array.addressable_shards}
  return shape


@pytest.fixture(scope="module")
def split():
  found = training("mesh", FSDP)
  return found, found.run(3)


def test_split_parameters_give_the_same_training(split):
  found, state = split
  assert_same_training(found, state)
  assert found.runner.num_devices == 8
  assert found.runner.summary == "batch 16 = 8 device(s) x 1 pass(es) x 2; mesh of data 4 x fsdp 2"


def test_every_copy_of_a_network_is_split(split):
  """Of each player, its optimizer and averages, and of the frozen teacher a device holds its part alone."""
  found, state = split
  held = {"W1": (2, 4), "time": (4,), "label": (4, 8), "W2": (4, 2)}  # of (2, 8), (8,), (4, 8), (8, 2) on 2
  networks = [state.params["student"], state.params["critic"]["net"], state.opt["student"][0].trace,
              state.opt["critic"][0].trace["net"], state.ema["0.9"], found.frozen["teacher"]]
  for network in networks:
    assert {name: shard(leaf) for name, leaf in network.items()} == held
  buffers = [leaf for leaf in jax.tree.leaves(state.dist) if leaf.ndim]
  assert buffers and all(leaf.shape[0] == BATCH and shard(leaf) == (2,) + leaf.shape[1:] for leaf in buffers)
  assert shard(found.runner.place_batch(batches()[0])["image"]) == (2,) + toys.IMAGE
  fresh, shapes = found.runner.create(*found.start), found.runner.shapes(*found.start)
  for made, meant, now in zip(*map(jax.tree.leaves, (fresh, shapes, state)), strict=True):
    assert made.sharding.is_equivalent_to(meant.sharding, made.ndim)
    assert now.sharding.is_equivalent_to(meant.sharding, made.ndim)


@pytest.mark.parametrize("mode, options", [("single", Options()), ("mesh", FSDP)])
def test_one_program_for_all_steps(mode, options):
  """The state comes back laid out as it went in; else the second step would compile anew."""
  found = Training(mode, options)
  found.run(3)
  first, *later = found.compiled
  assert first > 0 and later == [0, 0]


@pytest.mark.parametrize("unroll", [False, True])
def test_accumulated_gradients_are_those_of_the_batch(unroll):
  """In a scan, as on accelerators, and one part after the other, as on CPU."""
  found = Training("single", Options(microbatch=5), unroll=unroll)
  assert_same_training(found, found.run(3))
  assert found.runner.summary == "batch 16 = 1 device(s) x 4 pass(es) x 4"


def test_accumulated_gradients_of_a_split_mesh():
  """Each device's examples in parts of their own."""
  found = Training("mesh", FSDP._replace(microbatch=1))
  assert_close(found.run(3), reference()[0][2])
  assert found.runner.summary.startswith("batch 16 = 8 device(s) x 2 pass(es) x 1")


def held(options, tree):
  """{name: shape of what one of four devices would hold}."""
  found = parallel._Places(jax.devices()[:4], options).params(tree)
  return {name: sharding.shard_shape(tree[name].shape) for name, sharding in found.items()}


def test_rules():
  """The first rule that is found; the largest axis that divides, of equals the last; small and odd ones whole."""
  like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
  tree = {"conv": like(3, 3, 64, 64), "wide": like(512, 64), "odd": like(3, 5), "bias": like(64), "scalar": like()}
  assert held(Options(fsdp=4, min_size=65), tree) == {
      "conv": (3, 3, 64, 16), "wide": (128, 64), "odd": (3, 5), "bias": (64,), "scalar": ()}
  assert held(Options(fsdp=4, min_size=65, rules=("bias=0", "^con=2", "conv=3", "wide=whole")), tree) == {
      "conv": (3, 3, 16, 64), "wide": (512, 64), "odd": (3, 5), "bias": (16,), "scalar": ()}
  assert held(Options(), tree) == {name: leaf.shape for name, leaf in tree.items()}
  for rule, words in (("odd=1", "axis 1 of odd [3, 5]"), ("scalar=0", "axis 0 of scalar []"), ("conv=x", "REGEX=AXIS"),
                      ("conv", "REGEX=AXIS"), ("(=0", "train.sharding: '(=0'")):
    with pytest.raises(UsageError, match=re.escape(words)):
      held(Options(fsdp=4, rules=(rule,)), tree)


def test_an_optimizer_state_lies_with_its_parameters():
  """What mirrors a parameter lies as that does; what has other shapes follows the default, a counter is whole."""
  tree = {"conv": jnp.zeros((4, 16, 8)), "bias": jnp.zeros((8,))}
  places = parallel._Places(jax.devices()[:4], Options(fsdp=4, min_size=0, rules=("conv=0",)))
  adam = places.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(tree), tree)[1][0]
  assert adam.mu == adam.nu == places.params(tree)
  assert adam.count == places.whole
  factored = optax.adafactor(1e-3, min_dim_size_to_factor=8).init(tree)[0]
  rows = jax.device_put(factored, places.optimizer(factored, tree)).v_row["conv"]
  assert rows.shape == (4, 8) and shard(rows) == (4, 2)


def test_loops_are_written_out_for_cpus_alone():
  """Also where a CPU's devices stand in for a GPU's, as in `ddil plan`."""
  made = []
  for platform in ("", "gpu"):
    parallel.make_runner("single", lambda layout: made.append(layout) or (lambda *arguments: arguments), 8,
                         platform=platform)
  assert [layout.unroll for layout in made] == [True, False]


@pytest.mark.parametrize("mode, options, words", [
    ("mesh", Options(fsdp=3), "fsdp=3: a divisor of the 8 device"), ("single", Options(fsdp=2), "fsdp=2.*single"),
    ("pmap", Options(fsdp=2), "train.parallel=mesh, which is pmap"), ("mesh", Options(fsdp=0), "fsdp=0")])
def test_options_that_do_not_fit(mode, options, words):
  with pytest.raises(UsageError, match=words):
    make_runner(mode, lambda layout: None, BATCH, options=options)
