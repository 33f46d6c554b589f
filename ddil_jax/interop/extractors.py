"""Networks that measure images: published weights converted once to safetensors, and loaded from there."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax import files
from ddil_jax.errors import UsageError
from ddil_jax.interop import clip, weights
from ddil_jax.models.base import describe_mismatch
from ddil_jax.models.inception import InceptionV3
from ddil_jax.models.lpips import LPIPS
from ddil_jax.registry import unknown


class Published(NamedTuple):
  """A file as published; `sha256` is its hash, or the beginning that its name carries."""
  name: str
  sha256: str
  url: str


class Kind(NamedTuple):
  """How a network is converted and made again.

  Attributes:
    sources: the published files, in the order in which they are given; for "clip" the folder.
    make: fields of the converted file -> module.
    inputs: module -> arguments of its `init`, to know its parameters.
    rename, unused: see `weights.to_flax`.
  """
  sources: tuple[Published, ...]
  make: Callable[..., nn.Module]
  inputs: Callable[[Any], tuple]
  rename: tuple[tuple[str, str], ...] = ()
  unused: str = ""


def _lpips(net: str, backbone: Published, heads: str) -> Kind:
  head = Published(f"{net}.pth", heads,
                   "https://github.com/richzhang/PerceptualSimilarity/tree/master/lpips/weights/v0.1")
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  return Kind((backbone, head), lambda **options: LPIPS(net, **options), lambda module: (image,),
              ((r"^lin(\d)$", r"lin\1.model.1.weight"),), r"classifier\..*")


KINDS = {
    "inception": Kind(
        (Published("pt_inception-2015-12-05-6726825d.pth", "6726825d",
                   "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"),),
        InceptionV3, lambda module: (jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),),
        unused=r"fc\.bias|.*\.num_batches_tracked"),
    "lpips-alex": _lpips("alex", Published("alexnet-owt-7be5be79.pth", "7be5be79",
                                           "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"),
                         "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"),
    "lpips-vgg": _lpips("vgg", Published("vgg16-397923af.pth", "397923af",
                                         "https://download.pytorch.org/models/vgg16-397923af.pth"),
                        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    "clip": Kind(
        (Published("FOLDER", "", "config.json and model.safetensors of"
                   " https://huggingface.co/openai/clip-vit-base-patch32 or another CLIP"),),
        clip.make, lambda module: (jax.ShapeDtypeStruct((1, module.size, module.size, 3), jnp.float32),
                                   jax.ShapeDtypeStruct((1, module.length), jnp.int32)),
        ((r"\.layers_(\d+)\.", r".layers.\1."),), r".*\.position_ids"),
}


# What config.eval.extractor and config.eval.lpips may name: kind, and fields of its module.
NAMES = {"inception": ("inception", {"resize": "torch"}), "inception-tf1": ("inception", {"resize": "tf1"}),
         "inception-clean": ("inception", {"resize": "clean"}), "clip": ("clip", {}),
         "lpips-alex": ("lpips-alex", {}), "lpips-vgg": ("lpips-vgg", {})}


def convert(kind: str, sources: Sequence, out) -> dict:
  """Writes published weights as safetensors that `load` reads.

  Args:
    kind: one of KINDS.
    sources: paths of the published files in the order of `Kind.sources`; of a folder for "clip".
    out: file to write.

  Returns:
    What the file says of itself: {"kind", "fields", "sources": {name: sha256}}.

  Raises:
    UsageError: unknown kind, a file that is absent, damaged or not the published one, tensors that do not fit.
  """
  entry = _kind(kind)
  if len(sources) != len(entry.sources):
    raise UsageError(f"--kind={kind} is made from {_list(entry)}; {len(sources)} paths are given")
  fields, tensors, about = {}, {}, {}
  if kind == "clip":
    fields, tensors, about = clip.read_folder(sources[0])
  for published, path in zip(entry.sources, sources) if kind != "clip" else ():
    about[published.name] = weights.sha256(path)
    if not about[published.name].startswith(published.sha256):
      raise UsageError(f"{path} is not {published.name} of {published.url}: its sha256 begins with"
                       f" {about[published.name][:8]}, that of the published file with {published.sha256[:8]}")
    tensors |= weights.read_torch(path)
  what = " and ".join(str(path) for path in sources)
  module = entry.make(**fields)
  variables = weights.to_flax(weights.template(module, *entry.inputs(module)), tensors, what, entry.rename,
                              entry.unused)
  if kind.startswith("lpips") and any((variables["params"][f"lin{i}"] < 0).any() for i in range(5)):
    raise UsageError(f"{what}: the linear heads have negative weights; those of version 0.1 have none")
  return save(out, kind, fields, variables, about)


def save(path, kind: str, fields: dict, variables: dict, sources: dict[str, str]) -> dict:
  """Writes a network that `load` reads: a converted one, or one of these kinds that was trained here.

  Args:
    kind: one of KINDS.
    fields: of its module, which JSON can hold.
    variables: of the module.
    sources: {name: sha256} of what it was made from.

  Returns:
    What the file says of itself: {"kind", "fields", "sources"}.
  """
  about = {"kind": kind, "fields": fields, "sources": sources}
  arrays = flax.traverse_util.flatten_dict(variables, sep="/")
  files.save_arrays(path, {name: np.asarray(x) for name, x in arrays.items()}, about)
  return about


def load(path, kind: str, **options) -> tuple[nn.Module, dict]:
  """A converted network.

  Args:
    path: what `convert` wrote.
    kind: one of KINDS.
    options: fields of the module, such as `resize` or `quantise`.

  Returns:
    (module, variables).

  Raises:
    UsageError: absent (says where the weights are and how to convert them), damaged, of another kind.
  """
  entry = _kind(kind)
  out = path if str(path).endswith(".safetensors") else "FILE.safetensors"
  command = f"`ddil convert-extractor --kind={kind} {' '.join(p.name for p in entry.sources)} --out={out}`"
  if not pathlib.Path(path).is_file():
    raise UsageError(f"no file {path}: '{kind}' needs {_list(entry)}, converted by {command}; without them leave"
                     " the field empty: the small classifier, config.eval.extractor's default, needs no file")
  arrays, about = files.load_arrays(path, f"convert the published files again: {command}")
  if not isinstance(about, dict) or about.get("kind") != kind:
    there = about.get("kind", "another file") if isinstance(about, dict) else "another file"
    raise UsageError(f"{path} holds '{there}', not '{kind}'; convert the weights of '{kind}': {command}")
  module = entry.make(**about["fields"], **options)
  variables = flax.traverse_util.unflatten_dict(arrays, sep="/")
  wrong = describe_mismatch(weights.template(module, *entry.inputs(module)), variables)
  if wrong:
    raise UsageError(f"{path} is of another version ({'; '.join(wrong[:3])}); convert the published files again:"
                     f" {command}")
  return module, variables


def from_config(text: str, quantise: bool) -> tuple[str, nn.Module, dict]:
  """The network of `NAME:PATH`, NAME one of NAMES: (its name with the preprocessing, module, variables).

  Raises:
    UsageError: another form of text, an unknown name, and what `load` raises.
  """
  name, colon, path = text.partition(":")
  if name not in NAMES:
    raise UsageError(unknown("extractor", name, NAMES))
  if not path:
    raise UsageError(f"extractor '{text}' has no path: {name}:FILE.safetensors is expected")
  kind, options = NAMES[name]
  module, variables = load(path, kind, quantise=quantise, **options)
  return "-".join((kind, *options.values(), "uint8" if quantise else "float")), module, variables


def _kind(kind: str) -> Kind:
  if kind not in KINDS:
    raise UsageError(unknown("kind of extractor", kind, KINDS))
  return KINDS[kind]


def _list(entry: Kind) -> str:
  return " and ".join(f"{p.name} ({p.url})" for p in entry.sources)

