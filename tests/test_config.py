"""Config files and overrides: types are kept, mistakes are named."""

import json

import pytest
from ml_collections import ConfigDict

from ddil_jax import config as config_lib
from ddil_jax.errors import UsageError
from ddil_jax.training import workdir

PD = "configs/digits_pd.py"


def make():
  return ConfigDict(dict(seed=0, rate=0.5, name="adam", flip=False, sizes=(1, 2), scales=(), names=("fd", "kd"),
                         states=dict(forward=1.0, capacity=64), inner=dict(deep=dict(x=1))))


@pytest.mark.parametrize("field, text, value", [
    ("seed", "7", 7), ("seed", "1e3", 1000), ("seed", "-2", -2), ("rate", "3", 3.0), ("rate", "1e-4", 1e-4),
    ("name", "7", "7"), ("name", "", ""), ("name", "a=b", "a=b"), ("flip", "true", True), ("flip", "False", False),
    ("sizes", "(3,)", (3,)), ("sizes", "[3, 4]", (3, 4)), ("sizes", "3", (3,)), ("sizes", "()", ()),
    ("sizes", "(2.0, 1)", (2, 1)), ("scales", "(1, 2.5)", (1, 2.5)), ("names", "('fd',)", ("fd",)),
    ("states.forward", "0", 0.0), ("states.forward", "('linear', 0.0, 1.0, 0.5)", ("linear", 0.0, 1.0, 0.5)),
    ("inner.deep.x", "5", 5)])
def test_override(field, text, value):
  config = make()
  config_lib.override(config, field, text)
  found = config_lib.flatten(config)[field]
  assert found == value and type(found) is type(value)
  changed = {f for f, v in config_lib.flatten(make()).items() if config_lib.flatten(config)[f] != v}
  assert changed <= {field}


@pytest.mark.parametrize("field, text, words", [
    ("seed", "x", ["config.seed=x", "int", "such as 0", "not str"]), ("seed", "1.5", ["int", "not float"]),
    ("seed", "True", ["int", "not bool"]), ("rate", "True", ["float", "not bool"]), ("rate", "(1,)", ["float"]),
    ("rate", "('linear', 0.0, 1.0, 0.5)", ["float", "not tuple"]), ("flip", "1", ["bool"]),
    ("sizes", "(1.5,)", ["whole numbers", "1.5"]), ("sizes", "('a',)", ["'a'"]), ("sizes", "abc", ["tuple"]),
    ("sizes", "(True,)", ["True"]), ("scales", "('a',)", ["numbers", "'a'"]), ("names", "(1,)", ["texts"]),
    ("states.forward", "('linear', 'a')", ["schedule"]), ("states.forward", "(0.5,)", ["schedule"]),
    ("states", "1", ["group", "capacity, forward"]), ("sead", "1", ["'sead'", "did you mean seed"]),
    ("inner.deep.y", "1", ["config.inner.deep", "'y'", "x"]), ("seed.x", "1", ["single value"]),
    ("", "1", ["unknown field"]), ("seed.", "1", ["single value"])])
def test_refused(field, text, words):
  config = make()
  with pytest.raises(UsageError) as error:
    config_lib.override(config, field, text)
  assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)
  assert config_lib.flatten(config) == config_lib.flatten(make())


def test_a_schedule_can_become_a_number_again():
  config = config_lib.load(PD, {"states.student": "('linear', 0.0, 0.4, 0.5)"})
  config_lib.override(config, "states.student", "0.25")
  assert config.states.student == 0.25


def test_files_are_found_by_path_and_by_name(tmp_path, monkeypatch):
  here = tmp_path / "mine.py"
  here.write_text("from ml_collections import ConfigDict\n\n\n"
                  "def get_config(arg):\n  return ConfigDict(dict(arg=arg or ''))\n")
  assert config_lib.load(f"{here}:a,b").arg == "a,b"
  monkeypatch.chdir(tmp_path)
  assert config_lib.load("mine.py").arg == ""
  for spec in (PD, "digits_pd.py"):
    assert config_lib.load(spec).objective.name == "pd"
  for spec in ("digits_pd", "no.py", "mine", "."):
    with pytest.raises(UsageError, match="unknown config file"):
      config_lib.load(spec)


def test_a_loaded_config_is_locked():
  config = config_lib.load(PD)
  with pytest.raises((KeyError, AttributeError)):
    config.train.stepz = 3


@pytest.mark.parametrize("name", config_lib.available())
def test_saved_and_read_again(name):
  """As `config.json` has it: nothing differs, so a second run resumes; and each field takes its own text."""
  config = config_lib.load(f"configs/{name}.py")
  plain = config_lib.to_dict(config)
  again = config_lib.from_dict(json.loads(json.dumps(plain)))
  assert config_lib.flatten(again) == config_lib.flatten(config)
  assert not workdir.differences(plain, config_lib.to_dict(again))
  for field, value in config_lib.flatten(config).items():
    config_lib.override(again, field, value if isinstance(value, str) else repr(value))
  assert config_lib.flatten(again) == config_lib.flatten(config)
