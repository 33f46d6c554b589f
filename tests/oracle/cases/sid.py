"""Score identity distillation: on EDM networks, guided with several steps, and with a GAN term."""

import jax
import jax.numpy as jnp

from ddil_jax.diffusion import prediction, solvers, transforms, weighting
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.diffusion.process import add_noise, expand
from ddil_jax.objectives.base import bind
from ddil_jax.objectives.dmd2 import critic_loss
from ddil_jax.objectives.sid import gan_terms, sid_loss
from tests.oracle import toy
from tests.oracle.walk import walk


def edm_setup(case):
  """(process, denoiser, noise levels of u in (0, tmax / 1000)) of an EDM file."""
  hyper = case.hyper
  process = processes.edm(hyper["sigma_min"], hyper["sigma_max"], time_scale=0.25)
  top, bottom = (hyper[name] ** (1 / hyper["rho"]) for name in ("sigma_max", "sigma_min"))

  def levels(u):
    return (top + (1 - u.reshape(-1) * hyper["tmax"] / 1000) * (bottom - top)) ** hyper["rho"]

  return process, make_denoiser(toy.net, process, prediction.edm(hyper["sigma_data"])), levels


def one_hot(case):
  """The condition of a file with labels, as indices or already as vectors."""
  name = "labels" if "labels" in case else "label"
  if name not in case:
    return {}
  label = case[name]
  return {"embedding": label if label.ndim == 2 else jax.nn.one_hot(label, case.net("teacher")["E"].shape[0],
                                                                    dtype=case.dtype)}


def lognormal(case, name):
  """Noise levels exp(P_mean + P_std n)."""
  return jnp.exp(case.hyper["P_mean"] + case.hyper["P_std"] * case[name].reshape(-1))


def per_pixel(x):
  """How many numbers a sample has: the originals sum over them."""
  return x[0].size


def sid(case):
  process, denoiser, levels = edm_setup(case)
  hyper, cond = case.hyper, one_hot(case)
  teacher, fake = bind(denoiser, case.net("teacher")), bind(denoiser, case.net("fake"))
  z = case["z"]
  sigma = levels(case["t_uniform"])

  def generate(params):
    return denoiser(params, hyper["init_sigma"] * z, case.full(hyper["init_sigma"], z), cond)

  def loss_of(x):
    loss, _ = sid_loss(process, teacher, fake, x, sigma, case["noise"], cond, hyper["alpha"])
    return loss.sum() / len(x), loss

  x = generate(case.net("student"))
  (loss, loss_map), grad = jax.value_and_grad(loss_of, has_aux=True)(x)
  case.check("generated", x)
  case.check("g_loss_map", loss_map)
  case.check("g_loss", loss)
  case.check("g_grad_images", grad)
  case.check_grads("g_grad", jax.grad(lambda p: loss_of(generate(p))[0])(case.net("student")))

  t, weight = lognormal(case, "rnd_normal"), weighting.edm(hyper["sigma_data"])

  def critic(params):
    loss, found = critic_loss(process, bind(denoiser, params), x, t, case["fake_noise"], cond, weight)
    return loss.mean() * per_pixel(x), found

  (loss, found), grads = jax.value_and_grad(critic, has_aux=True)(case.net("fake"))
  case.check("fake_loss_map", expand(weight(process, t), x) * (found["x0"] - x) ** 2)
  case.check("fake_loss", loss)
  case.check_grads("fake_grad", grads)


