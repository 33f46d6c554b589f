"""Reflected Brownian motion on a box, coordinate by coordinate (arXiv 2304.04740).

The kernel of noise level sigma that starts at y in [0, 1] has two forms, with tau = sigma^2 / 2:

    images:         p(x | y) = sum_k  N(x; y + 2k, sigma^2) + N(x; -y + 2k, sigma^2)
    eigenfunctions: p(x | y) = 1 + 2 sum_n  exp(-n^2 pi^2 tau) cos(n pi x) cos(n pi y)

The first converges fast for small sigma, the second for large; they agree near tau = 1e-2.
"""

import jax
import jax.numpy as jnp

from ddil_jax.diffusion.process import expand
from ddil_jax.diffusion.transforms import fold
from ddil_jax.types import Array


def reflect(x: Array, lo: float = 0.0, hi: float = 1.0) -> Array:
  """Folds x into [lo, hi] at the walls: the triangle wave of period 2 (hi - lo)."""
  return fold(lo, hi)(x)


def sample_kernel(x0: Array, sigma: Array, noise: Array, lo: float = 0.0, hi: float = 1.0) -> Array:
  """A draw of the reflected kernel, `reflect(x0 + sigma noise)`; x0, noise [B, ...], sigma [B]."""
  return reflect(x0 + expand(sigma, x0) * noise, lo, hi)


def score_images(x: Array, x0: Array, sigma: Array, images: int = 10, density_floor: float = 0.0) -> Array:
  """d/dx log p(x | x0) on [0, 1] by the method of images.

  Args:
    x, x0: [B, ...] in [0, 1].
    sigma: [B].
    images: k runs over -images .. images.
    density_floor: added to the denominator, the sum of exp(-d^2 / (2 sigma^2)) here and the density
      in the series. 0 is exact at any distance (computed relative to the largest term); the authors'
      release has 1e-12, which takes the score to 0 where the sum falls below it.
  """
  sigma = expand(sigma, x)[..., None]
  shifts = 2.0 * jnp.arange(-images, images + 1, dtype=x.dtype)
  shifts = shifts.reshape((1,) * x.ndim + (-1,))
  x, x0 = x[..., None], x0[..., None]
  offsets = jnp.concatenate([x - x0 - shifts, x + x0 - shifts], -1)
  log_terms = -0.5 * (offsets / sigma) ** 2
  slopes = -offsets / sigma**2
  if density_floor:
    terms = jnp.exp(log_terms)
    return jnp.sum(slopes * terms, -1) / (jnp.sum(terms, -1) + density_floor)
  return jnp.sum(slopes * jax.nn.softmax(log_terms, -1), -1)


def score_eigenfunctions(x: Array, x0: Array, sigma: Array, terms: int = 20,
                         density_floor: float = 0.0) -> Array:
  """d/dx log p(x | x0) on [0, 1] by the cosine series; see `score_images` for the arguments."""
  n = jnp.arange(1, terms + 1, dtype=x.dtype).reshape((1,) * x.ndim + (-1,)) * jnp.pi
  tau = 0.5 * expand(sigma, x)[..., None] ** 2
  weights = 2 * jnp.exp(-(n**2) * tau) * jnp.cos(n * x0[..., None])
  density = 1 + jnp.sum(weights * jnp.cos(n * x[..., None]), -1)
  return -jnp.sum(n * weights * jnp.sin(n * x[..., None]), -1) / (density + density_floor)


def score(x: Array, x0: Array, sigma: Array, images: int = 10, terms: int = 20, switch_at: float = 1e-2,
          density_floor: float = 0.0) -> Array:
  """d/dx log p(x | x0) on [0, 1]: the cosine series where sigma^2 / 2 > switch_at, else images."""
  large = expand(0.5 * sigma**2 > switch_at, x)
  # The series is evaluated at a level where it converges also for the rows that do not use it.
  safe = jnp.where(0.5 * sigma**2 > switch_at, sigma, 1)
  return jnp.where(large, score_eigenfunctions(x, x0, safe, terms, density_floor),
                   score_images(x, x0, sigma, images, density_floor))
