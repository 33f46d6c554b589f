"""Every file of the golden-vector folder, in float64 and in float32, through the public functions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracle import cases
from tests.oracle.harness import SAMPLE, Case, folder, wanted_folder

FOLDER = folder()
# Methods of the wider family have a folder of their own.
FILES = sorted(FOLDER.glob("*.npz")) + sorted((FOLDER / "family").glob("*.npz"))


def test_the_folder_has_files(capsys):
  """An empty folder is an error; where there is none, the committed sample runs and says so."""
  assert FILES, f"no golden vectors in {FOLDER}: set DDIL_ORACLE_DIR to their folder"
  if FOLDER == SAMPLE:
    with capsys.disabled():
      print(f"\nno golden vectors at {wanted_folder()} (DDIL_ORACLE_DIR): running the {len(FILES)} files of the sample")


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_absent_gives_the_sample(there, tmp_path, monkeypatch):
  named = tmp_path if there else tmp_path / "absent"
  monkeypatch.setenv("DDIL_ORACLE_DIR", str(named))
  assert folder() == (named if there else SAMPLE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file(path):
  runner, reason = cases.find(path.stem)
  if runner is None:
    pytest.skip(f"not covered yet: {path.stem} ({reason})")
  failures = []
  for dtype in (jnp.float64, jnp.float32):
    with jax.enable_x64(dtype == jnp.float64):
      case = Case(path, dtype)
      runner(case)
    failures += [f"{jnp.dtype(dtype).name} {failure}" for failure in case.finish()]
  assert not failures, "\n".join([path.stem, *failures])


@pytest.mark.parametrize("name, said", [("gan_0_n4", "0 modules"), ("ddimension", "0 modules"),
                                        ("both_1", "2 modules")])
def test_a_kind_of_file_that_is_unknown_or_claimed_twice_fails(name, said, monkeypatch):
  monkeypatch.setattr(cases, "CLAIMS", [*cases.CLAIMS, (r"both_\d", test_file, None), (r"both_.*", None, "a reason")])
  with pytest.raises(AssertionError, match=f"{said} know this kind of file"):
    cases.find(name)


def test_every_kind_of_the_sample_is_known():
  assert all(cases.find(path.stem)[0] for path in SAMPLE.glob("*.npz"))


@pytest.fixture
def made(tmp_path):
  """A case with two outputs and a float32 figure for one of them."""
  meta = {"hyper": {}, "f32_vs_f64_scaled_max_err": {"grad": 1e-3}}
  np.savez(tmp_path / "made.npz", **{"out/x": np.array([1.0, 4.0]), "out/grad/W": np.array([2.0]),
                                     "out/t": np.array([3, 1]), "meta": json.dumps(meta)})
  return lambda dtype: Case(tmp_path / "made.npz", dtype)


def test_outputs_that_nobody_mentions_fail(made):
  case = made(jnp.float32)
  case.check("x", jnp.array([1.0, 4.0]))
  case.leave("t", "a reason")
  assert case.finish() == ["out/grad/W: neither compared nor left out"]


@pytest.mark.parametrize("name, value, said", [
    ("x", np.array([1.0, 4.0 + 1e-7]), "scaled error"),  # beyond float64's 1e-9
    ("x", np.array([1.0, np.nan]), "scaled error inf"),
    ("x", np.array([1.0]), "shape"),
    ("t", np.array([3, 2]), "expected"),
])
def test_wrong_values_fail(made, name, value, said):
  case = made(np.float64)
  case.check(name, value)
  assert len(case.failures) == 1 and said in case.failures[0]


def test_float32_allows_ten_times_the_files_own_figure(made):
  for error, failures in ((9e-3, 0), (11e-3, 1)):
    case = made(jnp.float32)
    case.check("grad/W", jnp.array([2.0 * (1 + error)]))
    assert len(case.failures) == failures


def test_a_value_of_the_wrong_type_fails(made):
  with jax.enable_x64(True):
    case = made(jnp.float64)
    case.check("x", jnp.array([1.0, 4.0], jnp.float32))
  assert "computed in float32 in the float64 run" in case.failures[0]
