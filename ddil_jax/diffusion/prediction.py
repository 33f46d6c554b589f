"""What a network predicts, to and from x0: eps, x0, v, flow, EDM preconditioning, the `both` head.

    eps:  x0 = (x_t - sigma eps) / alpha
    v:    v = alpha eps - sigma x0,   x0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2)
    flow: u = eps - x0,               x0 = (x_t - sigma u) / (alpha + sigma)
    edm:  x0 = c_skip x' + c_out F(c_in x')       with x' = x_t / alpha at noise level sigma / alpha
    both: x0 = w x_head + (1 - w) (x_t - sigma eps_head) / alpha,   w = sigma^2 / (alpha^2 + sigma^2)

All formulas hold for every process; for variance-preserving ones the denominators are 1.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from ddil_jax.diffusion.process import Process, expand
from ddil_jax.errors import UsageError
from ddil_jax.types import Array, Denoiser, NetFn


def _no_scaling(x_t, alpha, sigma):
  del alpha, sigma
  return x_t


@dataclasses.dataclass(frozen=True)
class Prediction:
  """A parameterisation; alpha and sigma come broadcastable to x_t.

  Attributes:
    name: name in configs.
    to_x0: (out, x_t, alpha, sigma) -> x0.
    from_x0: (x0, eps, alpha, sigma) -> the output that means x0 (the regression target).
    scale_input: (x_t, alpha, sigma) -> the network's input.
    channels: output channels per image channel.
  """
  name: str
  to_x0: Callable
  from_x0: Callable
  scale_input: Callable = _no_scaling
  channels: int = 1


def eps() -> Prediction:
  """Noise prediction (arXiv 2006.11239)."""
  return Prediction("eps", lambda out, x, a, s: (x - s * out) / a, lambda x0, e, a, s: e)


def x0() -> Prediction:
  """Clean-image prediction."""
  return Prediction("x0", lambda out, x, a, s: out, lambda x0, e, a, s: x0)


def v() -> Prediction:
  """Velocity prediction (arXiv 2202.00512, appendix D)."""
  return Prediction("v", lambda out, x, a, s: (a * x - s * out) / (a**2 + s**2),
                    lambda x0, e, a, s: a * e - s * x0)


def flow() -> Prediction:
  """Rectified-flow velocity, eps - x0 (arXiv 2209.03003)."""
  return Prediction("flow", lambda out, x, a, s: (x - s * out) / (a + s), lambda x0, e, a, s: e - x0)


def both() -> Prediction:
  """Two heads, x0 and eps, on 2C channels, mixed by the noise share (arXiv 2202.00512, section 4)."""
  def to_x0(out, x, a, s):
    x_head, eps_head = jnp.split(out, 2, axis=-1)
    w = s**2 / (a**2 + s**2)
    return w * x_head + (1 - w) * (x - s * eps_head) / a
  return Prediction("both", to_x0, lambda x0, e, a, s: jnp.concatenate([x0, e], -1), channels=2)


def edm(sigma_data: float = 0.5, boundary_sigma_min: float | None = None) -> Prediction:
  """EDM preconditioning (arXiv 2206.00364, table 1), or the consistency-model form of it.

  Args:
    sigma_data: standard deviation of the data.
    boundary_sigma_min: if given, the boundary scalings of arXiv 2303.01469, with
      f(x, sigma_min) = x.
  """
  if boundary_sigma_min is None:
    scalings = lambda s: edm_scalings(s, sigma_data)  # noqa: E731
  else:
    scalings = lambda s: cm_scalings(s, sigma_data, boundary_sigma_min)  # noqa: E731

  def to_x0(out, x, a, s):
    c_skip, c_out, _ = scalings(s / a)
    return c_skip * (x / a) + c_out * out

  def from_x0(x0, e, a, s):
    c_skip, c_out, _ = scalings(s / a)
    return (x0 - c_skip * (x0 + s / a * e)) / c_out

  return Prediction("edm", to_x0, from_x0, lambda x, a, s: scalings(s / a)[2] * (x / a))


def convert(out: Array, x_t: Array, alpha: Array, sigma: Array, source: Prediction,
            target: Prediction) -> Array:
  """The output of one parameterisation as that of another: the same x0 at the same x_t.

  Noise that a network predicts itself is passed on; recomputed from x0 it would lose digits at
  small sigma.
  """
  if source.name == target.name:
    return out
  estimate = source.to_x0(out, x_t, alpha, sigma)
  noise = out if source.name == "eps" else (x_t - alpha * estimate) / sigma
  return target.from_x0(estimate, noise, alpha, sigma)


def edm_scalings(sigma: Array, sigma_data: float = 0.5) -> tuple[Array, Array, Array]:
  """(c_skip, c_out, c_in) of EDM at noise level sigma (arXiv 2206.00364, table 1)."""
  total = sigma**2 + sigma_data**2
  return sigma_data**2 / total, sigma * sigma_data / jnp.sqrt(total), 1 / jnp.sqrt(total)


def cm_scalings(sigma: Array, sigma_data: float = 0.5,
                sigma_min: float = 0.002) -> tuple[Array, Array, Array]:
  """(c_skip, c_out, c_in) with f(x, sigma_min) = x (arXiv 2303.01469, appendix C)."""
  total = sigma**2 + sigma_data**2
  shifted = sigma - sigma_min
  return (sigma_data**2 / (shifted**2 + sigma_data**2), shifted * sigma_data / jnp.sqrt(total),
          1 / jnp.sqrt(total))


def lcm_scalings(t: Array, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> tuple[Array, Array]:
  """(c_skip, c_out) of latent consistency models: `f = c_skip x_t + c_out x0`, f(x, 0) = x.

  c_out carries no sigma_data factor, unlike the consistency models'. Source: arXiv 2310.04378.

  Args:
    t: time in discrete steps (0..999) [B].
  """
  scaled = timestep_scaling * t
  total = scaled**2 + sigma_data**2
  return sigma_data**2 / total, scaled / jnp.sqrt(total)


PREDICTIONS = {"eps": eps, "x0": x0, "v": v, "flow": flow, "edm": edm, "both": both}


def make(name: str, **options) -> Prediction:
  """A prediction by name. Raises UsageError with the names that exist."""
  if name not in PREDICTIONS:
    raise UsageError(f"unknown prediction '{name}'; there are: {', '.join(sorted(PREDICTIONS))}")
  return PREDICTIONS[name](**options)


def make_denoiser(net: NetFn, process: Process, prediction: Prediction,
                  time_input: Callable[[Array], Array] | None = None) -> Denoiser:
  """Turns a network into an x0 estimator.

  Args:
    net: (params, x [B,H,W,C], time input [B], cond, keys, features) -> out.
    time_input: t [B] -> the network's time input; default `process.time_input`. It maps
      cond["end_time"] too; cond["time_sign"] multiplies both and does not reach the network.

  Returns:
    (params, x_t, t, cond, keys=None, features=(), reuse=None) -> x0, or (x0, features) when names are asked for.
    With `reuse`, {name: value}, a network that can takes features instead of computing them. What any network gives
    itself is the feature "output": the estimate at another x_t follows from it without the network.
    x0 has the dtype of x_t whatever the network computes in.
  """
  time_input = time_input or process.time_input

  def denoiser(params, x_t, t, cond, keys=None, features=(), reuse=None):
    alpha, sigma = expand(process.alpha(t), x_t), expand(process.sigma(t), x_t)
    sign = cond.get("time_sign", 1)
    told = {name: value for name, value in cond.items() if name != "time_sign"}
    if "end_time" in cond:
      told["end_time"] = sign * time_input(cond["end_time"])
    asked = tuple(name for name in features if name != "output")
    if reuse is not None and "output" in reuse:
      out = reuse["output"]
    else:
      out = net(params, prediction.scale_input(x_t, alpha, sigma), sign * time_input(t), told, keys, asked,
                *(() if reuse is None else (reuse,)))
    out, named = out if asked else (out, {})
    named = {name: out if name == "output" else named[name] for name in features}
    estimate = prediction.to_x0(out.astype(x_t.dtype), x_t, alpha, sigma)
    return (estimate, named) if features else estimate

  return denoiser
