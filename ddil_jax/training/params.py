"""Trees of arrays by name: what they are, their checksums, and a network alone in a file. No pickles.

A name is the path of a leaf joined by "/": `params/student/Conv_0/kernel`, `opt/student/1/0/mu/...`.
"""

import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils

from ddil_jax.errors import UsageError
from ddil_jax.files import write_bytes
from ddil_jax.types import Params

# {name: {"dtype": "float32", "shape": [3, 3, 1, 16], "sha256": hex}}; "sha256" only where it is asked for.
Index = dict[str, dict[str, Any]]


def flatten(tree) -> dict[str, Any]:
  """{name: leaf}, in the tree's order."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
  if len(flat) != len(leaves):
    raise ValueError("two leaves of the tree have the same name: a key contains '/'")
  return flat


def unflatten(flat: dict[str, Any]) -> dict:
  """Nested dicts from {name: leaf}; tuples and lists come back as dicts of "0", "1", ..."""
  tree: dict = {}
  for name, leaf in flat.items():
    *folders, last = name.split("/")
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[last] = leaf
  return tree


def describe(tree, hashes: bool = True) -> Index:
  """What the arrays of a tree are: dtype, shape, and sha256 of their bytes."""
  out = {}
  for name, leaf in flatten(tree).items():
    out[name] = {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
    if hashes:
      out[name]["sha256"] = hashlib.sha256(_bytes(leaf)).hexdigest()
  return out


def hash_params(params: Params) -> str:
  """sha256 (hex) over names, dtypes, shapes and bytes: the identity of a network."""
  return digest(describe(params))


def digest(value) -> str:
  """sha256 (hex) of a value that JSON can hold, whatever the order of its keys."""
  return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def require_like(params: Params, template: Params, what: str) -> None:
  """Checks that two trees have the same names, dtypes and shapes.

  Args:
    what: where `params` come from, to begin the message with: "teacher runs/teacher".

  Raises:
    UsageError: lists the parameters that differ.
  """
  require_same(describe(params, hashes=False), describe(template, hashes=False), what)


def require_same(there: Index, here: Index, what: str, limit: int = 6) -> None:
  """`require_like` on descriptions."""
  kind = lambda entry: f"{entry['dtype']}{entry['shape']}"  # noqa: E731
  groups = [
      [f"{n} is {kind(there[n])} there, {kind(here[n])} here" for n in here
       if n in there and kind(there[n]) != kind(here[n])],
      [f"{n} {kind(there[n])} is only there" for n in there if n not in here],
      [f"{n} {kind(here[n])} is only here" for n in here if n not in there]]
  if not any(groups):
    return
  parts = [part for group in groups for part in
           group[:limit] + ([f"{len(group) - limit} more such"] if len(group) > limit else [])]
  raise UsageError(f"{what} is of another architecture: {'; '.join(parts)}")


def save_params(path, params: Params, meta: dict) -> None:
  """Writes a network as safetensors with its meta and a checksum over both; whole or not at all.

  Args:
    params: nested dicts of arrays.
    meta: what JSON can hold.

  Raises:
    UsageError: not writable. RunError: no space.
  """
  flat = flatten(params)
  if jax.tree.structure(unflatten(flat)) != jax.tree.structure(params):
    raise ValueError("params must be nested dicts without '/' in the keys and without empty dicts")
  header = {"meta": json.dumps(meta, sort_keys=True), "sha256": _seal(describe(params), meta)}
  # asarray, since ascontiguousarray turns a scalar into a vector.
  arrays = {name: np.asarray(to_host(leaf), order="C") for name, leaf in flat.items()}
  write_bytes(path, safetensors.numpy.save(arrays, header))


def load_params(path) -> tuple[Params, dict]:
  """Reads what `save_params` wrote: (nested dicts of arrays on the default device, meta).

  Raises:
    UsageError: absent, damaged, or not written by `save_params`.
  """
  path = pathlib.Path(path)
  try:
    path.open("rb").close()
    with safetensors.safe_open(str(path), framework="numpy") as f:
      header = f.metadata() or {}
      flat = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
  except OSError as e:
    raise UsageError(f"cannot read {path}: {e.strerror or e}") from e
  except safetensors.SafetensorError as e:
    raise UsageError(f"{path} is damaged or no safetensors file: {e}") from e
  try:
    meta, expected = json.loads(header["meta"]), header["sha256"]
  except (KeyError, ValueError) as e:
    raise UsageError(f"{path} has no readable meta and checksum: it is damaged, or not of ddil") from e
  if _seal(describe(flat), meta) != expected:
    raise UsageError(f"{path} is damaged: its content does not have the checksum in its header")
  return jax.tree.map(jnp.array, unflatten(flat)), meta


def _seal(index: Index, meta: dict) -> str:
  return digest({"arrays": index, "meta": json.loads(json.dumps(meta))})


def to_host(leaf) -> np.ndarray:
  """All of an array on the host; random keys as their bits."""
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    if not leaf.is_fully_replicated:
      return multihost_utils.process_allgather(leaf, tiled=True)
    leaf = leaf.addressable_data(0)
  return np.asarray(leaf)


def _bytes(leaf) -> np.ndarray:
  return np.asarray(to_host(leaf), order="C").reshape(-1).view(np.uint8)
