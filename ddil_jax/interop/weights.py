"""Published weights into Flax variables: files are read safely, names and shapes are checked."""

import contextlib
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import flax
import jax
import numpy as np
import safetensors

from ddil_jax.errors import UsageError

# What numpy has of safetensors' types; bfloat16 is of ml_dtypes, which JAX brings.
_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
LARGEST_JSON = 16 * 2**20  # bytes
# Names made from Flax paths -> those of diffusers and transformers, whose lists are numbered by a part of their own.
NUMBERED = ((r"\b(\w+blocks|attentions|resnets|downsamplers|upsamplers|to_out|net|layers)_(\d+)\b", r"\1.\2"),)
# The last part of a Flax path in PyTorch's terms.
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "mean": "running_mean", "var": "running_var"}


@contextlib.contextmanager
def reading(path) -> Iterator[None]:
  """Within it, what the system refuses is a UsageError: `path` is the user's, and only read."""
  try:
    yield
  except OSError as e:
    raise UsageError(f"cannot read {e.filename or path}: {e.strerror or e}") from e


def sha256(path) -> str:
  """sha256 (hex) of a file. Raises UsageError if it cannot be read."""
  try:
    with open(path, "rb") as f:
      return hashlib.file_digest(f, "sha256").hexdigest()
  except OSError as e:
    raise UsageError(f"cannot read {path}: {e.strerror}") from e


def read_torch(path) -> dict[str, np.ndarray]:
  """The tensors of a PyTorch state dict, float32, by torch's loader that builds nothing but tensors.

  Raises:
    UsageError: PyTorch is not installed; the file is damaged or holds other things than tensors.
  """
  try:
    import torch
  except ImportError as e:
    raise UsageError(f"PyTorch is needed once, to read {path}: `pip install torch`"
                     " (the converted file is read without it)") from e
  try:
    # Some published files hold tensors of a GPU.
    content = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as e:  # torch raises many kinds for a damaged file or a forbidden object
    raise UsageError(f"{path} is damaged or holds other things than tensors ({type(e).__name__})") from e
  if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
    raise UsageError(f"{path} holds no state dict: a dict of tensors is expected")
  return {str(name): value.detach().float().numpy() for name, value in content.items()}


def read_safetensors(path) -> dict[str, np.ndarray]:
  """The tensors of a safetensors file, float32. Raises UsageError if it is absent or damaged, or of other types."""
  try:
    with safetensors.safe_open(str(path), framework="numpy") as f:
      _require_types(path, f)
      return {name: f.get_tensor(name).astype(np.float32) for name in f.keys()}  # noqa: SIM118 (not a dict)
  except (OSError, safetensors.SafetensorError, TypeError) as e:
    raise UsageError(f"{path} is absent, damaged or no safetensors file of floats ({e})") from e


class Stored(NamedTuple):
  """A tensor in a safetensors file that has not been read.

  Attributes:
    file, name: where it is.
    shape: of what `read` gives.
    rows: (first, end) on its first axis, of a part of the stored tensor; () is all of it.
    turned: it is stored transposed.
  """
  file: pathlib.Path
  name: str
  shape: tuple[int, ...]
  rows: tuple[int, ...] = ()
  turned: bool = False

  def read(self) -> np.ndarray:
    """float32, of this shape."""
    with open_safetensors(self.file) as f:
      x = f.get_slice(self.name)[slice(*self.rows)] if self.rows else f.get_tensor(self.name)
    return (x.T if self.turned else x).astype(np.float32)


def stored(path) -> dict[str, Stored]:
  """{name: tensor} of a safetensors file; reads its header only.

  Raises:
    UsageError: as `open_safetensors`; types of numbers that are not read.
  """
  path = pathlib.Path(path)
  with open_safetensors(path) as f:
    _require_types(path, f)
    return {name: Stored(path, name, tuple(f.get_slice(name).get_shape())) for name in f.keys()}  # noqa: SIM118


def _require_types(path, f) -> None:
  for name in f.keys():  # noqa: SIM118 (not a dict)
    if (kind := f.get_slice(name).get_dtype()) not in _TYPES:
      raise UsageError(f"{path}: {name} is of type {kind}, which is not read; save the weights as float16 or float32")


