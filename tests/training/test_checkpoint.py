"""Checkpoints: what is restored is what was saved, bit for bit, or it is said that it is not."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddil_jax.errors import RunError, UsageError
from ddil_jax.training.checkpoint import Checkpoints, load_any
from ddil_jax.training.params import save_params
from ddil_jax.training.step import TrainState

ROOT = pathlib.Path(__file__).parents[2]
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def make_state(step: int, width: int = 12) -> TrainState:
  """Two players, optimizer states, averages and a buffer, all of them functions of `step`."""
  keys = jax.random.split(jax.random.key(step), 3)
  net = lambda key: {"Conv_0": {"kernel": jax.random.normal(key, (3, 3, 1, width)),  # noqa: E731
                                "bias": jnp.full((width,), step, jnp.bfloat16)}}
  nets = {"student": net(keys[0]), "critic": net(keys[1])}
  copy = jax.tree.map(jnp.array, nets["student"])
  buffer = {"x_t": jax.random.normal(keys[2], (16, 4, 4, 1)), "count": jnp.int32(step), "empty": ()}
  return TrainState(jnp.int32(step), nets, {name: OPTIMIZER.init(net) for name, net in nets.items()},
                    {"0.99": copy}, {"student": buffer}, jnp.zeros((), jnp.int32))


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save_steps(directory, *steps, **options):
  with Checkpoints(directory, **options) as checkpoints:
    for step in steps:
      assert checkpoints.save(step, make_state(step), {"position": step})


def files_of(folder):
  return sorted(p for p in folder.rglob("*") if p.is_file())


def flip(path, at: int):
  data = bytearray(path.read_bytes())
  data[at] ^= 0x10
  path.write_bytes(data)


@pytest.fixture
def warnings():
  return []


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip(tmp_path, asynchronous):
  save_steps(tmp_path / "c", 1, 2, asynchronous=asynchronous)
  with Checkpoints(tmp_path / "c") as checkpoints:
    assert checkpoints.steps() == [1, 2] and checkpoints.latest() == 2
    state, meta, step = checkpoints.restore(make_state(0))
    assert_same(state, make_state(2))
    assert (meta, step) == ({"position": 2}, 2)
    shapes = jax.eval_shape(lambda: make_state(0))
    state, meta, step = checkpoints.restore(shapes, step=1)
    assert_same(state, make_state(1))
    assert (meta, step) == ({"position": 1}, 1)
    with pytest.raises(UsageError, match="no checkpoint 7 .* there are: 1, 2"):
      checkpoints.restore(shapes, step=7)


def test_nothing_there(tmp_path):
  with Checkpoints(tmp_path / "c") as checkpoints:
    assert checkpoints.restore(make_state(0)) is None
    assert checkpoints.steps() == [] and checkpoints.latest() is None
  with Checkpoints(tmp_path / "absent", read_only=True) as checkpoints:
    assert checkpoints.restore(make_state(0)) is None
    assert not (tmp_path / "absent").exists()


def test_state_may_be_donated_once_save_returns(tmp_path):
  """Megabytes, so that writing is still going on while the donated buffers are written over."""
  size, count = 1 << 20, 8
  fresh = lambda: {str(i): jnp.arange(size, dtype=jnp.float32) + i for i in range(count)}  # noqa: E731
  overwrite = jax.jit(lambda tree: jax.tree.map(lambda v: v * 0 - 7, tree), donate_argnums=0)
  with Checkpoints(tmp_path) as checkpoints:
    state = fresh()
    checkpoints.save(1, state, {})
    for _ in range(3):
      state = jax.block_until_ready(overwrite(state))
    restored, _, _ = checkpoints.restore(fresh())
    assert_same(restored, fresh())


def test_restored_state_goes_on_like_the_saved_one(tmp_path):
  """Donated too: three more steps from the restored state equal three more from the original, bit for bit."""
  @jax.jit
  def loss(net, x):
    return jnp.mean((x @ net["Conv_0"]["kernel"].reshape(9, -1)) ** 2)

  def step(state, x):
    grads = jax.grad(loss)(state.params["student"], x)
    updates, opt = OPTIMIZER.update(grads, state.opt["student"], state.params["student"])
    net = optax.apply_updates(state.params["student"], updates)
    return state._replace(step=state.step + 1, params=state.params | {"student": net},
                          opt=state.opt | {"student": opt})

  run = jax.jit(step, donate_argnums=0)
  x = jax.random.normal(jax.random.key(5), (4, 9))
  state = run(make_state(1), x)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, state, {})
    other, _, _ = checkpoints.restore(jax.eval_shape(lambda: make_state(0)))
    for _ in range(3):
      state, other = run(state, x), run(other, x)
    assert_same(other, state)
    again, _, _ = checkpoints.restore(make_state(0))
    assert int(again.step) == 2


def test_sharded_state_restores_on_other_layouts(tmp_path):
  mesh = Mesh(np.array(jax.devices()), ("data",))
  split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
  place = lambda state: jax.tree.map(  # noqa: E731
      lambda v: jax.device_put(v, split if v.shape[:1] == (16,) else whole), state)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, place(make_state(3)), {})
    plain, _, _ = checkpoints.restore(make_state(0))
    assert_same(plain, make_state(3))
    assert plain.dist["student"]["x_t"].devices() == {jax.devices()[0]}
    spread, _, _ = checkpoints.restore(place(make_state(0)))
    assert_same(spread, make_state(3))
    assert spread.dist["student"]["x_t"].sharding == split


def test_random_keys_round_trip(tmp_path):
  tree = {"key": jax.random.key(3), "keys": jax.random.split(jax.random.key(4), 5)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, tree, {})
    back, _, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, tree))
  assert_same(jax.tree.map(jax.random.key_data, back), jax.tree.map(jax.random.key_data, tree))
  assert back["key"].dtype == tree["key"].dtype


def test_keeps_the_newest_and_the_best(tmp_path):
  values = {1: 5.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: 3.0, 6: None}
  def fill(directory, **options):
    with Checkpoints(directory, keep=2, best_metric="fd", **options) as checkpoints:
      for step, value in values.items():
        checkpoints.save(step, make_state(step), {}, {} if value is None else {"fd": value, "other": 0})
      checkpoints.wait()
      return checkpoints.steps(), checkpoints.best()
  assert fill(tmp_path / "none")[0] == [5, 6]
  assert fill(tmp_path / "min", keep_best=1) == ([2, 5, 6], 2)
  assert fill(tmp_path / "max", keep_best=2, best_mode="max") == ([1, 5, 6], 1)
  with Checkpoints(tmp_path / "min", keep_best=1, best_metric="fd") as again:  # read back from disk
    assert again.best() == 2
    assert_same(again.restore(make_state(0), again.best())[0], make_state(2))


def test_a_flipped_byte_in_any_file_is_noticed(tmp_path, warnings):
  save_steps(tmp_path / "c", 10, 20)
  newest = tmp_path / "c" / "20"
  assert len(files_of(newest)) > 5
  for path in files_of(newest):
    size = path.stat().st_size
    for at in {0, size // 2, size - 1}:
      warnings.clear()
      flip(path, at)
      with Checkpoints(tmp_path / "c", read_only=True, warn=warnings.append) as checkpoints:
        state, meta, step = checkpoints.restore(make_state(0))
      flip(path, at)
      assert (meta, step) == ({"position": 10}, 10)
      assert_same(state, make_state(10))
      assert len(warnings) == 1 and "\n" not in warnings[0]
      assert warnings[0].startswith(f"checkpoint {newest} is damaged ({path.relative_to(newest).as_posix()} ")
      assert warnings[0].endswith("): falling back to 10")
  with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
    assert checkpoints.restore(make_state(0))[2] == 20


@pytest.mark.parametrize("damage", ["truncate", "no state", "no record.json", "bare folder", "foreign"])
def test_falls_back(tmp_path, warnings, damage):
  save_steps(tmp_path, 10, 20)
  newest = tmp_path / "20"
  if damage == "truncate":
    for path in files_of(newest / "state"):
      os.truncate(path, path.stat().st_size // 2)
  elif damage == "no state":
    shutil.rmtree(newest / "state")
  elif damage == "no record.json":
    (newest / "record.json").unlink()
  else:
    shutil.rmtree(newest)
    newest.mkdir()
    if damage == "foreign":
      (newest / "notes.txt").write_text("not a checkpoint")
  with Checkpoints(tmp_path, warn=warnings.append) as checkpoints:
    state, _, step = checkpoints.restore(make_state(0))
    assert step == 10
    assert_same(state, make_state(10))
    assert warnings[0].startswith(f"checkpoint {newest} is damaged (") and "falling back to 10" in warnings[0]
    with pytest.raises(UsageError, match="20 is damaged .*; others: 10"):
      checkpoints.restore(make_state(0), step=20)
    # The continued run comes to step 20 again: the damaged one makes way, and is kept.
    assert checkpoints.save(20, make_state(20), {"position": 20})
    assert checkpoints.restore(make_state(0))[2] == 20
    assert checkpoints.steps() == [10, 20]
  assert (tmp_path / "20.damaged").is_dir()
  assert "kept as 20.damaged" in warnings[-1]


def test_damaged_ones_do_not_push_out_good_ones(tmp_path, warnings):
  save_steps(tmp_path, 10, 20)
  shutil.rmtree(tmp_path / "20" / "state")
  with Checkpoints(tmp_path, keep=2, warn=warnings.append) as checkpoints:
    assert checkpoints.restore(make_state(0))[2] == 10
    checkpoints.save(15, make_state(15), {})
  assert Checkpoints(tmp_path, read_only=True).steps() == [10, 15]


def test_all_damaged_is_an_error(tmp_path, warnings):
  save_steps(tmp_path, 10, 20)
  for step in ("10", "20"):
    shutil.rmtree(tmp_path / step / "state")
  with Checkpoints(tmp_path, warn=warnings.append) as checkpoints:
    with pytest.raises(RunError, match="10 is damaged .* and so is every newer one"):
      checkpoints.restore(make_state(0))
  assert "20 is damaged" in warnings[0]
  assert (tmp_path / "10").is_dir() and (tmp_path / "20").is_dir()


def test_another_architecture_lists_the_parameters(tmp_path):
  save_steps(tmp_path, 10)
  wider = make_state(0, width=16)
  other = make_state(0)
  other.params["head"] = {"scale": jnp.ones(3)}
  del other.params["critic"]
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UsageError) as e:
      checkpoints.restore(wider)
    assert ("params/student/Conv_0/kernel is float32[3, 3, 1, 12] there, float32[3, 3, 1, 16] here"
            in str(e.value)) and "\n" not in str(e.value)
    with pytest.raises(UsageError) as e:
      checkpoints.restore(other)
    assert "params/critic/Conv_0/bias bfloat16[12] is only there" in str(e.value)
    assert "params/head/scale float32[3] is only here" in str(e.value)


def test_saving_a_step_again(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.save(5, make_state(5), {}) is True
    assert checkpoints.save(5, make_state(5), {}) is False
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(RunError, match="5 exists and is not of this run"):
      checkpoints.save(5, make_state(6), {})
    state, _, _ = checkpoints.restore(make_state(0))
    assert checkpoints.save(5, state, {}) is False  # a run that is at its end already
    assert_same(state, make_state(5))


def test_options_and_places(tmp_path):
  with pytest.raises(UsageError, match="keep must be at least 1"):
    Checkpoints(tmp_path / "c", keep=0)
  with pytest.raises(UsageError, match="needs best_metric"):
    Checkpoints(tmp_path / "c", keep_best=1)
  with pytest.raises(UsageError, match="unknown best_mode 'mim'; did you mean min"):
    Checkpoints(tmp_path / "c", best_mode="mim")
  (tmp_path / "file").write_text("")
  with pytest.raises(UsageError, match="cannot write .*/file/c: Not a directory"):
    Checkpoints(tmp_path / "file" / "c")
  with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
    with pytest.raises(ValueError, match="read-only"):
      checkpoints.save(1, make_state(1), {})


def test_a_reader_leaves_the_writers_files_alone(tmp_path):
  save_steps(tmp_path, 10)
  unfinished = tmp_path / "20.partial.orbax-checkpoint-tmp"
  unfinished.mkdir()
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.restore(make_state(0))[2] == 10
    assert unfinished.exists()
  Checkpoints(tmp_path).close()
  assert not unfinished.exists()


def mount_small_disk(folder, size: str):
  folder.mkdir(exist_ok=True)
  done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
                        capture_output=True)
  if done.returncode:
    pytest.skip("mounting a small disk is not permitted here")


def test_full_disk(tmp_path):
  """A real full disk: one line, the older checkpoint intact; with more space the same call succeeds."""
  disk = tmp_path / "disk"
  mount_small_disk(disk, "500k")
  try:
    with Checkpoints(disk / "c", keep=99) as checkpoints:
      saved = []
      with pytest.raises(RunError) as e:
        for step in range(1, 30):
          checkpoints.save(step, make_state(step), {})
          checkpoints.wait()
          saved.append(step)
      assert saved
      assert str(e.value) == (
          f"cannot write checkpoint {saved[-1] + 1} in {disk / 'c'}: No space left on device; "
          f"free space and run the same command again: it resumes from step {saved[-1]}")
    with Checkpoints(disk / "c", keep=99) as checkpoints:
      assert checkpoints.steps() == saved
      assert_same(checkpoints.restore(make_state(0))[0], make_state(saved[-1]))
      subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
      assert checkpoints.save(saved[-1] + 1, make_state(90), {})
      assert_same(checkpoints.restore(make_state(0))[0], make_state(90))
  finally:
    subprocess.run(["umount", str(disk)], check=True)


def start(script: str, *arguments) -> subprocess.Popen:
  """A process of its own, with what this file has at hand."""
  prelude = "from tests.training.test_checkpoint import *\n"
  return subprocess.Popen([sys.executable, "-c", prelude + textwrap.dedent(script), *map(str, arguments)],
                          cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_write_that_fails_in_the_background(tmp_path):
  """The kernel refuses files over 64 kB, so Orbax's own thread fails: `wait` and `close` say so."""
  process = start("""
      import resource
      checkpoints = Checkpoints(sys.argv[1])
      checkpoints.save(1, make_state(1), {})
      checkpoints.wait()
      resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
      checkpoints.save(2, make_state(2, width=4096), {})
      try:
        checkpoints.wait()
      except RunError as e:
        print(e)
      checkpoints.close()
      with Checkpoints(sys.argv[1]) as checkpoints:
        print(checkpoints.steps(), os.listdir(sys.argv[1]))
        try:
          with Checkpoints(sys.argv[1]) as inner:
            inner.save(3, make_state(3, width=4096), {})
        except RunError as e:
          print("on leaving:", e)
      """, tmp_path)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  line = (f"in {tmp_path}: File too large; free space and run the same command again: it resumes from step 1")
  assert out.splitlines() == [f"cannot write checkpoint 2 {line}", "[1] ['1']",
                              f"on leaving: cannot write checkpoint 3 {line}"]
  with Checkpoints(tmp_path) as checkpoints:
    assert_same(checkpoints.restore(make_state(0))[0], make_state(1))


