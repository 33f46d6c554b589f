"""Models in the folder layout of diffusers, in and out, tensor by tensor. PyTorch is not needed.

    FOLDER/config.json                              what the network is: `interop/configs.py`
    FOLDER/diffusion_pytorch_model.safetensors      its weights, or
    FOLDER/diffusion_pytorch_model.safetensors.index.json    a list of files that hold them

A pipeline's folder has `model_index.json` and one such folder for each component: unet, vae, text_encoder. Original
single files of Stable Diffusion are read too, by `interop/single_file.py`.
"""

import functools
import itertools
import math
import pathlib
import re
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import numpy as np

from ddil_jax import files
from ddil_jax.errors import UsageError
from ddil_jax.interop import configs, single_file, weights
from ddil_jax.models import edm
from ddil_jax.types import Params

KIND = "diffusers"
_STEMS = ("diffusion_pytorch_model", "model")
_HALF = ".fp16"  # what names of half precision have more; read where there is nothing else
# What follows a stem there: first full precision, then half.
_ON_THE_HUB = ((".safetensors", ".safetensors.index.json", "-*-of-[0-9][0-9][0-9][0-9][0-9].safetensors"),
               (f"{_HALF}.safetensors", f".safetensors.index{_HALF}.json", f"{_HALF}-*.safetensors",
                f"-*{_HALF}.safetensors"))
_AGAIN = "convert the folder again: `ddil convert FOLDER --out=FILE.safetensors`"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MOST_PARAMETERS = 20_000_000_000  # SDXL has 2.6
# Stored by some versions and computed by ours.
_NOT_NEEDED = r".*\.(position_ids|resample_filter)"
# What a student may have that its teacher has not, and what it starts from: zero, without effect.
_NEW = r"time_embedding/cond_proj/kernel"


class Report(NamedTuple):
  """What a conversion found, as `name [shape]` in the published names.

  Attributes:
    model: class and number of parameters.
    new: parameters that the file does not have and that start at zero effect.
    unused: tensors of the file that the network does not have.
    ignored: fields of config.json that are not known here.
  """
  model: str
  new: tuple[str, ...]
  unused: tuple[str, ...]
  ignored: tuple[str, ...]

  def __str__(self) -> str:
    lines = [self.model]
    for what, names in (("new, without effect", self.new), ("unused", self.unused),
                        ("fields of config.json that are not known", self.ignored)):
      more = f" and {len(names) - 20} more" if len(names) > 20 else ""
      lines += [f"{what}: {', '.join(names[:20])}{more}"] if names else []
    return "\n".join(lines)


class Loaded(NamedTuple):
  """A converted network: the module, its parameters, and what the file says of itself.

  `about` has "config" (of config.json), "source" (the folder's name) and "license" (of the model card).
  """
  module: nn.Module
  params: Params
  about: dict


