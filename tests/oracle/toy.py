"""The network of the golden vectors, a perceptron on single pixels:

    h = tanh(x W1 + b1 + (phi_0 t + phi_1) c1 + e E + g Wg),   net = h W2 + b2
"""

import jax
import jax.numpy as jnp

from ddil_jax.models.layers import guidance_embedding


def _tanh(x):
  """tanh by expm1: in float32 the compiler's own is wrong by four roundings, the originals' by one."""
  m = jnp.expm1(-2 * jnp.abs(x))
  return jnp.where(x < 0, m, -m) / (2 + m)


def net(params, x, t, cond, keys=None, features=()):
  """A NetFn; `cond["embedding"]` [B,K], or [B,L,K] of which the mean over L is taken.

  The slot g is `cond["slot"]` [B,K], such as a second time, or the embedding of the guidance scale. Without
  one of them, or in a network without such a slot, it is 0.
  """
  del keys
  phi = jax.lax.stop_gradient(params["phi"])
  per_sample = (phi[0] * t + phi[1]).reshape(-1, 1) * params["c1"].reshape(1, -1)
  if "E" in params:
    embedding = cond["embedding"]
    embedding = embedding.mean(axis=1) if embedding.ndim == 3 else embedding
    per_sample = per_sample + embedding @ params["E"]
  slot = cond.get("slot")
  if "Wg" in params and slot is None and "guidance_scale" in cond:
    slot = guidance_embedding(cond["guidance_scale"] - 1, params["Wg"].shape[0])
  if "Wg" in params and slot is not None:
    per_sample = per_sample + slot @ params["Wg"]
  add = lambda a, b: a + b.reshape((1,) * (a.ndim - 1) + (-1,))  # noqa: E731
  hidden = add(jnp.einsum("bhwc,cd->bhwd", x, params["W1"]), params["b1"])
  hidden = _tanh(hidden + per_sample.reshape(per_sample.shape[0], 1, 1, -1))
  out = add(jnp.einsum("bhwd,dc->bhwc", hidden, params["W2"]), params["b2"])
  return (out, {"bottleneck": hidden}) if features else out


def guided(guidance):
  """The network under a guidance transform of its raw output, as a NetFn.

  Every parameterisation is affine in the output, so this is guidance of x0. The originals guide the
  output; in float32 it loses less, because an x0 of size 100 is not rounded before the difference
  of two is scaled up.
  """
  def guided_net(params, x, t, cond, keys=None, features=()):
    del keys, features
    return guidance(lambda x, t, cond: net(params, x, t, cond))(x, t, cond)
  return guided_net


def head(params, feature):
  """Logits [B] of the discriminator: a linear map of the mean over pixels."""
  return (feature.mean(axis=(1, 2)) @ params["Wh"]).reshape(-1) + params["bh"]