def sid_lsg(case):
  hyper = case.hyper
  process = processes.discrete(case.table("alphas_cumprod"))
  head = prediction.v() if hyper["prediction_type"] == "v_prediction" else prediction.eps()
  cond = {"embedding": case["prompt_embeds"]}
  null = lambda cond: {"embedding": jnp.broadcast_to(case["null_embeds"], cond["embedding"].shape)}  # noqa: E731

  def guided(scale, params):
    net = toy.guided(transforms.guidance(scale, null))
    return bind(make_denoiser(net, process, head), params)

  steps, first = hyper["num_steps"], hyper["init_timestep"]
  times = [int(first * (1 - i / steps)) for i in range(steps)]

  def generate(params, which):
    """The image of the last step, and the inputs of all."""
    z = case[f"{which}_z"]
    x_T = expand(process.sigma(case.full(times[0], z)), z) * z
    policy = solvers.renoise()(process, guided(1, params))
    noise = jnp.concatenate([case[f"{which}_step_noise"], z[None]]) if steps > 1 else z[None]  # none at the end
    visited = walk(policy, x_T, [*times, -1], cond, noise)
    return visited[-1], jnp.concatenate([x_T[None], visited[:-1]])

  images, _ = generate(case.net("generator"), "critic")
  t, noise = case["critic_timesteps"].astype(case.dtype), case["critic_noise"]
  scale = hyper["kappa1_train_fake"]

  def critic(params):
    loss, found = critic_loss(process, guided(scale, params), images, t, noise, cond, weighting.snr_weight())
    return loss.mean() * per_pixel(images), found

  (loss, found), grads = jax.value_and_grad(critic, has_aux=True)(case.net("critic"))
  case.check("critic_images", images)
  out = toy.guided(transforms.guidance(scale, null))(case.net("critic"), found["x_t"], t, cond)
  case.check("critic_pred", out)
  case.check("critic_loss", loss)
  case.check_grads("critic_grad", grads)

  t, noise = case["gen_timesteps"].astype(case.dtype), case["gen_noise"]
  real = guided(hyper["kappa4_eval_real"], case.net("teacher"))
  fake = guided(hyper["kappa23_eval_fake"], case.net("critic"))

  def loss_of(params):
    x, inputs = generate(params, "gen")
    loss, found = sid_loss(process, real, fake, x, t, noise, cond, hyper["alpha"])
    return loss.sum() / len(x), (x, inputs, found)

  (loss, (x, inputs, found)), grads = jax.value_and_grad(loss_of, has_aux=True)(case.net("generator"))
  case.check("gen_images", x)
  case.check("gen_step_x_in", inputs)
  case.check("gen_step_timesteps", jnp.broadcast_to(jnp.array(times)[:, None], case.raw("gen_step_timesteps").shape))
  case.check("y_real", found["d_real"])
  case.check("y_fake", found["d_fake"])
  case.check("weight_factor", found["weight"].reshape(case.raw("weight_factor").shape))
  case.check("gen_loss", loss)
  case.check_grads("gen_grad", grads)


def sida(case):
  process, denoiser, levels = edm_setup(case)
  hyper, cond = case.hyper, one_hot(case)
  weight = weighting.edm(hyper["sigma_data"])

  def generate(params, z):
    return denoiser(params, hyper["init_sigma"] * z, case.full(hyper["init_sigma"], z), cond)

  def logits(params, x_t, t):
    """The release's: the mean over channels of the encoder's map."""
    return denoiser(params, x_t, t, cond, None, ("bottleneck",))[1]["bottleneck"].mean(-1)

  x = generate(case.net("generator"), case["critic_z"])
  t, noise = lognormal(case, "critic_normal"), case["critic_noise"]

  def score(params):
    loss, found = critic_loss(process, bind(denoiser, params), x, t, noise, cond, weight)
    return loss.mean() * per_pixel(x), found

  def discriminator(params):
    fake, real = (logits(params, add_noise(process, image, noise, t), t) for image in (x, case["real"]))
    each = weight(process, t) * gan_terms(fake, real).mean()  # the batch's mean, then a factor per example
    return each.mean(), each

  (loss, found), grads = jax.value_and_grad(score, has_aux=True)(case.net("critic"))
  case.check("critic_images", x)
  case.check("critic_loss_map", expand(weight(process, t), x) * (found["x0"] - x) ** 2)
  case.check("critic_loss", loss)
  case.check_grads("critic_grad", grads)
  (loss, each), grads = jax.value_and_grad(discriminator, has_aux=True)(case.net("critic"))
  case.check("d_loss_per_example", each.reshape(case.raw("d_loss_per_example").shape))
  case.check("d_loss", loss)
  case.check_grads("d_grad", grads)

  t, noise = levels(case["gen_uniform"]), case["gen_noise"]
  teacher, critic = bind(denoiser, case.net("teacher")), case.net("critic")

  def terms(params):
    x = generate(params, case["gen_z"])
    loss, found = sid_loss(process, teacher, bind(denoiser, critic), x, t, noise, cond, hyper["alpha"])
    gan = gan_terms(logits(critic, found["x_t"], t)).mean() / found["weight"]
    sid_term = hyper["loss_scaling_G"] * loss.sum() / len(x)
    gan_term = hyper["loss_scaling_G_gan"] * gan.mean() * per_pixel(x)
    return (sid_term, gan_term, 0.5 * (sid_term + gan_term)), (x, loss, gan)

  values, pull_back, (x, loss_map, gan) = jax.vjp(terms, case.net("generator"), has_aux=True)
  case.check("gen_images", x)
  case.check("gen_sid_map", loss_map)
  case.check("gen_gan_per_example", gan.reshape(case.raw("gen_gan_per_example").shape))
  for i, name in enumerate(("gen_sid", "gen_gan", "gen")):
    case.check(f"{name}_loss", values[i])
    seed = tuple(jnp.ones((), case.dtype) * (i == j) for j in range(3))
    case.check_grads(f"{name}_grad", pull_back(seed)[0])


RUNNERS = {r"sid_\d+_.*": sid, r"sid_lsg_\d+_.*": sid_lsg, r"sida_\d+_.*": sida}