def convert(folder, out, component: str = "", guidance_embedding: int = 0) -> Report:
  """Writes a model's weights as one file that `load` reads; one tensor at a time is in memory.

  Args:
    folder: of a model, or of a pipeline; or the name of one on the Hugging Face Hub; or an original checkpoint of
      Stable Diffusion, one safetensors file.
    out: file to write.
    component: of a pipeline: "unet" (default), "vae", "text_encoder", ...
    guidance_embedding: gives a UNet LCM's embedding of the guidance scale of this width, without effect at first, so
      that the file is a student that starts as its teacher; 0 leaves the network as it is.

  Raises:
    UsageError: no such folder, weights that are pickled, damaged, missing or do not fit, a config.json that is not
      supported or makes no sense.
  """
  source = pathlib.Path(folder)
  with weights.reading(source):
    named = source.resolve().name if source.exists() else str(folder)
    if single := source.is_file():
      folder, described = source, source
      config, there = _single(source, component or "unet")
    else:
      if not source.is_dir() and re.fullmatch(r"[\w\-][\w.\-]*/[\w\-][\w.\-]*", str(folder)):
        source = download(str(folder), component)
      folder = _model_folder(source, component)
      described = folder / "config.json"
      config, there = weights.read_json(described), None
  if guidance_embedding:
    if not str(config.get("_class_name")) == "UNet2DConditionModel" or config.get("time_cond_proj_dim"):
      raise UsageError(f"{folder}: a guidance embedding is added to a UNet2DConditionModel that has none yet")
    config = config | {"time_cond_proj_dim": guidance_embedding}
  module, ignored = _module(config, described)
  shapes = _shapes(module, folder)
  wanted = _published(module, flax.traverse_util.unflatten_dict(shapes))
  with weights.reading(folder):
    there, licence = (there, "") if single else (_tensors(folder), _license(folder))
  found, problems, new = {}, [], []
  for path, shape in shapes.items():
    name = wanted["params", *path]
    if name not in there:
      is_new = guidance_embedding and re.fullmatch(_NEW, "/".join(path))
      (new if is_new else problems).append(f"{name} {list(shape)}" + ("" if is_new else " is missing"))
    elif not weights.fits(there[name].shape, path, shape):
      problems.append(f"{name} has shape {list(there[name].shape)}, which does not fit {list(shape)}")
    else:
      found[path] = there[name]
  if problems:
    more = f"; {len(problems) - 6} more such" if len(problems) > 6 else ""
    raise UsageError(f"{folder}: weights and {'its layout' if single else 'config.json'} do not fit:"
                     f" {'; '.join(problems[:6])}{more}")
  known = set(wanted.values())
  unused = [f"{name} {list(t.shape)}" for name, t in there.items()
            if name not in known and not re.fullmatch(_NOT_NEEDED, name)]

  def read(name):
    path = tuple(name.split("/"))
    if path not in found:
      return np.zeros(shapes[path], np.float32)
    x = found[path].read()
    if not np.isfinite(x).all():
      raise UsageError(f"{found[path].file}: {found[path].name} has values that are not finite")
    return weights.from_torch(x, path, shapes[path])

  about = {"kind": KIND, "config": config, "source": named, "license": licence}
  files.stream_arrays(out, {"/".join(path): shape for path, shape in shapes.items()}, read, about)
  model = f"{_class(config)}: {_count(shapes):,} parameters in {len(shapes)} tensors"
  return Report(model, tuple(new), tuple(unused), ignored)


def download(name: str, component: str = "") -> pathlib.Path:
  """The folder of a model or pipeline on the Hugging Face Hub: configs, model card, and safetensors of one component.

  Raises:
    UsageError: there is no network, no such model, or it asks for a login.
  """
  import huggingface_hub  # it takes long, and a local folder does without
  inner = component or "unet"
  described = ["README.md", "config.json", "model_index.json", f"{inner}/config.json"]
  try:
    for kinds in _ON_THE_HUB:
      stems = [f"{at}{stem}" for at in ("", f"{inner}/") for stem in _STEMS]
      wanted = described + [stem + kind for stem in stems for kind in kinds]
      found = pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
      if any(file for stem in stems for file in found.glob(f"{stem}*.safetensors")):
        break
    return found
  except Exception as e:  # of the Hub's client and of several libraries below it
    raise UsageError(f"no folder {name} is here, and it cannot be had from the Hugging Face Hub ({type(e).__name__}):"
                     f" where there is a network, `hf download {name} --local-dir FOLDER`, then `ddil convert FOLDER`"
                     ) from e


def load(path) -> Loaded:
  """A network that `convert` or `save` wrote; parameters are numpy float32.

  Raises:
    UsageError: absent, damaged, or another kind of file.
  """
  if pathlib.Path(path).suffix == ".json":
    raise UsageError(f"{path} describes a network and has no parameters; give a file of `ddil convert`, or a trained"
                     " run as --config.teacher.path=RUN")
  module, about = architecture(path)
  arrays, _ = files.load_arrays(path, _AGAIN)
  _require(arrays, _shapes(module, path), path)
  return Loaded(module, flax.traverse_util.unflatten_dict(arrays, sep="/"), about)


def architecture(path) -> tuple[nn.Module, dict]:
  """The module of such a file and its `about`, without reading parameters. Raises UsageError as `load`.

  A config.json of diffusers will do where no parameters are needed: for a network that is trained from the start.
  """
  if pathlib.Path(path).suffix == ".json":
    about = {"kind": KIND, "config": weights.read_json(pathlib.Path(path)), "source": "", "license": ""}
    return _module(about["config"], path)[0], about
  about = files.load_about(path, _AGAIN)
  if not isinstance(about, dict) or about.get("kind") != KIND:
    raise UsageError(f"{path} is no converted network; `ddil convert FOLDER --out=FILE.safetensors` makes one")
  return _module(about["config"], path)[0], about


def save(path, params: Params, about: dict) -> None:
  """Writes parameters as `convert` does: a student that was trained from what `load` gave.

  Args:
    about: of that.
  """
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  files.stream_arrays(path, {k: v.shape for k, v in flat.items()}, lambda name: np.asarray(flat[name]), about)


