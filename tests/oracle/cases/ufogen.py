"""UFOGen: a turn of the discriminator, one of the generator, and its sampler."""

import jax
import jax.numpy as jnp

from ddil_jax.diffusion import prediction, solvers
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.diffusion.process import add_noise
from ddil_jax.objectives.base import bind, stop
from ddil_jax.objectives.ufogen import adversarial_loss, discriminator_loss, eps_error
from tests.oracle import toy
from tests.oracle.walk import walk


def first_half(params, x, t, cond, keys=None, features=()):
  """The noise prediction of a network that predicts a variance beside it."""
  return jnp.split(toy.net(params, x, t, cond), 2, axis=-1)[0]


def ufogen(case):
  hyper, x = case.hyper, case["x"]
  process = processes.discrete(case.table("alphas_cumprod"))
  net = first_half if hyper["learn_sigma"] else toy.net
  denoiser = make_denoiser(net, process, prediction.eps())
  label = case["label"]
  cond = {"embedding": label if label.ndim == 2 else
          jax.nn.one_hot(label, case.net("generator")["E"].shape[0], dtype=case.dtype)}

  def earlier(i):
    return jnp.maximum(i - hyper["num_timesteps"] / hyper["num_times"], 0).astype(i.dtype)

  def at(image, i, noise):
    return add_noise(process, image, noise, i.astype(case.dtype))

  def fake_of(params, which, noise):
    """(x_t, x0, x_t') of one turn."""
    t = case[f"{which}_t"]
    x_t = at(x, t, noise)
    x0 = denoiser(params, x_t, t.astype(case.dtype), cond)
    return x_t, x0, at(x0, earlier(t), case[f"{which}_fake_noise"])

  def logits(params, x_s, i):
    return toy.net(params, x_s, i.astype(case.dtype), cond)

  s = earlier(case["d_t"])
  x_t, x0, fake = fake_of(case.net("generator"), "d", case["d_noise"])
  real = at(x, s, case["d_real_noise"])
  for name, value in {"t_minus": s, "x_t": x_t, "pred_xstart": x0, "fake_x_t_minus": fake,
                      "real_x_t_minus": real}.items():
    case.check(f"d_{name}", value)

  def discriminator(params):
    found = logits(params, stop(fake), s), logits(params, real, s)
    return discriminator_loss(*found).mean(), found

  (loss, found), grads = jax.value_and_grad(discriminator, has_aux=True)(case.net("discriminator"))
  case.check("d_fake_logits", found[0])
  case.check("d_real_logits", found[1])
  case.check("loss_dis", loss)
  case.check_grads("discriminator_grad", grads)

  s = earlier(case["g_t"])

  def generator(params):
    x_t, x0, fake = fake_of(params, "g", case["g_noise"])
    found = logits(case.net("discriminator"), fake, s)
    error = eps_error(process, x0, x, case["g_t"].astype(case.dtype))
    return (adversarial_loss(found).mean(), error.mean()), (x_t, x0, fake, found, error)

  (loss, error), pull_back, (x_t, x0, fake, found, each) = jax.vjp(generator, case.net("generator"), has_aux=True)
  for name, value in {"t_minus": s, "x_t": x_t, "pred_xstart": x0, "fake_x_t_minus": fake, "fake_logits": found,
                      "mse_per_example": each}.items():
    case.check(f"g_{name}", value)
  case.check("loss_gen", loss)
  one, zero = jnp.ones((), case.dtype), jnp.zeros((), case.dtype)
  case.check_grads("generator_grad_adv_only", pull_back((one, zero))[0])
  if hyper["learn_sigma"]:
    for name in [name for name in case.outs if name.startswith(("generator_grad/", "generator_grad_mse_only/"))]:
      case.leave(name, "includes the term that trains the variance, which the networks here do not predict")
    case.leave("g_vb_per_example", "that term")
    case.leave("loss_c", "that term and g_mse_per_example")
  else:
    case.check("loss_c", error)
    case.check_grads("generator_grad_mse_only", pull_back((zero, one))[0])
    case.check_grads("generator_grad", pull_back((one, one))[0])

  n, top = hyper["num_times"], hyper["num_timesteps"] - 1
  times = [int(i / n * top) for i in range(n, 0, -1)]
  policy = solvers.renoise()(process, bind(denoiser, case.net("generator")))
  ends = [int(t - top / n) for t in times[:-1]] + [-1]  # the last step gives x0 itself
  sample, noise = case["sample_init"], case["sample_noise"]
  for i, (t, end) in enumerate(zip(times, ends)):
    sample = walk(policy, sample, [t, end], cond, noise[i:i + 1])[-1]
  case.check("sample", sample)


RUNNERS = {r"ufogen_.*": ufogen}
