"""Small pure networks and teachers for tests: per-pixel MLPs with known structure."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax.diffusion import grids, prediction, process, transforms
from ddil_jax.objectives.base import Adapted, FeatureNet, Parts

NUM_CLASSES = 3
IMAGE = (4, 4, 2)


def toy_init(key, width=8, channels=2):
  """Parameters of `toy_net`."""
  keys = jax.random.split(key, 4)
  normal = lambda k, *shape: 0.3 * jax.random.normal(k, shape)  # noqa: E731
  return {"W1": normal(keys[0], channels, width), "time": normal(keys[1], width),
          "label": normal(keys[2], NUM_CLASSES + 1, width), "W2": normal(keys[3], width, channels)}


def toy_net(params, x, t, cond, keys=None, features=()):
  """tanh MLP on each pixel, with time, class, guidance scale and the end of a jump."""
  del keys
  bias = (t / 1000)[:, None] * params["time"][None]
  if "label" in cond:
    bias = bias + params["label"][cond["label"]]
  if "guidance_scale" in cond and "adapter" not in params:  # which reads it instead
    bias = bias + 0.01 * cond["guidance_scale"][:, None] * params["time"][None]
  if "end_time" in cond:
    bias = bias + 0.1 * (cond["end_time"] / 1000)[:, None] * params["time"][None]
  hidden = jnp.tanh(x @ params["W1"] + bias[:, None, None, :])
  if "adapter" in params:
    read = jnp.stack([cond["guidance_scale"], t / 1000], axis=-1)
    hidden = hidden + (jnp.tanh(read @ params["adapter"]["in"]) @ params["adapter"]["out"])[:, None, None, :]
  out = hidden @ params["W2"]
  return (out, {name: hidden for name in features}) if features else out


def toy_head(params, feature):
  """Pixel mean, then linear: logits [B]."""
  return feature.mean((1, 2)) @ params["w"]


def feature_net(name=""):
  """A network of one layer, called as one likes: tanh of a linear map of each pixel, and its square."""
  del name

  def layers(params, images, names):
    hidden = jnp.tanh(images @ params["W"])
    return {each: jnp.concatenate([hidden, hidden**2], -1) for each in names}

  init = lambda key: {"W": jax.random.normal(key, (IMAGE[-1], 4))}  # noqa: E731
  return FeatureNet(init, lambda: jax.device_get(init(jax.random.key(5))), layers)


def null(cond):
  """Null label."""
  return {**cond, "label": jnp.full_like(cond["label"], NUM_CLASSES)} if "label" in cond else cond


def copy_of(teacher, key):
  """A fresh copy of the teacher's parameters, or new ones."""
  return jax.tree.map(jnp.array, teacher) if teacher else toy_init(key)


def adapted(process_):
  """hidden width -> the toy network with an adapter that reads guidance scale and time."""
  def net(params, x, t, cond, keys=None, features=()):
    return toy_net({**params["base"], "adapter": params["adapter"]}, x, t, cond, keys, features)

  def init(hidden, key, teacher):
    return {"in": jax.random.normal(key, (2, hidden)), "out": jnp.zeros((hidden, teacher["W1"].shape[1]))}

  return lambda hidden: Adapted(prediction.make_denoiser(net, process_, prediction.v()),
                                functools.partial(init, hidden), lambda path: True)


def toy_parts(process_=None, grid="uniform", reflect=None, guidance_scale=1.0, teacher=None, student=None):
  """Parts with toy networks; `teacher` may be a closed-form denoiser."""
  process_ = process_ or process.cosine()
  denoiser = prediction.make_denoiser(toy_net, process_, prediction.v())
  reflect = reflect or (lambda denoise: denoise)
  return Parts(
      process=process_, make_grid=lambda n: grids.make(grid, n, process_), student=student or denoiser,
      init_student=lambda key, params: copy_of(params, key), teacher=teacher or denoiser,
      critic=denoiser, init_critic=lambda key, params: copy_of(params, key),
      head=toy_head, init_head=lambda key, feature: {"w": jax.random.normal(key, (feature.shape[-1],))},
      guidance=lambda scale: transforms.guidance(scale, null), null=null,
      cond={"label": jax.ShapeDtypeStruct((1,), jnp.int32)}, guidance_scale=guidance_scale,
      num_classes=NUM_CLASSES, image_shape=IMAGE,
      reflect_teacher=reflect, reflect_target=reflect, reflect_sampler=reflect,
      adapt=adapted(process_), feature_net=feature_net)


def toy_batch(size=8, seed=0):
  """A host batch."""
  rng = np.random.default_rng(seed)
  return {"image": rng.uniform(-1, 1, (size,) + IMAGE).astype(np.float32),
          "label": rng.integers(0, NUM_CLASSES, size).astype(np.int32), "lane": np.arange(size, dtype=np.int32)}
