"""GDD: generator, discriminator and penalty turns, with the distillation terms of the same repository."""

import jax
import jax.numpy as jnp

from ddil_jax.diffusion import distance, prediction, solvers
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.diffusion.process import add_noise, expand
from ddil_jax.objectives.base import stop
from ddil_jax.objectives.gdd import adversarial_loss, fake_loss, r1_penalty, real_loss
from ddil_jax.objectives.pd import invert_ddim
from tests.oracle import toy

MAPS = ("disc0", "disc1")


class Setting:
  """The networks of a file; a second noise level goes into the network's slot."""

  def __init__(self, case):
    self.case, self.hyper = case, case.hyper
    label = case["label"] if "label" in case else None
    if label is not None and label.ndim == 1:
      label = jax.nn.one_hot(label, case.net("generator")["E"].shape[0], dtype=case.dtype)
    self.cond = {} if label is None else {"embedding": label}
    self.process = processes.edm(self.hyper["sigma_min"], self.hyper["sigma_max"], time_scale=0.25)
    self.denoiser = make_denoiser(toy.net, self.process, prediction.edm())

  def sigma(self, ratio):
    """The noise level at a share of the Karras range, 0 the smallest."""
    power = 1 / self.hyper["rho"]
    top, bottom = self.hyper["sigma_max"] ** power, self.hyper["sigma_min"] ** power
    return (top + (1 - jnp.asarray(ratio, self.case.dtype)) * (bottom - top)) ** self.hyper["rho"]

  def told(self, params, end):
    """The generator as a DenoiseFn that is told where its step ends; end None tells nothing."""
    cond = self.cond if end is None else {**self.cond, "slot": jnp.log(end).reshape(-1, 1) / 4}
    return lambda x, t, _: self.denoiser(params, x, t, cond)

  def euler(self, params, x, t, s):
    policy = solvers.ddim()(self.process, self.told(params, s))
    return policy.step((), x, t, s, {}, None)[0]

  def generate(self, params, z):
    """One step from the largest level, or DDIM over several; the last gives the estimate itself."""
    steps, full = self.hyper["multi_step_g"], lambda v: jnp.full(z.shape[:1], v, self.case.dtype)
    top = self.hyper["sigma_max"]
    if steps == 1:
      return self.told(params, None)(top * z, full(top), {})
    levels = [top, self.hyper["middle_sigma"], self.hyper["sigma_min"]] if steps == 2 else [
        self.sigma(i / steps) for i in range(steps, -1, -1)]
    x = top * z
    for t, s in zip(levels[:-2], levels[1:-1]):
      x = self.euler(params, x, full(t), full(s))
    return self.told(params, full(levels[-1]))(x, full(levels[-2]), {})

  def logits(self, discs, x):
    t = jnp.zeros(x.shape[:1], x.dtype)
    return [toy.net(params, x, t, self.cond) for params in discs]

  def indices(self):
    """Grid positions (t, u, s) of the distillation term."""
    kind, n = self.hyper["teacher_type"], self.hyper["max_steps"]
    size, dtype = len(self.case["x"]), self.case.dtype
    drawn = self.case["index_draw"].astype(dtype) if "index_draw" in self.case else None
    uniforms = iter(self.case["index_uniform"].reshape(-1, size)) if "index_uniform" in self.case else None

    def between(low, high):
      return jnp.round(next(uniforms) * (high - low + 0.9998) + low - 0.4999)

    if kind == "pd":
      count = 2**drawn
      t = between(jnp.ones_like(count), count)
      return t * n / count, (t - 0.5) * n / count, (t - 1) * n / count
    if kind == "cd":
      return drawn, drawn - 1, jnp.zeros_like(drawn)
    if kind == "ctm":
      u = between(jnp.ones_like(drawn), drawn - 1)
      return drawn, u, between(jnp.zeros_like(drawn), u - 1)
    t = jnp.full((size,), n, dtype)  # rcd
    s = between(jnp.zeros_like(t), t - 2)
    return t, s + 1, s

  def distil(self, params, check):
    """(prediction, target): from v at t by u to s, by the teacher where they are neighbours."""
    case, kind, n = self.case, self.hyper["teacher_type"], self.hyper["max_steps"]
    index = dict(zip("tus", self.indices()))
    level = {name: self.sigma(value / n) for name, value in index.items()}
    v = add_noise(self.process, case["x"], case["z"], level["t"])
    teacher = lambda x, t, _: self.denoiser(case.net("teacher"), x, t, self.cond)  # noqa: E731

    def step(x, t, s, neighbours):
      heun = solvers.heun()(self.process, teacher).step((), x, t, s, {}, None)[0]
      return stop(jnp.where(expand(neighbours, x), heun, self.euler(params, x, t, s)))

    v1 = step(v, level["t"], level["u"], index["t"] - index["u"] == 1)
    v2 = step(v1, level["u"], level["s"], index["u"] - index["s"] == 1)
    if kind == "ctm":
      target = step(v2, level["s"], jnp.full_like(level["s"], self.hyper["sigma_min"]), index["s"] == 1)
    else:
      target = v2 if kind == "cd" else stop(invert_ddim(self.process, v, v2, level["t"], level["s"]))
    pred = self.told(params, level["s"])(v, level["t"], {})
    if check:
      found = {"v": v, "v1": v1, "v2": v2, "dist_pred": pred, "dist_target": target}
      for name in "tus":
        found |= {f"{name}_idx": index[name], f"{name}_ratio": index[name] / n, f"sigma_{name}": level[name]}
      for name, value in found.items():
        case.check(name, value)
    return pred, target


