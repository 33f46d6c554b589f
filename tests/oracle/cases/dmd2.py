"""DMD2: matching gradient, critic, discriminator, and whole turns of generator and critic."""


import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax.diffusion import grids, prediction, solvers, transforms, weighting
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.diffusion.process import add_noise, expand
from ddil_jax.objectives.base import bind
from ddil_jax.objectives.dmd2 import carry_gradient, critic_loss, dm_gradient, dm_loss, gan_logits
from tests.oracle import toy
from tests.oracle.walk import walk


def normalisation(case):
  x = case["latents"]
  gradient = dm_gradient(x, case["pred_real_image"], case["pred_fake_image"])
  loss = lambda x: jnp.mean(carry_gradient(x, gradient))  # noqa: E731
  case.check("dm_grad", gradient)
  case.check("loss", loss(x))
  case.check("grad_latents", jax.grad(loss)(x))


class Setting:
  """The networks of a file; `times` turns stored indices into times of the process."""

  def __init__(self, case, process, head, times, weight, guidance=transforms.chain()):
    self.case, self.process, self.times, self.weight = case, process, times, weight
    self.denoiser = make_denoiser(toy.net, process, head)
    self.teacher = bind(make_denoiser(toy.guided(guidance), process, head), case.net("teacher"))
    self.critic = {"net": case.net("fake"), "head": case.net("head")}

  def draw(self, kind, which=""):
    """(t, noise) of a term; (None, None) where none is stored."""
    for stem in ("timesteps", "index"):
      if f"{kind}_{stem}{which}" in self.case:
        return self.times(self.case[f"{kind}_{stem}{which}"]), self.case[f"{kind}_noise{which}"]
    return None, None

  def matching(self, x, cond):
    """Mean matching loss and its intermediates."""
    fake = bind(self.denoiser, self.critic["net"])
    loss, steps = dm_loss(self.process, self.teacher, fake, x, *self.draw("dm"), cond)
    return jnp.mean(loss), steps

  def score(self, net, x, cond):
    """Mean critic loss and its intermediates."""
    fake = bind(self.denoiser, net)
    loss, steps = critic_loss(self.process, fake, x, *self.draw("fake"), cond, self.weight)
    return jnp.mean(loss), steps

  def logits(self, critic, x, cond, which):
    t, noise = self.draw("gan", which)
    if t is None:  # without a diffused discriminator the image is clean, at the smallest time
      t = jnp.broadcast_to(self.times(jnp.zeros((), int)), x.shape[:1])
    return gan_logits(self.process, self.denoiser, toy.head, critic, x, t, noise, cond)

  def fool(self, x, cond, which):
    """The generator's adversarial loss."""
    return jnp.mean(jax.nn.softplus(-self.logits(self.critic, x, cond, which)))

  def discriminate(self, critic, x, cond, real_cond):
    """The discriminator's loss, and logits of real and generated images."""
    fake = self.logits(critic, x, cond, "_fake")
    real = self.logits(critic, self.case["real_image"], real_cond, "_real")
    return jnp.mean(jax.nn.softplus(fake)) + jnp.mean(jax.nn.softplus(-real)), (real, fake)

  def critic_turn(self, x, cond, real_cond, gan_weight):
    """Loss, its two parts, and the gradient by the critic and its head."""
    def total(critic):
      score, _ = self.score(critic["net"], x, cond)
      gan, _ = self.discriminate(critic, x, cond, real_cond)
      return score + gan_weight * gan, (score, gan)
    (loss, (score, gan)), grads = jax.value_and_grad(total, has_aux=True)(self.critic)
    return loss, score, gan, grads

  def check_parts(self, cond, real_cond):
    """The terms one by one, on stored images."""
    case, x = self.case, self.case["latents"]
    (loss, steps), grad = jax.value_and_grad(lambda x: self.matching(x, cond), has_aux=True)(x)
    case.check("dm/loss", loss)
    case.check("dm/grad_latents", grad)
    case.check("dm/dm_grad", steps["gradient"])
    case.check("dm/gradient_norm", jnp.linalg.norm(steps["gradient"].ravel()))
    case.check("dm/pred_real_image", steps["d_real"])
    case.check("dm/pred_fake_image", steps["d_fake"])
    case.check("dm/noisy_latents", steps["x_t"])

    (loss, steps), grads = jax.value_and_grad(
        lambda net: self.score(net, x, cond), has_aux=True)(self.critic["net"])
    case.check("fake/loss", loss)
    case.check("fake/x0_pred", steps["x0"])
    case.check("fake/noisy_latents", steps["x_t"])
    case.check_grads("fake/grad", grads)

    # The generator's own adversarial draw has a name of its own where whole turns are stored, and
    # the single term reuses the discriminator's.
    loss, grad = jax.value_and_grad(lambda x: self.fool(x, cond, "_fake"))(x)
    case.check("gan_g/loss", loss)
    case.check("gan_g/grad_latents", grad)
    (loss, (real, fake)), grads = jax.value_and_grad(
        lambda critic: self.discriminate(critic, x, cond, real_cond), has_aux=True)(self.critic)
    case.check("gan_d/loss", loss)
    case.check("gan_d/prob_real", jax.nn.sigmoid(real))
    case.check("gan_d/prob_fake", jax.nn.sigmoid(fake))
    case.check_grads("gan_d/grad_fake", grads["net"])
    case.check_grads("gan_d/grad_head", grads["head"])