def filled(step: int) -> dict:
  """A state that costs nothing to make, so that the time goes into saving it."""
  return {str(i): jnp.asarray(np.random.default_rng([step, i]).random(20_000, np.float32)) for i in range(4)}


def test_killed_in_the_middle_of_saving(tmp_path):
  """kill -9 at three different moments of a loop that does nothing but save: always a whole checkpoint."""
  script = """
      with Checkpoints(sys.argv[1]) as checkpoints:
        for step in range(1, 10**6):
          checkpoints.save(step, filled(step), {"position": step})
          print(step, flush=True)  # the one before is on disk
      """
  processes = [start(script, tmp_path / str(i)) for i in range(3)]
  for i, process in enumerate(processes):
    for _ in range(3):
      last = int(process.stdout.readline())
    time.sleep(0.013 * (i + 1))
    process.send_signal(signal.SIGKILL)
    last = int((process.stdout.read().split() or [last])[-1])
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    warnings = []
    with Checkpoints(tmp_path / str(i), warn=warnings.append) as checkpoints:
      state, meta, step = checkpoints.restore(filled(0))
      assert step in (last - 1, last, last + 1)
      assert_same(state, filled(step))
      assert meta == {"position": step}
      assert not warnings
      assert checkpoints.save(step + 1, filled(step + 1), {})
    assert all(name.isdecimal() for name in os.listdir(tmp_path / str(i)))