def export(params: Params, about: dict, folder, dtype: str = "float32") -> None:
  """Writes a model's folder, config.json and safetensors, that `from_pretrained` of diffusers loads.

  Args:
    params: of the network that `about["config"]` describes.
    dtype: of the weights: float32, float16 or bfloat16.

  Raises:
    UsageError: parameters of another network; not writable.
  """
  folder, config = pathlib.Path(folder), about["config"]
  module, _ = _module(config, folder)
  flat = flax.traverse_util.flatten_dict(params)
  shapes = _shapes(module, folder)
  _require({"/".join(path): v for path, v in flat.items()}, shapes, folder)
  wanted = _published(module, params)
  paths = {wanted["params", *path]: path for path in flat}

  def tensor(name):
    return weights.to_torch(np.asarray(flat[paths[name]]), paths[name])

  files.stream_arrays(folder / "diffusion_pytorch_model.safetensors",
                      {name: weights.torch_shape(shapes[path], path) for name, path in paths.items()}, tensor,
                      dtype=dtype, metadata={"format": "pt"})
  files.write_json(folder / "config.json", {k: v for k, v in config.items() if k != "_name_or_path"})


def export_lora(delta: Params, about: dict, folder, scale: float = 1.0, dtype: str = "float32") -> None:
  """Writes `pytorch_lora_weights.safetensors` of a UNet, that `load_lora_weights` of diffusers' pipelines loads.

      unet.NAME.lora_A.weight [rank, I] or [rank, I, H, W],   unet.NAME.lora_B.weight [O, rank] or [O, rank, 1, 1]

  The scale is in B, so that alpha is the rank, as readers take it where a file states none.

  Args:
    delta: as `lora.py` has it, of the network that `about["config"]` describes.
    scale: alpha / rank.
    dtype: of the weights: float32, float16 or bfloat16.

  Raises:
    UsageError: a delta of another network, or with whole parameters, which the format has no place for; not writable.
  """
  folder = pathlib.Path(folder)
  module, _ = _module(about["config"], folder)
  shapes = _shapes(module, folder)
  wanted = _published(module, flax.traverse_util.unflatten_dict(shapes))
  found = {}
  for path, factor in flax.traverse_util.flatten_dict(delta).items():
    kernel, which = path[:-1], path[-1]
    if kernel not in shapes or which not in ("a", "b"):
      name = "/".join(path)
      of_scale = ("; a student without the embedding, with the scale folded in, trains with"
                  " --config.model.guidance_embedding=0 --config.objective.guidance_range='()'")
      raise UsageError(f"the LoRA trained {name} whole, which diffusers' LoRA format has no place for; write the whole"
                       f" network with --merged{of_scale if re.fullmatch(_NEW, name) else ''}")
    *window, n, m = shapes[kernel]
    rank = factor.shape[1 if which == "a" else 0]
    shape = (*window, n, rank) if which == "a" else (*[1] * len(window), rank, m)
    if math.prod(factor.shape) != math.prod(shape):
      raise UsageError(f"{folder}: LoRA and config do not fit: {'/'.join(path)}")
    name = wanted["params", *kernel].removesuffix("weight")
    found[f"unet.{name}lora_{which.upper()}.weight"] = (kernel, factor if which == "a" else scale * factor, shape)

  def tensor(name):
    kernel, factor, shape = found[name]
    return weights.to_torch(np.asarray(factor).reshape(shape), kernel)

  files.stream_arrays(folder / "pytorch_lora_weights.safetensors",
                      {name: weights.torch_shape(shape, kernel) for name, (kernel, _, shape) in found.items()}, tensor,
                      dtype=dtype, metadata={"format": "pt"})


def _published(module: nn.Module, params: Params) -> dict[tuple[str, ...], str]:
  return weights.names({"params": params}, edm.NAMES if isinstance(module, edm.EDMUNet) else weights.NUMBERED)


def _model_folder(folder, component: str) -> pathlib.Path:
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise UsageError(f"{folder} is no folder: a folder of diffusers, with config.json or model_index.json, is expected")
  if component and not re.fullmatch(r"\w+", component):
    raise UsageError(f"component '{component}': the name of a folder such as unet, vae or text_encoder is expected")
  inner = folder / (component or "unet")
  if (folder / "config.json").is_file() and not component:
    return folder
  if (inner / "config.json").is_file():
    return inner
  there = sorted(p.parent.name for p in folder.glob("*/config.json"))
  raise UsageError(f"{folder} has no {'config.json' if not component else f'{component}/config.json'}; there are:"
                   f" {', '.join(there) or 'no models'}")


