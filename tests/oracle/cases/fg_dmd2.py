"""FastGen's DMD2 and f-distill: student turn, critic and discriminator turn on EDM networks."""

import jax
import jax.numpy as jnp

from ddil_jax.diffusion import grids, prediction, transforms
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.diffusion.process import add_noise, expand
from ddil_jax.objectives.base import bind, stop
from ddil_jax.objectives.dmd2 import carry_gradient, critic_loss, dm_gradient
from ddil_jax.objectives.f_distill import bin_index, bin_means, density_ratio, f_weight
from ddil_jax.objectives.ladd import approximate_r1, discriminator_loss, frozen_logits
from tests.oracle import toy


class Setting:
  """The networks and draws of a file."""

  def __init__(self, case):
    self.case, self.hyper = case, case.hyper
    self.process = processes.edm(time_scale=0.25)
    self.denoiser = make_denoiser(toy.net, self.process, prediction.edm())
    self.levels = jnp.asarray(grids.karras_levels(1000)[::-1], case.dtype)
    self.cond = {"embedding": case["cond"]} if "cond" in case else {}

  def generate(self, params, check=False):
    """The student's image; a student of several steps starts from noised data."""
    case, times = self.case, jnp.asarray(self.hyper["t_list"], self.case.dtype)
    index = case["t_list_index"] if "t_list_index" in case else jnp.zeros(case["x"].shape[:1], int)
    t, clean = times[index], case["x"]
    # From the first time alone a student of one step starts: pure noise.
    clean = clean if self.hyper["student_sample_steps"] > 1 else jnp.zeros_like(clean)
    x_t = add_noise(self.process, clean, case["eps_student"], t)
    if check:
      case.check("input_student", x_t)
      case.check("t_student", t)
    return self.denoiser(params, x_t, t, self.cond)

  def noised(self, x):
    """(x_t, t) of the matching and adversarial terms."""
    t = self.levels[self.case["t_index"]]
    return add_noise(self.process, x, self.case["eps"], t), t

  def logits(self, head, x_t, t):
    return frozen_logits(self.denoiser, self.case.net("teacher"), toy.head, head, x_t, t, self.cond)

  def discriminate(self, head, x):
    """Means of the discriminator's loss and of its penalty (None without one)."""
    case, hyper = self.case, self.hyper
    x_t, t = self.noised(x)
    real_t = t if hyper["gan_use_same_t_noise"] else self.levels[case["t_index_real"]]
    noise = case["eps"] if hyper["gan_use_same_t_noise"] else case["eps_real"]
    real = self.logits(head, add_noise(self.process, case["x"], noise, real_t), real_t)
    loss = discriminator_loss(self.logits(head, x_t, t), real).mean()
    if not hyper["gan_r1_reg_weight"]:
      return loss, None
    disturbed = case["x"] + hyper["gan_r1_reg_alpha"] * case["r1_noise"]
    return loss, approximate_r1(real, self.logits(head, disturbed, real_t)).mean()

  def check_discriminator(self, x, more=0.0):
    """The head's loss and gradient; `more` is what else the total counts."""
    case, name = self.case, "critic_loss_terms"

    def total(head):
      loss, r1 = self.discriminate(head, x)
      return loss + (0 if r1 is None else self.hyper["gan_r1_reg_weight"] * r1), (loss, r1)

    (value, (loss, r1)), grads = jax.value_and_grad(total, has_aux=True)(case.net("disc"))
    case.check(f"{name}/total_loss", more + value)
    case.check(f"{name}/gan_loss_disc", loss)
    if r1 is not None:
      case.check(f"{name}/gan_loss_ar1", r1)
    case.check_grads("disc_grad", grads)


