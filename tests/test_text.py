"""Networks that read prompts: what they are given, with and without a prompt, and within which bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax import build, measure
from ddil_jax import config as config_lib
from ddil_jax.data import pipeline
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import drop_condition


@pytest.fixture(scope="module")
def lcm():
  config = config_lib.load("configs/emoji_lcm.py:ddil,smoke")
  return config, build.build(config)


def test_a_batch_has_its_prompts(lcm):
  """The rows of the same examples, whatever the order."""
  _, built = lcm
  data, batch = built.dataset, pipeline.batches(built.dataset, 16, seed=3)[5]
  index = [int(np.flatnonzero((data.images == image).all((1, 2, 3)))[0]) for image in batch["image"]]
  np.testing.assert_array_equal(batch["text"], data.cond["text"][index])
  assert built.parts.cond["text"].shape == (1, *batch["text"].shape[1:])
  part = pipeline.subset(data, 0.1)
  at = int(np.flatnonzero((data.images == part.images[7]).all((1, 2, 3)))[0])
  np.testing.assert_array_equal(part.cond["text"][7], data.cond["text"][at])
  assert part.captions[7] == data.captions[at]


def test_no_prompt_is_the_sets_own(lcm):
  """Guidance and dropped conditions see the empty prompt, not zeros, and keep what is no prompt."""
  _, built = lcm
  data = built.dataset
  cond = {"label": jnp.zeros(200, jnp.int32), "text": jnp.asarray(data.cond["text"][:200]),
          "guidance_scale": jnp.arange(200.0)}
  nothing = built.parts.null(cond)
  np.testing.assert_array_equal(nothing["text"], np.broadcast_to(data.null["text"], cond["text"].shape))
  assert (nothing["label"] == data.num_classes).all()
  np.testing.assert_array_equal(nothing["guidance_scale"], cond["guidance_scale"])

  keys = jax.random.split(jax.random.key(0), 200)
  some = drop_condition(built.parts, keys, 0.3)(cond)
  dropped = np.asarray(some["label"] == data.num_classes)
  assert 40 <= dropped.sum() <= 80
  np.testing.assert_array_equal(some["text"], np.where(dropped[:, None, None], nothing["text"], cond["text"]))

  seen = []
  guided = built.parts.guidance(2.0)(lambda x, t, cond: seen.append(cond["text"]) or x)
  guided(jnp.zeros((200, 8, 8, 4)), jnp.zeros(200), cond)
  np.testing.assert_array_equal(seen[0], cond["text"])
  np.testing.assert_array_equal(seen[1], nothing["text"])


def test_samples_follow_the_prompts_of_the_set(lcm):
  _, built = lcm
  n = len(built.dataset.labels)
  some, more = measure.conditions(built.dataset, 20), measure.conditions(built.dataset, n + 20)
  np.testing.assert_array_equal(some["text"], more["text"][:20])
  np.testing.assert_array_equal(more["text"][n:], some["text"])
  assert (np.unique(more["text"][:n, 0, 0], return_counts=True)[1]
          == np.unique(built.dataset.cond["text"][:, 0, 0], return_counts=True)[1]).all()
  thrice = measure.conditions(built.dataset, 20, each=3)
  np.testing.assert_array_equal(thrice["text"], np.repeat(some["text"], 3, axis=0)[:20])
  assert measure.prompts(built.dataset, 20, each=3)[3:6] == measure.prompts(built.dataset, 2)[1:] * 3


def test_bounds_of_the_latents(lcm):
  config, built = lcm
  config = config.copy_and_resolve_references().unlock()
  config.reflect.kind = "clip"
  outside = lambda x, t, cond: x * 0 + 3.0  # noqa: E731
  lows, highs = (-2.0, -1.0, -2.0, -3.0), (0.5, 1.0, 1.5, 2.0)  # of 4 channels
  for lo, hi, bounds in (((), (), (lows, highs)), ((-5.0,) * 4, highs, None)):
    with config.reflect.ignore_type():
      config.reflect.lo, config.reflect.hi = lo, hi
    reflect = build.make_reflection(config, built.dataset._replace(bounds=bounds))("teacher")
    np.testing.assert_array_equal(reflect(outside)(jnp.zeros((1, 2, 2, 4)), None, {})[0, 0, 0], hi or bounds[1])
  with config.reflect.ignore_type():
    config.reflect.lo = ()
  with pytest.raises(UsageError, match="bounds of the data set, and fake_text names none"):
    build.make_reflection(config, built.dataset._replace(bounds=None))


@pytest.mark.parametrize("spec, fields, words", [
    ("emoji_lcm", {"data.name": "fake"}, "reads text of width 16, the data set fake has no text"),
    ("emoji_lcm", {"model.file": ""}, "data set fake_text has text, which the project's own UNet does not read"),
    ("digits_lcm", {"data.name": "fake_text"}, "data set fake_text has text, which the project's own UNet does not read"),
])
def test_networks_that_do_not_fit(spec, fields, words):
  config = config_lib.load(f"configs/{spec}.py:smoke", fields)
  with pytest.raises(UsageError, match=words):
    build.build(config)
