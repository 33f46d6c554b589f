"""The GAN term around any method: what it adds, to which images, and what a trained discriminator asks for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import process
from ddil_jax.errors import UsageError
from ddil_jax.objectives import adversarial, ctm
from ddil_jax.objectives.base import FeatureNet, View, bind, make_objective, student_image
from ddil_jax.states.base import Context
from tests import building, toys

BASES = {"ctm": dict(num_scales=9), "scott": dict(num_scales=8, solver_steps=2), "dmd2": dict(num_steps=2)}


def setting(options, parts=None, teacher=None):
  """An objective with states of the forward process, and what its losses see."""
  parts, teacher = parts or toys.toy_parts(), teacher or toys.toy_init(jax.random.key(7))
  objective = make_objective("adversarial", parts, options)
  batch = toys.toy_batch(4)
  keys = keys_lib.per_example(jax.random.key(3), batch["lane"])
  params = objective.init(jax.random.key(0), teacher)
  ctx = Context(jnp.zeros((), jnp.int32), jax.random.key(3), keys, batch, params["student"], teacher, 4)
  states = building.sources(parts, objective)["forward"].fresh(ctx)
  view = View(params, {name: params["student"] for name in objective.targets}, teacher, ctx.step, key=ctx.key)
  return objective, view, states, batch, keys


@pytest.mark.parametrize("base", ["scott", *(pytest.param(base, marks=pytest.mark.slow) for base in ("ctm", "dmd2"))])
def test_weight_0_is_the_base_method(base):
  parts, teacher = toys.toy_parts(), toys.toy_init(jax.random.key(7))
  none = make_objective("adversarial", parts, dict(base=base, adversarial_weight=0.0) | BASES[base])
  alone = make_objective(base, parts, BASES[base])
  found, expected = (building.run(each, building.ddil(parts, each), teacher)[0] for each in (none, alone))
  jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@pytest.mark.parametrize("kind, heads", [("images", ("a", "b")), ("teacher", ("c",))])
@pytest.mark.parametrize("base", [pytest.param("ctm", marks=pytest.mark.slow), "scott"])
def test_heads_that_say_nothing_add_nothing(base, kind, heads):
  """A discriminator of zeros: the student has its method's loss, the discriminator 2 for each head and no penalty."""
  objective, view, *rest = setting(dict(base=base, kind=kind, heads=heads, r1=0.5) | BASES[base])
  own = view.params["discriminator"]
  silent = own | {"heads": jax.tree.map(jnp.zeros_like, own["heads"])}
  alone = make_objective(base, toys.toy_parts(), BASES[base]).players[0].loss
  expected, _ = alone(view.params["student"], view, *rest)
  student, *_, discriminator = objective.players
  assert discriminator.name == "discriminator"
  found, metrics = student.loss(view.params["student"], view._replace(params=view.params | {"discriminator": silent}), *rest)
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(metrics["adversarial"], 0)
  loss, parts = discriminator.loss(silent, view, *rest)
  np.testing.assert_array_equal(loss, 2 * len(heads))
  np.testing.assert_array_equal(parts["r1"], 0)
  loud, metrics = student.loss(view.params["student"], view, *rest)
  np.testing.assert_allclose(loud, expected + 0.4 * metrics["adversarial"], rtol=1e-5, atol=1e-6)
  assert float(jnp.abs(metrics["adversarial"]).min()) > 1e-3


def test_the_image_of_ctm_is_its_jump_to_the_clean_end():
  objective, view, states, _, keys = setting(dict(base="ctm") | BASES["ctm"])
  parts = toys.toy_parts()
  found = student_image(parts, objective, view.params["student"], view, states, keys, "jump")
  end = jnp.full(4, objective.sampler_grid[-1], jnp.float32)
  student = bind(objective.student, view.params["student"])
  expected = ctm.jump(parts.process, student, states.x_t, states.t, end, states.cond)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", adversarial.KINDS)
def test_a_trained_discriminator_asks_for_the_real_images(kind):
  """Students whose images are too dark are told to be brighter, and the other way round; features are pixels."""
  p = process.flow()

  def student(params, x_t, t, cond, keys=None, features=()):
    return params["b"] + 0 * x_t

  def teacher(params, x_t, t, cond, keys=None, features=()):
    return (x_t, {name: x_t for name in features}) if features else x_t

  pixels = FeatureNet(None, lambda: {}, lambda params, images, names: {name: images for name in names})
  parts = toys.toy_parts(p, student=student, teacher=teacher)._replace(
      init_student=lambda key, teacher: {"b": jnp.zeros(())}, feature_net=lambda name: pixels)
  objective, view, states, batch, keys = setting(
      dict(base="regression", kind=kind, num_steps=2, label_steps=1), parts, toys.toy_init(jax.random.key(7)))
  *_, discriminator = objective.players
  optimizer = optax.adam(0.01)

  @jax.jit
  def asked(b):
    """The derivative of the student's GAN term by its brightness, for a discriminator that learned with it."""
    fixed = {"b": b}
    seen = view._replace(params=view.params | {"student": fixed})
    mean = lambda own: discriminator.loss(own, seen, states, batch, keys)[0].mean()  # noqa: E731

    def body(i, carried):
      own, state = carried
      updates, state = optimizer.update(jax.grad(mean)(own), state, own)
      return {**own, "heads": optax.apply_updates(own["heads"], updates["heads"])}, state

    own = jax.tree.map(jnp.zeros_like, view.params["discriminator"])
    trained, _ = jax.lax.fori_loop(0, 100, body, (own, optimizer.init(own)))
    then = view._replace(params=view.params | {"discriminator": trained})
    gan = lambda params: objective.players[0].loss(params, then, states, batch, keys)[1]["adversarial"].mean()  # noqa: E731
    return jax.grad(gan)(fixed)["b"], mean(own) - mean(trained)

  for b in (-1.5, 1.5):
    slope, learned = asked(b)
    assert float(learned) > 0.1 and float(slope) * b > 1e-3


@pytest.mark.parametrize("options, message", [
    (dict(kind="pixels"), "kind 'pixels'"), (dict(images="all"), "images 'all'"), (dict(r1=-1.0), "r1 -1"),
    (dict(adversarial_weight=-1.0), "adversarial_weight -1"), (dict(heads_times=(0.5, 0.2)), "heads_times"),
    (dict(base="denoising"), "base 'denoising'"), (dict(base="adversarial"), "base 'adversarial'"),
    (dict(num_step=3), "option of objective adversarial: 'num_step'")])
def test_mistakes_are_named(options, message):
  with pytest.raises(UsageError, match=message):
    make_objective("adversarial", toys.toy_parts(), options)
