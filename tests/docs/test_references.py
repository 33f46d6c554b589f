"""What the pages name exists: functions, tests, files, config fields."""

import ast
import pathlib
import re

import pytest

from ddil_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
# Files that the worked example adds.
MADE_ON_THE_PAGE = {"objectives/kd.py", "ddil_jax/objectives/kd.py", "configs/digits_kd.py"}


def locate(path: str) -> pathlib.Path | None:
  """A file or folder, from the root of the repository or from the package."""
  return next((base / path for base in (ROOT, ROOT / "ddil_jax") if (base / path).exists()), None)


def names_of(path: pathlib.Path) -> set[str]:
  """Top-level functions, classes and variables of a module."""
  names = set()
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      names.add(node.name)
    elif isinstance(node, ast.Assign):
      names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
  return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_functions_and_files_exist(page):
  text, missing = page.read_text(), []
  for path, name in re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", text):
    found = locate(path)
    # A bare file name, `lcm.py`, continues a path before it.
    found = found or next(iter((ROOT / "ddil_jax").rglob(path)), None)
    if path not in MADE_ON_THE_PAGE and (found is None or (name and name not in names_of(found))):
      missing.append(f"{path}::{name}")
  for link in re.findall(r"\]\(([\w/.]+\.md)", text):
    if not (page.parent / link).exists():
      missing.append(link)
  assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_config_fields_exist(page):
  """`--config.a.b=` on a command line, and fields of the common groups in the text."""
  fields = set()
  for name in config_lib.available():
    fields |= set(config_lib.flatten(config_lib.load(f"configs/{name}.py")))
  groups = {field.split(".")[0] for field in fields if "." in field}
  text = page.read_text()
  named = re.findall(r"--config\.([a-z_.]+)=", text)
  named += [f for f in re.findall(r"`([a-z_]+\.[a-z_]+)`", text) if f.split(".")[0] in groups and f[-3:] != ".py"]
  assert not [field for field in named if field not in fields]