def student_turn(case, setting):
  """The student's total loss and gradient; the weights of f-distill where the file has them."""
  hyper, with_gan = case.hyper, case.hyper["gan_loss_weight_gen"] > 0
  scale = hyper["guidance_scale"] or 1
  guidance = transforms.guidance(scale, lambda cond: {"embedding": case["neg_cond"]})
  teacher = guidance(bind(setting.denoiser, case.net("teacher")))
  fake = bind(setting.denoiser, case.net("fake_score"))

  def weights(logits, t):
    """(h, bins) of f-distill; bins None where they are off."""
    if "f_div" not in hyper:
      return jnp.ones_like(t), None
    mean, ratio, bins = (lambda v: v.mean(0)), density_ratio(logits, hyper["ratio_lower"], hyper["ratio_upper"]), None
    if hyper["ratio_normalization"]:
      index = bin_index(t, 0.002, 80.0, hyper["bin_num"])
      bins = bin_means(ratio, index, case["ratio_bins"], hyper["ratio_ema_rate"], mean, 1e-6 / len(t))
      ratio = ratio / (bins[index] + 1e-6)
    return f_weight(hyper["f_div"], ratio, mean), bins

  def total(params):
    x = setting.generate(params)
    x_t, t = setting.noised(x)
    d_real, d_fake = (stop(denoise(x_t, t, setting.cond)) for denoise in (teacher, fake))
    logits = setting.logits(case.net("disc"), x_t, t) if with_gan else jnp.zeros_like(t)
    h, bins = weights(logits, t)
    gradient = expand(h, x) * dm_gradient(stop(x), d_real, d_fake, offset=1e-6)
    vsd = carry_gradient(x, gradient)
    gan = jax.nn.softplus(-logits).mean() if with_gan else jnp.zeros((), case.dtype)
    found = {"gen_data": x, "perturbed": x_t, "t": t, "teacher_x0": d_real, "fake_x0": d_fake, "vsd_grad": gradient,
             "vsd_loss": vsd.mean(), "vsd_loss_per_example": vsd, "gan_loss_gen": gan,
             "vsd_weight": h / (jnp.abs(x - d_real).mean((1, 2, 3)) + 1e-6)}
    if "f_div" in hyper:
      found |= {"h": h, "fake_logits": logits.reshape(-1, 1)}
    if bins is not None:
      found["ratio_bins_after"] = bins
    return vsd.mean() + hyper["gan_loss_weight_gen"] * gan, found

  setting.generate(case.net("student"), check=True)
  (loss, found), grads = jax.value_and_grad(total, has_aux=True)(case.net("student"))
  case.check("student_loss", loss)
  for name, value in found.items():
    case.check(name, value)
  case.check_grads("student_grad", grads)
  return found["gen_data"]


def fdistill(case):
  student_turn(case, Setting(case))


def dmd2(case):
  setting, hyper = Setting(case), case.hyper
  x = stop(student_turn(case, setting))
  head = prediction.make(hyper["fake_score_pred_type"])
  t = setting.noised(x)[1]

  def weight(process, t):
    """What an error of x0 = 1 is in the predicted quantity, squared."""
    zero, sigma = jnp.zeros_like(t), process.sigma(t)
    off = lambda x0: head.from_x0(x0, -x0 / sigma, 1.0, sigma)  # noqa: E731
    return (off(zero + 1) - off(zero)) ** 2

  def score(params):
    loss, found = critic_loss(setting.process, bind(setting.denoiser, params), x, t, case["eps"], setting.cond, weight)
    return loss.mean(), found

  (loss, found), grads = jax.value_and_grad(score, has_aux=True)(case.net("fake_score"))
  sigma = expand(setting.process.sigma(t), x)
  case.check("fake_score_pred", prediction.convert(found["x0"], found["x_t"], 1.0, sigma, prediction.x0(), head))
  case.check("critic_loss_terms/fake_score_loss", loss)
  case.check_grads("fake_score_grad", grads)
  if hyper["gan_loss_weight_gen"]:
    setting.check_discriminator(x, more=loss)
  else:
    case.check("critic_loss_terms/total_loss", loss)
    if "critic_loss_terms/gan_loss_disc" in case.outs:
      case.leave("critic_loss_terms/gan_loss_disc", "0: there is no discriminator")


RUNNERS = {r"fg_dmd2_.*": dmd2, r"fg_fdistill_.*": fdistill}