def _single(path: pathlib.Path, component: str) -> tuple[dict, dict[str, weights.Stored]]:
  if path.suffix in PICKLES:
    raise UsageError(f"{path} is a pickle, which can run any code and is not read; where it is trusted and PyTorch is"
                     " installed, convert it: python -c \"import diffusers; diffusers.StableDiffusionPipeline"
                     f".from_single_file('{path}').save_pretrained('FOLDER')\"")
  return single_file.model(path, component)


def _class(config: dict) -> str:
  return config.get("_class_name") or config["architectures"][0]


def _module(config: dict, where) -> tuple[nn.Module, tuple[str, ...]]:
  try:
    return configs.make(config)
  except UsageError as e:
    raise UsageError(f"{where}: {e}") from e


@functools.lru_cache(maxsize=4)
def _shapes_of(module: nn.Module) -> dict[tuple[str, ...], tuple[int, ...]]:
  template = weights.template(module, *module.example())["params"]
  return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(template).items()}


def _shapes(module: nn.Module, where) -> dict[tuple[str, ...], tuple[int, ...]]:
  """{path: shape} of a module's parameters, nothing computed."""
  shapes = _shapes_of(module)
  if (count := _count(shapes)) > _MOST_PARAMETERS:
    raise UsageError(f"{where} describes a network of {count:,} parameters; {_MOST_PARAMETERS:,} are the most allowed")
  return shapes


def _count(shapes) -> int:
  return sum(math.prod(shape) for shape in shapes.values())


def _require(arrays: dict[str, Any], shapes: dict[tuple[str, ...], tuple[int, ...]], where) -> None:
  """Raises UsageError if the parameters are of another network than the config says."""
  wanted = {"/".join(path): tuple(shape) for path, shape in shapes.items()}
  there = {name: tuple(x.shape) for name, x in arrays.items()}
  wrong = sorted({name for name, _ in wanted.items() ^ there.items()})
  if wrong:
    raise UsageError(f"{where}: parameters and config do not fit: {', '.join(wrong[:6])}")


def _tensors(folder: pathlib.Path) -> dict[str, weights.Stored]:
  """All tensors of a model's folder by their names in the current layout."""
  for stem, kind in itertools.product(_STEMS, ("", _HALF)):
    index, single = folder / f"{stem}.safetensors.index{kind}.json", folder / f"{stem}{kind}.safetensors"
    if single.is_file():
      shards = [single]
      break
    if index.is_file():
      shards = _shards(index)
      break
  else:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
      raise UsageError(f"{folder} has its weights as {pickles[0]}, a pickle, which can run any code and is not read;"
                       " where it is trusted and PyTorch is installed, convert it: python -c \"import diffusers;"
                       f" diffusers.AutoModel.from_pretrained('{folder}').save_pretrained('{folder}')\"")
    raise UsageError(f"{folder} has no {_STEMS[0]}.safetensors, nor its index.json")
  found = {}
  for file in shards:
    for name, tensor in weights.stored(file).items():
      if name in found:
        raise UsageError(f"{file}: {name} is in {found[name].file.name} too")
      found[name] = tensor
  return configs.full_names(found)


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
  """The files that an index names: of its own folder, and safetensors."""
  named = weights.read_json(index).get("weight_map")
  if not isinstance(named, dict) or not named or not all(isinstance(v, str) for v in named.values()):
    raise UsageError(f"{index}: 'weight_map' from tensors to files is expected")
  for name in sorted(set(named.values())):
    if not re.fullmatch(r"[\w][\w.\-]*\.safetensors", name):
      raise UsageError(f"{index} names '{name[:80]}'; safetensors files in the same folder are expected")
  return [index.parent / name for name in sorted(set(named.values()))]


def _license(folder: pathlib.Path) -> str:
  """What the model card, in the model's folder or the pipeline's, says of the licence; "" if nothing."""
  for card in (folder / "README.md", folder.parent / "README.md"):
    if card.is_file():
      with open(card, encoding="utf-8", errors="replace") as f:
        head = f.read(8192)
      if found := re.search(r"^license:[ \t]*([\w.\-+ ]+?)[ \t]*$", head, re.MULTILINE):
        return found[1]
  return ""
