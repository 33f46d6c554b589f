"""Caches of a UNet's deep features: the same network where nothing is old, less work elsewhere."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax import build as build_lib
from ddil_jax import config as config_lib
from ddil_jax import config_checks
from ddil_jax import keys as keys_lib
from ddil_jax import measure, samplers
from ddil_jax.diffusion import feature_cache, prediction, process, solvers, transforms
from ddil_jax.diffusion.rollout import rollout
from ddil_jax.errors import UsageError
from ddil_jax.interop import diffusers
from ddil_jax.models.base import as_net_fn
from ddil_jax.models.blocks import Middle
from ddil_jax.models.unet import UNet
from tests.models.test_unet import noisy

MODULE = UNet(out_channels=1, channels=8, channel_mult=(1, 2), num_res_blocks=2, num_classes=10)
STEPS = 8
GRID = np.linspace(1, 0, STEPS + 1)


@pytest.fixture(scope="module")
def network():
  """(apply, params, x, t, cond) on odd maps."""
  net = as_net_fn(MODULE)
  params = noisy(net.init(jax.random.key(0), (7, 7, 1)))
  x = jax.random.normal(jax.random.key(1), (3, 7, 7, 1))
  return net.apply, params, x, jnp.array([900.0, 500.0, 20.0]), {"label": jnp.array([1, 2, 3])}


@pytest.mark.parametrize("name", MODULE.cache_names())
def test_features_of_the_same_input_give_the_same_output_for_less_work(network, name):
  apply, params, x, t, cond = network
  out, found = apply(params, x, t, cond, None, (name,))
  np.testing.assert_allclose(apply(params, x, t, cond, None, (), found), out, atol=1e-5)
  other = apply(params, x + 1, t, cond)
  taken = apply(params, x + 1, t, cond, None, (), found)
  assert np.abs(taken - other).max() > 1e-3  # the old features are read

  def operations(*reuse):
    return jax.jit(apply, static_argnums=5).lower(params, x, t, cond, None, (), *reuse).cost_analysis()["flops"]

  assert operations(found) < 0.97 * operations()


def walk(network, name, full, scale, batched=False, solver=solvers.ddim()):
  """The end of 8 DDIM steps, with a cache or (full=None) without."""
  apply, params, _, _, cond = network
  p = process.cosine()
  denoiser = prediction.make_denoiser(apply, p, prediction.v())
  guide = transforms.guidance(scale, lambda cond: {**cond, "label": jnp.full_like(cond["label"], 10)})
  policy = lambda denoise: solver(p, transforms.reflect(transforms.clip())(guide(denoise)))  # noqa: E731
  keys = keys_lib.per_example(jax.random.key(2), jnp.arange(3))
  x = jax.random.normal(jax.random.key(3), (3, 7, 7, 1))

  @jax.jit
  def run(params, x):
    chosen = policy(lambda x_t, t, cond: denoiser(params, x_t, t, cond))
    if full is not None:
      chosen = feature_cache.cached_policy(policy, denoiser, params, (name,), full, GRID, cond, batched)
    return rollout(chosen, x, GRID, cond, keys)

  return run(params, x)


@pytest.mark.parametrize("name, scale", [("deep0", 1.0), ("skips", 3.0)])
def test_every_step_full_is_the_sampler_itself_and_rarer_ones_are_further_off(network, name, scale):
  """Guidance keeps the features of both of its calls."""
  exact = walk(network, name, None, scale)
  ends = {interval: walk(network, name, feature_cache.every(STEPS, interval), scale) for interval in (1, 3, 8)}
  errors = {interval: float(jnp.abs(end - exact).max()) for interval, end in ends.items()}
  assert errors[1] < 1e-6
  assert 1e-3 < errors[3] < errors[8]
  if name == "skips":  # the decoder of several steps in one call gives what it gives step by step
    at_once = walk(network, name, feature_cache.every(STEPS, 3), scale, batched=True)
    np.testing.assert_allclose(at_once, ends[3], atol=1e-5)


def test_times_of_a_sampler_of_its_own_cannot_be_decoded_ahead(network):
  with pytest.raises(UsageError, match="other times than those of its grid"):
    walk(network, "skips", [0, 4], 1.0, True, solvers.heun())


@pytest.mark.parametrize("make, said", [
    (lambda: feature_cache.around(10, 10, 5, 1.2), "no 10 of 10 steps"),
    (lambda: feature_cache.keys("4", 50), "there are: 100ls"),
    (lambda: feature_cache.schedule("evry:2", 50), "unknown schedule of full steps 'evry'; did you mean every"),
    (lambda: feature_cache.schedule("around:5,2", 50), r"'around:' and 3 value\(s\) are expected"),
    (lambda: feature_cache.schedule("every:0", 50), "numbers from 1 on"),
    (lambda: feature_cache.cached_policy(None, None, None, ("deep0",), [1, 3], GRID[:5], {}), "the first is 0"),
    (lambda: feature_cache.cached_policy(None, None, None, ("deep0",), [0, 4], GRID[:5], {}), "the last below 4")])
def test_mistakes_are_named(make, said):
  with pytest.raises(UsageError, match=said):
    make()


def test_a_feature_that_cannot_be_taken_is_named(network):
  apply, params, x, t, cond = network
  with pytest.raises(UsageError, match="'deep4'; there are: .*deep3"):
    apply(params, x, t, cond, None, (), {"deep4": x})
  with pytest.raises(UsageError, match="'bottleneck'; there are: skips, deep0"):
    apply(params, x, t, cond, None, (), {"bottleneck": x})


def test_networks_of_diffusers_give_and_take_them_too():
  module, _ = diffusers.architecture("configs/unets/tiny.json")
  level = dataclasses.replace(module.down[0], resample="conv")
  module = module.clone(down=(level, module.down[0]), up=(dataclasses.replace(module.up[0], resample="conv"), *module.up),
                        middle=Middle())
  shapes = module.example((6, 6), tokens=3)
  params = noisy(jax.tree.map(lambda v: np.full(v.shape, 0.1, np.float32),
                              jax.eval_shape(module.init, jax.random.key(0), *shapes)["params"]))
  x, t, cond = jax.tree.map(lambda v: np.cos(np.arange(v.size, dtype=np.float32)).reshape(v.shape), shapes)

  @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
  def run(params, x):
    call = lambda x, features=(), **reuse: module.apply({"params": params}, x, t, cond, None, features, reuse)  # noqa: E731
    out, found = call(x, ("skips", "deep0"))
    return (out, call(x * jnp.nan, skips=found["skips"]), call(x, deep0=found["deep0"]), call(x, deep0=0 * found["deep0"]))

  out, *same, other = run(params, x)
  for taken in same:  # without a look at x where the whole encoder is taken
    np.testing.assert_allclose(taken, out, atol=1e-5)
  assert np.abs(other - out).max() > 1e-3


def test_in_a_run():
  """`eval.cache` with every step full is the sampler itself, to the bit; else it is named, and counted by its work."""
  load = lambda **fields: config_lib.load("configs/digits_teacher.py:smoke", {  # noqa: E731
      f"eval.{name}": str(value) for name, value in ({"sampler_steps": (), "guidance_scales": (2.0,)} | fields).items()})
  built = build_lib.build(load())
  params = noisy(built.parts.init_student(jax.random.key(0), None))
  keys, cond = jax.random.split(jax.random.key(2), 3), {"label": jnp.arange(3)}
  found = {name: samplers.samplers(load(**fields), built, 4)[0] for name, fields in {
      "plain": {}, "every": {"cache": "skips", "cache_steps": "every:1"}, "half": {"cache": "skips"},
      "batched": {"cache": "skips", "cache_batched": True}}.items()}
  drawn = {name: np.asarray(sampler.sample(params, keys, cond)) for name, sampler in found.items()}
  np.testing.assert_array_equal(drawn["every"], drawn["plain"])
  np.testing.assert_allclose(drawn["batched"], drawn["half"], atol=1e-5)
  assert np.abs(drawn["half"] - drawn["plain"]).max() > 1e-3
  assert found["plain"].network_evaluations == found["every"].network_evaluations == 8
  assert 4 < found["half"].network_evaluations < 7  # four calls whole, four of the decoder
  assert measure.variant(load(cache="deep0", cache_steps="keys:3"), built) == "+cached(deep0,keys:3)"
  for fields, said in (({"cache": "bottleneck"}, "config.eval.cache=bottleneck: 'skips' or 'deep0'"),
                       ({"cache": "deep9"}, "config.eval.cache=deep9: unknown feature 'deep9'; there are: "),
                       ({"cache": "skips", "cache_steps": "each"}, "config.eval.cache_steps=each: unknown schedule"),
                       ({"cache": "deep0", "cache_batched": True}, "it goes with config.eval.cache=skips"),
                       ({"cache": "skips", "cache_batched": True, "time_shift": 0.1}, "set config.eval.time_shift to 0"),
                       ({"cache": "skips", "teacher_acts": (0,)}, "set config.eval.teacher_acts")):
    with pytest.raises(UsageError, match=re.escape(said)):
      config_checks.check_evaluation(load(**fields), built)