def open_safetensors(path):
  """The file, to be read tensor by tensor. Raises UsageError if it is absent or damaged."""
  try:
    return safetensors.safe_open(str(path), framework="numpy")
  except FileNotFoundError as e:
    raise UsageError(f"no file {path}") from e
  except (OSError, safetensors.SafetensorError) as e:
    raise UsageError(f"{path} is damaged, cut short or no safetensors file ({e})") from e


def read_json(path) -> dict:
  """A stranger's JSON object. Raises UsageError if there is none, or one larger than any such file."""
  path = pathlib.Path(path)
  try:
    if path.stat().st_size > LARGEST_JSON:
      raise UsageError(f"{path} is larger than any such file")
    value = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as e:
    raise UsageError(f"cannot read {path}: {e}") from e
  if not isinstance(value, dict):
    raise UsageError(f"{path} holds no JSON object")
  return value


def names(template, rename=()) -> dict[tuple[str, ...], str]:
  """{path of a Flax variable: its published name}.

      params/a/b/kernel -> a.b.weight      batch_stats/a/mean -> a.running_mean

  Args:
    template: variables of the module, as arrays or ShapeDtypeStructs.
    rename: (pattern, replacement) pairs, applied to the name made from the path.
  """
  out = {}
  for path in flax.traverse_util.flatten_dict(template):
    name = ".".join(path[1:-1] + (_LEAVES.get(path[-1], path[-1]),))
    for pattern, replacement in rename:
      name = re.sub(pattern, replacement, name)
    out[path] = name
  return out


def to_flax(template, tensors: dict[str, np.ndarray], what: str, rename=(), unused: str = "") -> dict:
  """Variables of a module from tensors with PyTorch's names and layouts.

      kernel [H,W,I,O] <- weight [O,I,H,W],   kernel [I,O] <- weight [O,I],   axes of length 1 do not count

  Args:
    template: as for `names`.
    tensors: by their published names.
    what: where they come from, to begin a message with.
    rename: as for `names`.
    unused: pattern of published names that are known and not needed.

  Returns:
    The variables, numpy float32.

  Raises:
    UsageError: lists tensors that are missing, unknown, of another shape, or not finite.
  """
  shapes = {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(template).items()}
  wanted, found, problems = names(template, rename), {}, []
  for path, name in wanted.items():
    if name not in tensors:
      problems.append(f"{name} is missing")
      continue
    x, shape = tensors[name], shapes[path]
    if not fits(x.shape, path, shape):
      problems.append(f"{name} has shape {x.shape}, which does not fit {shape}")
    elif not np.isfinite(x).all():
      problems.append(f"{name} has values that are not finite")
    else:
      found[path] = from_torch(x, path, shape)
  known = set(wanted.values())
  problems += [f"{name} is unknown" for name in tensors
               if name not in known and not (unused and re.fullmatch(unused, name))]
  if problems:
    more = f"; {len(problems) - 6} more such" if len(problems) > 6 else ""
    raise UsageError(f"{what} does not fit: {'; '.join(problems[:6])}{more}")
  return flax.traverse_util.unflatten_dict(found)


def fits(published: tuple[int, ...], path: tuple[str, ...], shape: tuple[int, ...]) -> bool:
  """Whether a tensor of the published shape is the variable of this path and shape; axes of length 1 do not count."""
  turned = tuple(published[i] for i in _axes(path, len(published)))
  return [n for n in turned if n != 1] == [n for n in shape if n != 1]


def from_torch(x: np.ndarray, path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
  """A Flax variable, float32, from a published tensor that `fits`."""
  return np.ascontiguousarray(x.transpose(_axes(path, x.ndim)).reshape(shape), np.float32)


def to_torch(x: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
  """The published tensor of a Flax variable: the inverse of `from_torch`."""
  return x.transpose(np.argsort(_axes(path, x.ndim)))


def torch_shape(shape: tuple[int, ...], path: tuple[str, ...]) -> tuple[int, ...]:
  """The shape of `to_torch`'s result."""
  return tuple(shape[i] for i in np.argsort(_axes(path, len(shape))))


def _axes(path, ndim):
  """weight [O,I,H,W] or [O,I] -> kernel [H,W,I,O] or [I,O]; all else has one layout."""
  if path[-1] != "kernel":
    return tuple(range(ndim))
  return (2, 3, 1, 0) if ndim == 4 else tuple(range(ndim))[::-1]


def template(module, *arguments) -> dict:
  """Shapes of a module's variables, without computing them; arguments as for `init`, shapes will do."""
  return jax.eval_shape(module.init, jax.random.key(0), *arguments)