def discrete(case, null):
  """Noise prediction on a table with guidance; the original skips guidance at scales up to 1."""
  process = processes.discrete(case.table("alphas_cumprod"))
  guidance = transforms.guidance(max(case.hyper["real_guidance_scale"], 1), null)
  as_time = lambda i: i.astype(case.dtype)  # noqa: E731
  return Setting(case, process, prediction.eps(), as_time, weighting.snr_weight(), guidance)


def sd_parts(case):
  setting = discrete(case, lambda cond: {"embedding": case["uncond_embedding"]})
  setting.check_parts({"embedding": case["text_embedding"]}, {"embedding": case["real_text_embedding"]})


def edm(case):
  hyper = case.hyper
  process = processes.edm(hyper["sigma_min"], hyper["sigma_max"], time_scale=0.25)
  table = grids.karras_levels(hyper["num_train_timesteps"], hyper["sigma_min"], hyper["sigma_max"],
                              hyper["rho"])[::-1]
  case.check("karras_sigmas", table)
  levels = jnp.asarray(table, case.dtype)
  setting = Setting(case, process, prediction.edm(hyper["sigma_data"]), lambda i: levels[i],
                    weighting.edm(hyper["sigma_data"]))
  cond, real_cond = {"embedding": case["labels"]}, {"embedding": case["real_labels"]}
  setting.check_parts(cond, real_cond)

  start = hyper["conditioning_sigma"] * case["gen_noise"]
  level = case.full(hyper["conditioning_sigma"], start)

  def generator(params):
    x = setting.denoiser(params, start, level, cond)
    matching, steps = setting.matching(x, cond)
    gan = setting.fool(x, cond, "_fake_g")
    return matching + hyper["gen_cls_loss_weight"] * gan, (x, matching, gan, steps["gradient"])

  (total, (x, matching, gan, gradient)), grads = jax.value_and_grad(
      generator, has_aux=True)(case.net("student"))
  values = {"generated_image": x, "loss_dm": matching, "gen_cls_loss": gan, "total": total,
            "dm_grad": gradient}
  for name, value in values.items():
    case.check(f"generator_turn/{name}", value)
  case.check_grads("generator_turn/grad", grads)

  total, score, gan, grads = setting.critic_turn(x, cond, real_cond, hyper["cls_loss_weight"])
  case.check("guidance_turn/total", total)
  case.check("guidance_turn/loss_fake_mean", score)
  case.check("guidance_turn/guidance_cls_loss", gan)
  case.check_grads("guidance_turn/grad_fake", grads["net"])
  case.check_grads("guidance_turn/grad_head", grads["head"])


def sdxl_step(case):
  """Backward simulation to the selected step, then a turn of the generator and one of the critic."""
  hyper = case.hyper
  setting = discrete(case, lambda cond: {"embedding": jnp.zeros_like(cond["embedding"])})
  process, params = setting.process, case.net("student")
  cond, real_cond = {"embedding": case["text_embedding"]}, {"embedding": case["real_text_embedding"]}
  times = grids.dmd2_timesteps(hyper["num_denoising_step"], hyper["denoising_timestep"])
  assert list(times) == hyper["denoising_step_list"]
  student = bind(setting.denoiser, params)

  def input_at(clean, t):
    """Noised with fresh noise; pure noise at the table's last step."""
    noised = add_noise(process, clean, case["noise"], t)
    return jnp.where(expand(t == process.t_max, clean), case["noise"], noised)

  def turn(mode, x_t, t):
    def generator(params):
      x = setting.denoiser(params, x_t, t, cond)
      matching, steps = setting.matching(x, cond)
      gan = setting.fool(x, cond, "_fake_g")
      total = hyper["dm_loss_weight"] * matching + hyper["gen_cls_loss_weight"] * gan
      return total, (x, matching, gan, steps["gradient"])

    (total, (x, matching, gan, gradient)), grads = jax.value_and_grad(generator, has_aux=True)(params)
    values = {"timesteps": t.astype(int), "generator_input": x_t, "generated_image": x, "loss_dm": matching,
              "gen_cls_loss": gan, "total": total, "dm_grad": gradient}
    for name, value in values.items():
      case.check(f"{mode}/{name}", value)
    case.check_grads(f"{mode}/grad", grads)
    total, score, gan, grads = setting.critic_turn(x, cond, real_cond, hyper["guidance_cls_loss_weight"])
    case.check(f"{mode}/critic/total", total)
    case.check(f"{mode}/critic/loss_fake_mean", score)
    case.check(f"{mode}/critic/guidance_cls_loss", gan)
    case.check_grads(f"{mode}/critic/grad_fake", grads["net"])
    case.check_grads(f"{mode}/critic/grad_head", grads["head"])

  selected, clean = int(case["selected_step"][0]), case["sim_init"]
  if selected:
    states = walk(solvers.renoise()(process, student), clean, times[: selected + 1], cond, case["sim_noise"])
    inputs = jnp.concatenate([clean[None], states[:-1]])
    estimates = jnp.stack([student(x, case.full(t, x), cond) for x, t in zip(inputs, times)])
    clean = estimates[-1]
    for name, value in {"rollout_inputs": inputs, "rollout_x0": estimates}.items():
      if f"backward_simulation/{name}" in case.outs:
        case.check(f"backward_simulation/{name}", value)
  t = case.full(times[selected], clean)
  turn("backward_simulation", input_at(clean, t), t)
  if any(name.startswith("data/") for name in case.outs):
    t = jnp.asarray(np.asarray(times)[np.asarray(case["data_step_index"])], case.dtype)
    turn("data", input_at(case["images"], t), t)


RUNNERS = {r"dmd2_normalisation": normalisation, r"dmd2_sd_parts_.*": sd_parts, r"dmd2_edm_.*": edm,
           r"dmd2_sdxl_step_.*": sdxl_step}
