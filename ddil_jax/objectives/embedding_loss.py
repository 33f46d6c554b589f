"""Embedding loss: any method, and the student's images compared with real ones by what networks at random make of them.

    psi ~ networks with new random weights at every step, the same for the whole batch
    d_i = psi(x_i) - psi(real_i)                          x_i the student's image, real_i one of the batch
    MMD^2 = 1 / (B (B - 1)) sum_{i != j} <d_i, d_j>        unbiased: 0 on average where the distributions agree
    L_i = L_base + embedding_weight (2 <d_i, sg mean_{j != i} d_j> - sg <d_i, mean_{j != i} d_j>)

The mean over the batch of the last bracket is MMD^2 and so is its gradient, over all devices. <a, b> is the mean over
the entries of each layer's map. Over the draws of psi it is the squared maximum mean discrepancy of the kernel
E <psi(x), psi(y)>.

x is where the student's own sampler leads from the training state (`base.py::student_image`): "walk" takes all its
steps, "jump" one. That needs the state only: defined where the base method is. Real images are those of the batch,
never those of rollout states.

Source: arXiv 2604.22379, from its abstract: an MMD in the features of diverse randomly initialised networks, beside
distribution matching or consistency training. Verified: estimate and gradient against the double sum, the mean over
draws in closed form, weight 0 is the base method. Ours: the linear kernel, the networks (one architecture, the small
classifier's), the weight, no augmentation, the walk.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (IMAGES, FeatureNet, Objective, Parts, make_objective, of_others, stop,
                                      student_image)
from ddil_jax.registry import unknown
from ddil_jax.types import Array


def mmd_loss(fake: Array, real: Array, others=lambda v: of_others(v, v.mean(axis=0), len(v))) -> Array:
  """A loss per example [B] whose mean and gradient by `fake` are those of the unbiased MMD^2.

  Args:
    fake, real: embeddings [B, D].
    others: values [B, D] -> the mean of all but one's own [B, D], `View.others`.
  """
  gap = fake - real
  rest = stop(others(stop(gap)))
  product = jnp.sum(gap * rest, axis=1)
  return 2 * product - stop(product)


def embed(net: FeatureNet, params, images: Array, layers: tuple[str, ...]) -> Array:
  """[B, D] of images by several networks, params with a leading axis [N, ...].

  The product of two embeddings is the mean over entries of a layer's map, over layers and over networks.
  """
  named = jax.vmap(lambda own: net.layers(own, images, layers))(params)  # {layer: [N,B,h,w,c]}
  flat = [v.swapaxes(0, 1).reshape(len(images), -1) for v in named.values()]
  return jnp.concatenate([v / v.shape[1] ** 0.5 for v in flat], axis=1) / len(flat) ** 0.5


def make(parts: Parts, base: str = "dmd2", embedding_weight: float = 1.0, images: str = "walk", networks: int = 2,
         embedding_net: str = "", embedding_layers: tuple[str, ...] = ("conv_0", "conv_1", "features"),
         **options: Any) -> Objective:
  """`base` and the embedding loss of its student.

  Args:
    base: a method; the other options are its own.
    embedding_weight: 0 is the base method.
    images: an entry of IMAGES.
    networks: drawn at every step.
    embedding_net: whose architecture they have, as `feature_net` of `add`; embedding_layers: of it, which are compared.

  Raises:
    UsageError: an unknown base, option or layer, numbers out of range.
  """
  if images not in IMAGES:
    raise UsageError(unknown("embedding_loss: images", images, IMAGES))
  if embedding_weight < 0 or networks < 1 or not embedding_layers:
    raise UsageError(f"embedding_loss: embedding_weight {embedding_weight:g} must be at least 0, networks {networks} at"
                     f" least 1, embedding_layers {embedding_layers} name at least one")
  objective = make_objective(base, parts, options)
  if objective.teacher is None:
    raise UsageError(f"embedding_loss: base '{base}' trains no student; name a method of distillation")
  net = parts.feature_net(embedding_net)
  # An unknown layer is said now, not when training begins.
  jax.eval_shape(lambda: net.layers(net.init(jax.random.key(0)), jnp.zeros((1,) + parts.image_shape), embedding_layers))
  student, *rest = objective.players

  def loss(params, view, states, batch, keys):
    value, metrics = student.loss(params, view, states, batch, keys)
    drawn = jax.vmap(net.init)(jax.random.split(keys_lib.named(view.key, "networks"), networks))
    fake = student_image(parts, objective, params, view, states, keys, images)
    embedding = mmd_loss(embed(net, drawn, fake, embedding_layers),
                         embed(net, drawn, batch["image"], embedding_layers), view.others)
    return value + embedding_weight * embedding, metrics | {"embedding": embedding}

  players = (student._replace(loss=loss), *rest) if embedding_weight else objective.players
  return objective._replace(name="embedding_loss", players=players)
