"""Small parts that the networks share: embeddings, group normalisation, per-example dropout."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax.types import Array

# What of a block is kept for its gradient: everything, the results of convolutions and matrix products, or only the
# block's inputs. The rest is computed again.
REMAT = {"none": None, "dots": jax.checkpoint_policies.checkpoint_dots,
         "blocks": jax.checkpoint_policies.nothing_saveable}


def rematerialised(block: type[nn.Module], remat: str) -> type[nn.Module]:
  """The class of a block whose gradient keeps what REMAT[remat] says. Its parameters and results are the same."""
  return nn.remat(block, policy=REMAT[remat]) if REMAT[remat] else block


def sinusoidal_embedding(values: Array, dim: int, scale: float = 1.0) -> Array:
  """Sinusoidal embedding, sines first, then cosines.

  `angle_i = scale v exp(-i ln(1e4) / (dim // 2 - 1))`, i = 0 .. dim // 2 - 1.

  Args:
    values: [B].
    dim: width; an odd one is padded with a zero column.

  Returns:
    [B, dim] in the dtype of the values (float32 for integers).

  Source: DDPM (arXiv 2006.11239), released code.
  """
  values = jnp.asarray(values)
  if not jnp.issubdtype(values.dtype, jnp.floating):
    values = values.astype(jnp.float32)
  half = dim // 2
  index = jnp.arange(half, dtype=values.dtype)
  frequencies = jnp.exp(-jnp.log(jnp.asarray(1e4, values.dtype)) / max(half - 1, 1) * index)
  angles = (scale * values)[:, None] * frequencies[None, :]
  out = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
  return jnp.pad(out, ((0, 0), (0, dim - 2 * half)))


def timestep_embedding(values: Array, dim: int, cosine_first: bool = False, shift: float = 1.0) -> Array:
  """Sinusoidal embedding with the two choices in which published networks differ.

  `angle_i = v exp(-i ln(1e4) / (dim // 2 - shift))`, i = 0 .. dim // 2 - 1.

  Args:
    values: [...], floats.
    dim: width, even.
    cosine_first: cosines, then sines.
    shift: 0 or 1: whether the last frequency is just above 1e-4 or equal to it.

  Returns:
    [..., dim] in the dtype of the values. Source: DDPM (arXiv 2006.11239), Score SDE (arXiv 2011.13456).
  """
  half = dim // 2
  # On the host in float64: an angle of 1000 has few digits to lose.
  frequencies = np.exp(-np.log(1e4) / max(half - shift, 1) * np.arange(half))
  angles = values[..., None] * jnp.asarray(frequencies, values.dtype).reshape((1,) * values.ndim + (half,))
  parts = (jnp.cos(angles), jnp.sin(angles)) if cosine_first else (jnp.sin(angles), jnp.cos(angles))
  return jnp.concatenate(parts, axis=-1)


def guidance_embedding(w: Array, dim: int) -> Array:
  """Embedding of LCM's guidance weight w = guidance_scale - 1: the sinusoid of 1000 w.

  Args:
    w: [B].

  Returns:
    [B, dim]. Source: LCM (arXiv 2310.04378), after arXiv 2210.03142.
  """
  return sinusoidal_embedding(w, dim, 1000.0)


def attention(query: Array, key: Array, value: Array) -> Array:
  """`softmax(q k^T / sqrt(D)) v` for each head: query [B,N,heads,D], key and value [B,M,heads,D] -> [B,N,heads,D].

  Softmax in float32, or in float64 if that is the type of the arguments.
  """
  if query.dtype != jnp.float64:
    return jax.nn.dot_product_attention(query, key, value)
  # That one takes the softmax of float64 in float32.
  logits = jnp.einsum("bnhd,bmhd->bhnm", query, key) / np.sqrt(query.shape[-1])
  return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits), value)


def num_groups(channels: int, per_group: int = 4, most: int = 32) -> int:
  """The largest number of groups up to `most` that divides and leaves `per_group` channels in each."""
  groups = max(1, min(most, channels // per_group))
  while channels % groups:
    groups -= 1
  return groups


def dropout(x: Array, rate: float, keys: Array | None) -> Array:
  """Dropout with one key per example, so that the mask does not depend on the batch's layout.

  Args:
    x: [B, ...].
    rate: probability of a zero.
    keys: [B] typed keys; None is the identity.
  """
  if keys is None or rate == 0:
    return x
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class GroupNorm(nn.Module):
  """Group normalisation with an optional per-example scale and shift (FiLM), as one affine map.

  `y = (x - mean_g) / sqrt(var_g + 1e-5) * gain + bias`, then `y (1 + scale) + shift`. Both are
  folded into one multiplication and one addition per pixel, and the statistics come from
  per-channel sums: about 15 % of the demo network's step. Statistics are float32.
  """
  per_group: int = 4
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, scale_shift: Array | None = None) -> Array:
    b, c = x.shape[0], x.shape[-1]
    gain = self.param("scale", nn.initializers.ones_init(), (c,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros_init(), (c,), jnp.float32)
    groups = num_groups(c, self.per_group)
    wide = x.astype(jnp.float32)
    per_group = lambda v: jnp.mean(jnp.mean(v, (1, 2)).reshape(b, groups, -1), -1)  # noqa: E731
    mean = per_group(wide)
    inverse = jax.lax.rsqrt(jnp.maximum(per_group(wide * wide) - mean * mean, 0) + 1e-5)
    mean, inverse = (jnp.repeat(v, c // groups, axis=-1) for v in (mean, inverse))
    factor = inverse * gain[None]
    offset = bias[None] - mean * factor
    if scale_shift is not None:
      scale, shift = jnp.split(scale_shift.astype(jnp.float32), 2, axis=-1)
      factor, offset = factor * (1 + scale), offset * (1 + scale) + shift
    return (wide * factor[:, None, None] + offset[:, None, None]).astype(self.dtype)