def test_load_any(tmp_path):
  run = tmp_path / "run"
  save_steps(run / "checkpoints", 10, 20)
  network = {"Conv_0": make_state(20).ema["0.99"]["Conv_0"]}
  loaded = load_any(run)
  assert_same(loaded.params, network)  # the only average
  assert loaded.meta == {"position": 20}
  assert loaded.origin == f"{run / 'checkpoints' / '20'} ema/0.99"
  assert_same(load_any(run / "checkpoints").params, network)
  assert_same(load_any(run, "params/critic").params, make_state(20).params["critic"])
  assert_same(load_any(run / "checkpoints" / "10", "params/student").params,
              make_state(10).params["student"])
  save_params(tmp_path / "net.safetensors", loaded.params, {"a": 1})
  assert_same(load_any(tmp_path / "net.safetensors").params, network)

  with pytest.raises(UsageError, match="unknown network of the checkpoint 'ema/0.9'; did you mean ema/0.99"):
    load_any(run, "ema/0.9")
  with pytest.raises(UsageError, match="no file or folder"):
    load_any(tmp_path / "absent")
  with pytest.raises(UsageError, match="holds no checkpoint"):
    load_any(tmp_path)
  shutil.rmtree(run / "checkpoints" / "10" / "state")
  with pytest.raises(UsageError, match="10 is damaged .*; others: 20"):
    load_any(run / "checkpoints" / "10")


def test_load_any_chooses_by_the_meta(tmp_path):
  state = make_state(1)
  state.ema["0.9"] = make_state(2).params["student"]
  with Checkpoints(tmp_path / "a") as a, Checkpoints(tmp_path / "b") as b, Checkpoints(tmp_path / "c") as c:
    a.save(1, state, {})
    b.save(1, state, {"weights": "ema/0.9"})
    c.save(1, state._replace(ema={}), {})
  with pytest.raises(UsageError, match="several averages; name one of: .*ema/0.9, ema/0.99"):
    load_any(tmp_path / "a")
  assert_same(load_any(tmp_path / "b").params, state.ema["0.9"])
  assert_same(load_any(tmp_path / "c").params, state.params["student"])
