"""A network alone in a file, its names and its hash."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax.errors import UsageError
from ddil_jax.training import params as params_lib
from ddil_jax.training.params import hash_params, load_params, require_like, save_params


def network(seed=0, width=4):
  key = jax.random.key(seed)
  conv = {"kernel": jax.random.normal(key, (3, 3, 1, width)), "bias": jnp.zeros(width, jnp.bfloat16)}
  return {"Conv_0": conv,
          "scale": jnp.float32(seed), "nothing": jnp.zeros((0, 3)), "count": jnp.int32(7)}


def same(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
      x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
      for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_round_trip(tmp_path):
  meta = {"step": 3, "grid": (1, 2), "note": "ä", "nan": float("inf")}
  save_params(tmp_path / "net.safetensors", network(), meta)
  back, read = load_params(tmp_path / "net.safetensors")
  assert same(back, network())
  assert read == {**meta, "grid": [1, 2]}
  assert jax.tree.leaves(jax.jit(lambda p: p, donate_argnums=0)(back))[0].shape == (4,)
  assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_readable_by_safetensors_under_flat_names(tmp_path):
  import safetensors.flax
  save_params(tmp_path / "net.safetensors", network(), {})
  flat = safetensors.flax.load_file(tmp_path / "net.safetensors")
  assert sorted(flat) == ["Conv_0/bias", "Conv_0/kernel", "count", "nothing", "scale"]
  np.testing.assert_array_equal(flat["Conv_0/kernel"], network()["Conv_0"]["kernel"])


def test_every_flipped_byte_is_noticed(tmp_path):
  path = tmp_path / "net.safetensors"
  save_params(path, network(), {"step": 3})
  data = path.read_bytes()
  for at in range(len(data)):
    if data[at] in b" \n":
      continue  # padding of the header
    path.write_bytes(data[:at] + bytes([data[at] ^ 0x04]) + data[at + 1:])
    with pytest.raises(UsageError, match="net.safetensors (is damaged|has no readable meta)"):
      load_params(path)
  for size in (0, 4, len(data) // 2, len(data) - 1):
    path.write_bytes(data[:size])
    with pytest.raises(UsageError, match="is damaged or no safetensors file"):
      load_params(path)
  path.write_bytes(data)
  assert load_params(path)[1] == {"step": 3}


def test_what_is_no_network(tmp_path):
  with pytest.raises(UsageError, match="cannot read .*absent: No such file"):
    load_params(tmp_path / "absent")
  with pytest.raises(UsageError, match="cannot read .*: Is a directory"):
    load_params(tmp_path)
  import safetensors.numpy
  safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "foreign.safetensors")
  with pytest.raises(UsageError, match="no readable meta and checksum"):
    load_params(tmp_path / "foreign.safetensors")
  for odd in ({"a": (jnp.zeros(1),)}, {"a/b": jnp.zeros(1)}, {"a": jnp.zeros(1), "b": {}}):
    with pytest.raises(ValueError, match="nested dicts"):
      save_params(tmp_path / "x", odd, {})
  with pytest.raises(ValueError, match="same name"):
    params_lib.flatten({"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}})


def test_hash_is_of_names_types_shapes_and_bits():
  base = hash_params(network())
  assert base == hash_params(dict(reversed(network().items())))
  assert base == hash_params(jax.tree.map(np.asarray, network()))
  others = [network(1), {**network(), "count": jnp.uint32(7)}, {**network(), "count": jnp.int32([7])},
            {**network(), "scale": -network()["scale"]},  # 0.0 and -0.0 are other bits
            {("x" if k == "count" else k): v for k, v in network().items()}]
  assert len({base, *map(hash_params, others)}) == 1 + len(others)


def test_require_like():
  require_like(network(1), jax.eval_shape(network), "teacher runs/t")
  many = {f"layer_{i}": jnp.zeros(2) for i in range(9)}
  with pytest.raises(UsageError) as e:
    require_like({**network(width=8), **many}, jax.eval_shape(lambda: {**network(), "extra": jnp.zeros(1)}),
                 "teacher runs/t")
  assert str(e.value) == (
      "teacher runs/t is of another architecture: Conv_0/bias is bfloat16[8] there, bfloat16[4] here; "
      "Conv_0/kernel is float32[3, 3, 1, 8] there, float32[3, 3, 1, 4] here; "
      + "; ".join(f"layer_{i} float32[2] is only there" for i in range(6))
      + "; 3 more such; extra float32[1] is only here")