def gdd(case):
  setting, hyper = Setting(case), case.hyper
  kind, gamma = hyper["loss_type"], hyper["r1_gamma"]
  discs = [case.net(name) for name in MAPS]
  mean = lambda term, logits: sum(term(v, kind).mean() for v in logits)  # noqa: E731
  adversarial, distils = not hyper["teacher_only"], hyper["teacher_type"] != "none"
  case.check("cut_sigma_0_to_1_by_quarter", setting.sigma(jnp.arange(5) / 4))

  def generator(params):
    zero = jnp.zeros((), case.dtype)
    x = setting.generate(params, case["z"]) if adversarial else None
    logits = setting.logits(discs, x) if adversarial else []
    loss = mean(adversarial_loss, logits) if adversarial else zero
    error = distance.l2()(*setting.distil(params, False)).mean() if distils else zero
    return loss + error, (loss, error, x, logits)

  (_, (loss, error, x, logits)), grads = jax.value_and_grad(generator, has_aux=True)(case.net("generator"))
  if distils:
    setting.distil(case.net("generator"), True)
  case.check("g_loss", loss)
  case.check("dist_loss", error)
  case.check_grads("generator_grad", grads)
  if not adversarial:
    return
  case.check("x_gen", x)
  for i, value in enumerate(logits):
    case.check(f"g_logits{i}", value)

  x = setting.generate(case.net("generator"), case["d_z"])

  def discriminator(discs):
    fake = mean(fake_loss, setting.logits(discs, x))
    real = mean(real_loss, setting.logits(discs, case["x"]))
    return fake + real, (fake, real)

  (_, (fake, real)), grads = jax.value_and_grad(discriminator, has_aux=True)(discs)
  case.check("d_gen_loss", fake)
  case.check("d_real_loss", real)
  for i, grad in enumerate(grads):
    case.check_grads(f"d_grad{i}", grad)

  def penalty(discs):
    values = r1_penalty(lambda image: sum(v.sum() for v in setting.logits(discs, image)), case["x"])
    return (0.5 * gamma * values).mean(), values

  (_, values), grads = jax.value_and_grad(penalty, has_aux=True)(discs)
  case.check("r1_penalty", values)
  case.check("r1_loss", 0.5 * gamma * values)
  for i, grad in enumerate(grads):
    case.check_grads(f"r1_grad{i}", grad)


RUNNERS = {r"gdd_.*": gdd}
