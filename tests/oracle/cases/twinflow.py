"""TwinFlow (the authors' MNIST tutorial): the recursive term alone (RCGM) and all five."""

import jax
import jax.numpy as jnp
import optax

from ddil_jax.diffusion import distance, transforms
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.process import add_noise, velocity_from_x0
from ddil_jax.objectives.base import stop
from ddil_jax.objectives.twinflow import fake_velocity_loss, move, rectification, recursive_target
from tests.oracle import toy

NEAR = 0.01  # of the original, in flow time


def velocity_of(params):
  """(x, t, r, cond) -> F; the network is told signed times, the second one in its slot."""
  def velocity(x, t, r, cond):
    sign = cond.get("time_sign", 1)
    return toy.net(params, x, sign * t, {"embedding": cond["embedding"], "slot": (sign * r)[:, None]})
  return velocity


def reference_of(case):
  """Parameters of the reference network; an average is updated before it is used, with the decay so far."""
  hyper, params = case.hyper, case.net("student")
  if hyper["ema_decay_rate"] == 0:
    return params
  if hyper["ema_decay_rate"] == 1:
    return case.net("ema")
  average = optax.incremental_update(params, case.net("ema"), 1 - hyper["cmd_before"])
  case.check_grads("ema_after", average)
  return average


def twinflow(case):
  hyper, process, l2 = case.hyper, processes.flow(), distance.l2()
  x0, noise, t = case["x"], case["z"], case["t"]
  one_hot = lambda name: jax.nn.one_hot(case[name], len(case.net("student")["E"]), dtype=case.dtype)  # noqa: E731
  cond, null = {"embedding": one_hot("label")}, lambda cond: {**cond, "embedding": one_hot("uncond")}
  r = t - case["tt_fraction"] * t
  x_t = add_noise(process, x0, noise, t)
  reference = velocity_of(reference_of(case))
  case.leave("cmd_after", "how the decay of an average grows is the training step's business")

  # The data's velocity, moved by ratio times the difference of guidance.
  at_t = lambda x, t, cond: reference(x, t, t, cond)  # noqa: E731
  guided = transforms.guidance(1 + hyper["enhanced_ratio"], null)(at_t)
  v = velocity_from_x0(process, x_t, x0, t) + guided(x_t, t, cond) - at_t(x_t, t, cond)

  def recursive(velocity, x, t, r):
    u = velocity(x, t, r, cond)
    target = recursive_target(process, stop(u), reference, x, t, jnp.maximum(t - NEAR, r), r, cond, v,
                              hyper["estimate_order"])
    return u, target

  def loss(params):
    velocity = velocity_of(params)
    u, target = recursive(velocity, x_t, t, r)
    found, terms = {"F": u, "rcgm_target": target}, {"rcgm": l2(u, target)}
    if hyper["using_twinflow"]:
      one, zero = jnp.ones_like(t), jnp.zeros_like(t)
      # Their one-step term has the velocity of x_t's own image and noise, which is that of the pair.
      jump, target = recursive(velocity, noise, one, zero)
      image = stop(move(process, noise, jump, one, zero))
      difference = rectification(process, velocity, image, case["dm_z"], case["dm_t"], cond)
      terms |= {"rcgm_one_step": l2(jump, target), "real_velocity": l2(velocity(x_t, t, t, cond), v),
                "fake_velocity": fake_velocity_loss(process, velocity, image, noise, t, cond),
                "rectify": l2(jump, stop(jump - difference))}
      found |= {"rcgm_one_step_target": target, "F_fake": jump, "x_fake": image, "F_grad": difference,
                "x_t_fake": add_noise(process, image, noise, t), "target_fake": noise - image}
    return jnp.mean(sum(terms.values())), (terms, found)

  (total, (terms, found)), grads = jax.value_and_grad(loss, has_aux=True)(case.net("student"))
  for name, value in {"x_t": x_t, "t": t, "tt": r, "velocity_target": v, **found}.items():
    case.check(name, value)
  for name, value in terms.items():
    case.check(f"loss_terms/{name}", value)
  case.check("loss", total, mean_of="loss_terms/rectify" if hyper["using_twinflow"] else "loss_terms/rcgm")
  case.check_grads("grad", grads)


RUNNERS = {r"twinflow_.*": twinflow}
