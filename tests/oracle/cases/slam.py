"""SLAM (MCG-NJU/SPLAM's training script)."""

import jax
import jax.numpy as jnp

from ddil_jax.diffusion import distance, prediction, transforms
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.diffusion.process import add_noise
from ddil_jax.models.layers import guidance_embedding
from ddil_jax.objectives.base import bind
from ddil_jax.objectives.lcm import consistency_function
from ddil_jax.objectives.slam import slam_loss
from tests.oracle import toy
from tests.oracle.cases.lcm import skipped
from tests.oracle.cases.samplers import PREDICTIONS


def slam(case):
  hyper = case.hyper
  (process, t, s), gamma = skipped(case), case["gamma"]
  cond = {"embedding": case["prompt_embeds"]}
  null = lambda cond: {**cond, "embedding": case["uncond_prompt_embeds"]}  # noqa: E731
  head = prediction.make(PREDICTIONS[hyper["prediction_type"]])
  denoiser = make_denoiser(toy.net, process, head)
  # Their scale w is of c + w (c - u).
  guided = bind(make_denoiser(toy.guided(transforms.guidance(1 + hyper["w_scale"], null)), process, head),
                case.net("teacher"))
  scaling = dict(sigma_data=hyper["sigma_data"], timestep_scaling=hyper["timestep_scaling"])
  target = bind(consistency_function(denoiser, **scaling), case.net("target"))
  options = {"c": hyper["huber_c"]} if hyper["loss_type"] == "huber" else {}
  metric = distance.make({"huber": "pseudo_huber"}.get(hyper["loss_type"], hyper["loss_type"]), **options)
  z = add_noise(process, case["latents"], case["noise"], t)
  loss = lambda params: slam_loss(process, bind(denoiser, params), target, guided, z, t, s, gamma, cond,  # noqa: E731
                                  metric, **scaling)
  params = case.net("student")
  per_example, found = loss(params)
  w = 10 * (1 - gamma)
  case.check("gamma_embedding", guidance_embedding(w, hyper["embedding_dim"]))
  case.check("constant_embedding", guidance_embedding(jnp.zeros_like(w), hyper["embedding_dim"]))
  case.check("z_start", z)
  case.check("z_end", found["z_s"])
  case.check("z_gamma", found["z_gamma"])
  case.check("sigma_gamma", found["sigma_gamma"])
  case.check("student_raw", toy.net(params, found["z_gamma"], t, {**cond, "guidance_scale": 1 + w}))
  case.check("student_x0", found["x0"])
  case.check("model_pred", found["prediction"])
  case.check("target", found["target"])
  case.check("cfg_x0", guided(z, t, cond))
  case.check("cfg_noise", processes.eps_from_x0(process, z, guided(z, t, cond), t))
  # The embedding loses digits in float32 (its sines are of 1000 w), and the loss does not always show it.
  case.check("loss_per_example", per_example, mean_of="model_pred")
  case.check("loss", jnp.mean(per_example), mean_of="model_pred")
  case.check_grads("grad", jax.grad(lambda p: jnp.mean(loss(p)[0]))(params))


RUNNERS = {r"splam_.*": slam}
