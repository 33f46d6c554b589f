"""Adapter guidance distillation: the adapter on one block of the toy network, its losses and learning rate."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax.diffusion import prediction
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.diffusion.process import eps_from_x0
from ddil_jax.models.adapters import Adapter, ScalarEncoder, learns
from ddil_jax.models.base import by_path
from ddil_jax.objectives.agd import agd_loss
from ddil_jax.training import optim
from tests.oracle import toy

# Names of the release, `net.0` for the first layer of a list, and ours.
_ENCODERS = {"guidance_scale_embedder": "guidance_scale", "timestep_embedder": "time"}
_MLP = {"net_0": "in", "net_3": "norm", "net_4": "out"}


def renamed(name: str) -> tuple[str, ...]:
  """Where a parameter of the release lies in ours."""
  *_, kind = name.rsplit("_", 1)
  if name.startswith("class_proj"):
    return ("label", {"weight": "kernel"}.get(kind, kind))
  if name.startswith("out_proj"):
    layer = _MLP[name.removeprefix("out_proj_").removesuffix(f"_{kind}")]
    return ("out", layer, _leaf(kind, layer))
  encoder = next(e for e in _ENCODERS if name.startswith(e))
  rest = name.removeprefix(f"{encoder}_net_").removesuffix(f"_{kind}")
  if rest == "0":
    return (_ENCODERS[encoder], kind)
  if rest == "2":
    return (_ENCODERS[encoder], "norm", _leaf(kind, "norm"))
  layer = _MLP[rest.removeprefix("1_")]
  return (_ENCODERS[encoder], "mlp", layer, _leaf(kind, layer))


def _leaf(kind: str, layer: str) -> str:
  return kind if kind == "bias" else "scale" if layer == "norm" else "kernel"


def ours(params: dict) -> dict:
  """The release's parameters as ours; a matrix there is (out, in)."""
  tree: dict = {}
  for name, value in params.items():
    *folders, last = renamed(name)
    node = functools.reduce(lambda node, folder: node.setdefault(folder, {}), folders, tree)
    node[last] = value.T if value.ndim == 2 else value
  return tree


def agd(case):
  hyper, x_t = case.hyper, case["x_t"]
  base, adapter = case.net("base"), ours(case.net("adapter"))
  process = processes.discrete(1 - case.table("sigmas") ** 2)
  t, label = case["timestep"].astype(case.dtype), jax.nn.one_hot(case["label"], base["E"].shape[0], dtype=case.dtype)
  cond = {"embedding": label, "guidance_scale": case["w"]}
  read = (t if hyper["use_timestep"] else None, label if hyper["use_class_label"] else None)
  module = Adapter(base["W1"].shape[1], hyper["hidden_dim"], hyper["cfg_mult"])

  def offset(adapter):
    return module.apply({"params": adapter}, case["w"], *read)

  def net(params, x, t, cond, keys=None, features=()):
    """The adapter's output is added to the hidden layer, which a linear map follows."""
    shift = offset(params["adapter"]) @ params["base"]["W2"]
    return toy.net(params["base"], x, t, cond) + shift[:, None, None]

  def x0_of(eps):
    return make_denoiser(lambda *_: eps, process, prediction.eps())({}, x_t, t, cond)

  adapted = make_denoiser(net, process, prediction.eps())
  conditional = make_denoiser(toy.net, process, prediction.eps())(base, x_t, t, cond)

  def loss(base, adapter):
    own = adapted({"base": jax.lax.stop_gradient(base), "adapter": adapter}, x_t, t, cond)
    each, found = agd_loss(process, x_t, t, own, conditional, x0_of(case["eps_cfg"]), hyper["loss"])
    return each.mean(), (own, found)

  (value, (own, found)), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(base, adapter)
  encoder = ScalarEncoder(hyper["hidden_dim"])
  encode = lambda name, values: encoder.apply({"params": adapter[name]}, values)  # noqa: E731
  embedding = encode("guidance_scale", hyper["cfg_mult"] * case["w"])
  case.check("guidance_embedding", embedding)
  embedding = embedding + encode("time", t) if hyper["use_timestep"] else embedding
  if hyper["use_class_label"]:
    embedding = embedding + nn.Dense(hyper["hidden_dim"]).apply({"params": adapter["label"]}, label)
  case.check("embedding_sum", embedding)
  case.check("adapter_out", offset(adapter))
  case.check("eps_base", toy.net(base, x_t, t, cond))
  case.check("eps_student", eps_from_x0(process, x_t, own, t))
  if "weight" in case.outs:
    case.check("weight", found["weight"])
  case.check("loss", value)
  # Frequencies and phases are no parameters of the release.
  learned = {name for name in case.net("adapter") if learns("/".join(renamed(name)))}
  assert learned == {name.removeprefix("grad/") for name in case.outs if name.startswith("grad/")}
  flat = by_path(grads[1])
  stored = {name: flat["/".join(renamed(name))] for name in learned}
  case.check_grads("grad", {name: g.T if g.ndim == 2 else g for name, g in stored.items()})
  case.check("base_grad_is_none", np.array([not np.any(grads[0][name]) for name in grads[0] if name != "phi"]))
  steps = hyper["lr_num_steps"]
  rate = optim.learning_rate(hyper["lr"], "cosine", steps, steps // 10, end=1e-4, start=1e-4)
  case.check("learning_rate", jnp.stack([rate(step) for step in jnp.arange(steps)]))


RUNNERS = {r"agd_.*": agd}
