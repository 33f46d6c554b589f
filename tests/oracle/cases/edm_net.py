"""EDM's networks: outputs, and gradients by the image and by every weight."""

import flax
import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax.interop import weights
from ddil_jax.models.edm import NAMES, DhariwalUNet, SongUNet


def edm_net(case):
  h = case.hyper
  fields = dict(resolution=h["img_resolution"], out_channels=h["in_channels"], num_classes=h["label_dim"],
                channels=h["model_channels"], channel_mult=tuple(h["channel_mult"]), num_blocks=h["num_blocks"],
                attention_resolutions=tuple(h["attn_resolutions"]), dropout=h["dropout"], dtype=case.dtype)
  if "SongUNet" in case.meta["source"]:
    module = SongUNet(**fields, fourier=h.get("embedding_type") == "fourier", encoder=h.get("encoder_type", "standard"),
                      decoder=h.get("decoder_type", "standard"), taps=tuple(h.get("resample_filter", (1, 1))),
                      noise_width=h.get("channel_mult_noise", 1))
  else:
    module = DhariwalUNet(**fields)
  tensors = {name.replace("/", "."): np.asarray(value) for name, value in case.net("w").items()}
  template = weights.template(module, *module.example())
  # The stored weights are exact in float32, which is what the converter gives.
  params = jax.tree.map(lambda v: v.astype(case.dtype),
                        weights.to_flax(template, tensors, case.name, NAMES)["params"])
  x, t, cond = case["x"], case["noise_labels"], {"label": jnp.argmax(case["labels"], axis=-1)}

  def run(params, x, cotangent):
    y, pull = jax.vjp(lambda params, x: module.apply({"params": params}, x, t, cond), params, x)
    by_params, by_x = pull(cotangent)
    return y, jax.tree.map(lambda g: jnp.sqrt(jnp.sum(g**2)), by_params), by_x

  # Of one program, which is compiled without being optimised: it runs twice.
  run = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
  y, norms, _ = run(params, x, case["cotangent"])
  grad_x = run(params, x, y)[2]
  case.check("y", y)
  case.check("grad_x", grad_x)
  names = weights.names(template, NAMES)
  for path, value in flax.traverse_util.flatten_dict(norms).items():
    name = "grad_norm/" + names["params", *path].replace(".", "/")
    if name in case.outs:  # the frequencies of random features have none
      case.check(name, value)


RUNNERS = {r"edm_net_.*": edm_net}
