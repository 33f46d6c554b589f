"""The cache of compiled programs: where it lies, that it is used, and what is said of it."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ddil_jax.errors import UsageError
from ddil_jax.training import compiling

FIELDS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
          "jax_persistent_cache_min_entry_size_bytes")


@pytest.fixture
def no_cache(monkeypatch):
  """JAX without a cache, and as it was afterwards."""
  before = {name: getattr(jax.config, name) for name in FIELDS}
  jax.config.update("jax_compilation_cache_dir", None)
  compilation_cache.reset_cache()
  monkeypatch.delenv(compiling.FOLDER)
  yield monkeypatch
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def test_where_it_lies(no_cache, tmp_path):
  assert compiling.keep_programs("off") == "" and jax.config.jax_compilation_cache_dir is None
  no_cache.setenv(compiling.FOLDER, "off")
  assert compiling.keep_programs() == ""
  assert compiling.keep_programs(str(tmp_path / "a" / "b")) == str(tmp_path / "a" / "b")  # what is given goes before
  assert (tmp_path / "a" / "b").is_dir()
  assert compiling.keep_programs(str(tmp_path / "c")) == str(tmp_path / "a" / "b")  # JAX has one


def test_its_default_is_the_users_cache_folder(no_cache, tmp_path):
  no_cache.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert compiling.keep_programs() == str(tmp_path / "ddil_jax" / "compiled")


def test_no_place_for_it(no_cache, tmp_path):
  file = tmp_path / "file"
  file.touch()
  with pytest.raises(UsageError, match="file/x: Not a directory; give a folder"):
    compiling.keep_programs(str(file / "x"))
  no_cache.setenv("XDG_CACHE_HOME", str(file))
  assert compiling.keep_programs() == ""  # nobody asked for it


def test_a_second_start_takes_its_programs_from_there(no_cache, tmp_path):
  compiling.keep_programs(str(tmp_path))
  for name in FIELDS[1:]:
    jax.config.update(name, 0 if name == FIELDS[1] else -1)  # so small a program is kept too
  x = jnp.arange(3.0)

  def start():  # a function that is new to JAX each time, as in a new process
    with compiling.tally() as found:
      jax.jit(lambda x: jnp.sin(x) * 2 + 5)(x).block_until_ready()
    return found

  first, second = start(), start()
  assert (first.programs, first.cached) == (1, 0) and (second.programs, second.cached) == (1, 1)
  assert first.seconds > 0
  assert "compiling 1 programs" in str(first) and "1 of them from the compile cache" in str(second)
  with compiling.tally() as after:
    pass
  start()
  assert after.programs == 0  # nothing is counted when the block has ended


def test_the_age_of_the_process_grows():
  assert 0 < compiling.process_age() < compiling.process_age() + 0.05 < 1e5


@pytest.mark.parametrize("steps", [(1,), (3, 2), (0, 1), (1.0, 2), (1, 2, 3)])
def test_steps_that_cannot_be_traced(steps):
  with pytest.raises(UsageError, match="config.train.profile_steps"):
    compiling.check_profile_steps(steps)
