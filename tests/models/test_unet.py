"""The UNet: shapes, conditioning, dropout, features, and that it is traced once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax.errors import UsageError
from ddil_jax.interop import diffusers
from ddil_jax.models.adapters import learns
from ddil_jax.models.base import as_net_fn, by_path, count_params, init_from
from ddil_jax.models.layers import REMAT
from ddil_jax.models.unet import UNet, upsample

SMALL = dict(out_channels=1, channels=8, channel_mult=(1, 2), num_classes=10)


def noisy(params, seed=7, scale=0.3):
  """Params away from their zeros, so that every branch acts."""
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  noise = [rng.standard_normal(p.shape, np.float32) for p in leaves]
  return tree.unflatten([p + scale / np.sqrt(p.shape[0]) * n for p, n in zip(leaves, noise, strict=True)])


@functools.cache  # so that tests share compilations
def make(shape=(8, 8, 1), **options):
  net = as_net_fn(UNet(**{**SMALL, **options}))
  return jax.jit(net.apply, static_argnames="features"), net.init(jax.random.key(0), shape)


def batch(b=4, shape=(8, 8, 1), seed=1):
  x = jax.random.normal(jax.random.key(seed), (b, *shape))
  return x, jnp.linspace(5.0, 990.0, b), {"label": jnp.arange(b) % 10}


@pytest.fixture(scope="module")
def demo():
  apply, params = make()
  return apply, noisy(params)


def test_the_demo_network_is_small_and_starts_at_zero():
  apply, params = make()
  assert 33_000 < count_params(params) < 37_000
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  assert type(params) is dict and all(type(v) is dict for v in params.values())
  np.testing.assert_array_equal(apply(params, *batch()), 0)


def test_init_is_the_same_alone_under_jit_and_as_shapes():
  net = as_net_fn(UNet(**SMALL, guidance_embedding=8))
  cond = {"label": jnp.zeros(3, jnp.int32), "guidance_scale": jnp.ones(3)}
  alone = net.init(jax.random.key(0), (8, 8, 1), cond)
  shapes = jax.eval_shape(lambda k: net.init(k, (8, 8, 1)), jax.random.key(0))
  assert {k: v.shape for k, v in by_path(alone).items()} == {k: v.shape for k, v in by_path(shapes).items()}
  again = net.init(jax.random.key(0), (8, 8, 1))
  other = net.init(jax.random.key(1), (8, 8, 1))
  assert jax.tree.all(jax.tree.map(np.array_equal, alone, again))
  assert not np.array_equal(alone["conv_in"]["kernel"], other["conv_in"]["kernel"])


@pytest.mark.parametrize("shape, options", [
    pytest.param((28, 28, 1), dict(channel_mult=(1, 2, 2), attention_resolutions=(7,), num_heads=2), id="28x28"),
    pytest.param((7, 5, 3), dict(out_channels=6, num_res_blocks=2, channel_mult=(1, 1, 2), num_classes=0),
                 marks=pytest.mark.slow, id="7x5"),
    pytest.param((2, 2, 1), dict(channel_mult=(1, 1, 1)), id="2x2"),  # deeper than the map is wide: 2, 1, 1
])
def test_odd_and_small_sizes(shape, options):
  apply, params = make(shape, **options)
  x, t, cond = batch(2, shape)
  out = apply(noisy(params), x, t, cond)
  assert out.shape == (*x.shape[:3], options.get("out_channels", 1)) and out.dtype == jnp.float32
  assert np.all(np.isfinite(out)) and np.std(out) > 0


def test_upsample_doubles_and_crops():
  x = jnp.arange(4.0).reshape(1, 2, 2, 1)
  np.testing.assert_array_equal(upsample(x, (3, 4))[0, :, :, 0], [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]])


def test_bfloat16_compute_keeps_float32_params_and_output():
  options = dict(attention_resolutions=(4,), guidance_embedding=8)
  full, params = make(**options)
  half, half_params = make(**options, dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(half_params)} == {jnp.dtype("float32")}
  params = noisy(params)
  x, t, cond = batch()
  exact, (out, named) = full(params, x, t, cond), half(params, x, t, cond, features=("bottleneck",))
  assert out.dtype == jnp.float32 and named["bottleneck"].dtype == jnp.bfloat16
  error = np.linalg.norm(out - exact) / np.linalg.norm(exact)
  assert 1e-5 < error < 0.05  # rounded to 8 bits, and not more than that


def test_missing_label_is_the_null_class(demo):
  apply, params = demo
  x, t, cond = batch()
  null = apply(params, x, t, {"label": jnp.full(4, 10)})
  np.testing.assert_array_equal(apply(params, x, t, {}), null)
  assert np.all(np.max(np.abs(apply(params, x, t, cond) - null), axis=(1, 2, 3)) > 1e-3)


def test_an_unconditional_network_ignores_labels():
  apply, params = make(num_classes=0)
  assert "label" not in params
  x, t, cond = batch()
  np.testing.assert_array_equal(apply(noisy(params), x, t, cond), apply(noisy(params), x, t, {}))


def test_output_depends_on_pixels_time_and_label_of_its_own_example_only(demo):
  apply, params = demo
  x, t, cond = batch()
  label = cond["label"]
  changes = [(x.at[1, i, j].add(1.0), t, label) for i, j in [(0, 0), (0, 7), (4, 3), (7, 7)]]
  changes += [(x, t.at[1].add(50.0), label), (x, t, label.at[1].set(7))]
  before = apply(params, x, t, cond)
  for x_new, t_new, label_new in changes:
    changed = np.asarray(apply(params, x_new, t_new, {"label": label_new}) != before)
    assert np.mean(changed[1]) > 0.95  # a pixel in 64 may round to the same number
    assert not np.any(np.delete(changed, 1, axis=0))


def test_a_training_step_is_traced_once_and_reaches_every_parameter():
  net = as_net_fn(UNet(**SMALL, attention_resolutions=(4,), guidance_embedding=8))
  _, params = make(attention_resolutions=(4,), guidance_embedding=8)
  params = noisy(params)
  traces = []

  @jax.jit
  def step(params, x, t, cond):
    traces.append(1)
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((net.apply(p, x, t, cond) - x) ** 2))(params)
    return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), loss, grads

  x, t, cond = batch(10)
  cond["guidance_scale"] = jnp.linspace(1.0, 8.0, 10)
  _, _, grads = step(params, x, t, cond)
  grads = by_path(grads)
  assert [name for name, g in grads.items() if not np.any(g)] == []
  # The null class does not occur in the batch: its row, and only it, stays.
  np.testing.assert_array_equal(np.any(grads["label/embedding"], axis=1), [True] * 10 + [False])

  losses = []
  for _ in range(4):
    params, loss, _ = step(params, x, t, cond)
    losses.append(float(loss))
  assert len(traces) == 1
  assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_guidance_embedding_has_no_effect_at_first():
  teacher, teacher_params = make()
  student, own = make(guidance_embedding=8)
  teacher_params = noisy(teacher_params)
  params, report = init_from(own, teacher_params)
  assert report.kept == ("guidance/kernel",) and report.unused == ()
  x, t, cond = batch()
  guided = {**cond, "guidance_scale": jnp.array([1.0, 2.0, 5.0, 15.0])}
  np.testing.assert_allclose(student(params, x, t, guided), teacher(teacher_params, x, t, cond), atol=1e-6)

  trained = noisy(params)
  np.testing.assert_array_equal(student(trained, x, t, cond),
                                student(trained, x, t, {**cond, "guidance_scale": jnp.ones(4)}))
  change = np.abs(student(trained, x, t, guided) - student(trained, x, t, cond)).max(axis=(1, 2, 3))
  assert change[0] == 0 and np.all(change[1:] > 1e-3)


@pytest.mark.slow
def test_adapters_have_no_effect_at_first_and_parameters_of_their_own():
  """The base network to the bit, whatever the scale; later they read scale, time and class of their own example."""
  options = dict(attention_resolutions=(4,))
  base, base_params = make(**options)
  net, own = make(**options, adapter=8)
  base_params, x, t, cond = noisy(base_params), *batch()
  params, report = init_from(own, base_params)
  assert report.unused == () and all("_adapter/" in name for name in report.kept)
  assert {name.partition("/")[0] for name in report.kept} == {
      f"{block}_adapter" for block in ("down_0_0", "down_1_0", "mid_0", "mid_1", "up_0_0", "up_1_0")}
  guided = {**cond, "guidance_scale": jnp.array([1.0, 2.0, 5.0, 15.0])}
  np.testing.assert_array_equal(net(params, x, t, guided), base(base_params, x, t, cond))

  trained = {name: noisy(value) if name.endswith("_adapter") else value for name, value in params.items()}
  before = net(trained, x, t, cond)
  assert np.abs(before - base(base_params, x, t, cond)).max() > 1e-3
  change = np.abs(net(trained, x, t, guided) - before).max(axis=(1, 2, 3))
  assert change[0] == 0 and np.all(change[1:] > 1e-3)


def test_what_of_an_adapter_learns():
  """All but the frequencies and phases of its waves."""
  net = as_net_fn(UNet(**SMALL, adapter=8))
  params = jax.eval_shape(lambda key: net.init(key, (8, 8, 1)), jax.random.key(0))
  fixed = {name for name in by_path(params["mid_0_adapter"]) if not learns(name)}
  assert fixed == {f"{encoder}/{name}" for encoder in ("guidance_scale", "time") for name in ("frequencies", "phases")}


def test_dropout_is_per_example_and_off_without_keys():
  apply, params = make(dropout=0.5)
  params = noisy(params)
  x, t, cond = batch(4)
  keys = jax.random.split(jax.random.key(3), 4)
  whole = apply(params, x, t, cond, keys)
  half = apply(params, x[:2], t[:2], {"label": cond["label"][:2]}, keys[:2])
  np.testing.assert_allclose(half, whole[:2], atol=1e-5)
  np.testing.assert_array_equal(whole, apply(params, x, t, cond, keys))
  without = apply(params, x, t, cond)
  np.testing.assert_array_equal(without, make()[0](params, x, t, cond))
  assert np.abs(whole - without).max() > 1e-2
  same = [jnp.repeat(v[:1], 4, axis=0) for v in (x, t, cond["label"])]
  draws = apply(params, same[0], same[1], {"label": same[2]}, keys)
  assert np.abs(draws[0] - draws[1]).max() > 1e-2  # another key, another mask


def test_features_by_name_and_an_unchanged_output():
  apply, params = make((28, 28, 1), channel_mult=(1, 2, 3))
  params = noisy(params)
  x, t, cond = batch(2, (28, 28, 1))
  names = ("level2", "bottleneck", "encoder", "level0", "level1")
  out, found = apply(params, x, t, cond, features=names)
  assert {name: v.shape for name, v in found.items()} == {
      "level0": (2, 28, 28, 8), "level1": (2, 14, 14, 16), "level2": (2, 7, 7, 24),
      "encoder": (2, 7, 7, 24), "bottleneck": (2, 7, 7, 24)}
  np.testing.assert_allclose(out, apply(params, x, t, cond), atol=1e-5)
  np.testing.assert_array_equal(found["encoder"], found["level2"])
  assert np.abs(found["bottleneck"] - found["encoder"]).max() > 1e-2


def test_mistakes_are_named(demo):
  apply, params = demo
  with pytest.raises(UsageError, match="'middle'; there are: bottleneck, encoder, level0, level1"):
    apply(params, *batch(), features=("middle",))
  with pytest.raises(UsageError, match="num_heads 3 must divide 16 channels"):
    make(attention_resolutions=(4,), num_heads=3)


def published(remat):
  module, _ = diffusers.architecture("configs/unets/tiny.json")
  return module.clone(style=dataclasses.replace(module.style, remat=remat))


@pytest.mark.parametrize("module, channels, cond", [
    (lambda remat: UNet(out_channels=1, attention_resolutions=(8,), channel_mult=(1,), remat=remat), 1, {}),
    (published, 4, {"text": jnp.ones((4, 5, 16))})], ids=["own", "diffusers"])
def test_rematerialisation_keeps_less_and_gives_the_same(module, channels, cond):
  """Each policy keeps less for the gradient than the one before it, of the same parameters."""
  inputs, kept, gradients = (*batch(shape=(8, 8, channels))[:2], cond), {}, {}
  for name in REMAT:
    net = as_net_fn(module(name))
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), (8, 8, channels), cond))  # noqa: B023
    params = noisy(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    loss = lambda p: (net.apply(p, *inputs) ** 2).sum()  # noqa: B023, E731
    pull_back = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)  # noqa: B023
    kept[name] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull_back))
    if name in ("none", "blocks"):
      gradients[name] = jax.jit(jax.grad(loss))(params)
  assert kept["none"] > 1.5 * kept["dots"] and kept["dots"] > 1.2 * kept["blocks"], kept
  for a, b in zip(*map(jax.tree.leaves, gradients.values()), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
