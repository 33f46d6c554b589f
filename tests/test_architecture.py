"""The layers: imports go down only; ConfigDict, Mesh and pmap stay where they belong."""

import ast
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "ddil_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in MODULES]
BASE = {"types", "errors", "keys", "registry", "files", "lora"}
ALLOWED = {  # folder -> what it may import of the package, besides BASE and itself
    "diffusion": set(),
    "states": {"diffusion"},
    "objectives": {"states", "diffusion"},
    "training": {"objectives", "states", "diffusion"},
    "models": {"diffusion"},
    "data": {"diffusion"},
    "evaluation": {"diffusion"},
    "interop": {"diffusion", "models"},
}
COMPOSE = {"config.py", "config_checks.py", "sweep.py", "build.py", "samplers.py", "measure.py", "measure_files.py",
           "plan.py", "prepare.py", "prepare_shards.py", "prompting.py", "shift.py", "trained.py", "runs.py", "serve.py",
           "main.py", "__main__.py"}


def imported(path: pathlib.Path) -> set[str]:
  """The parts of the package that a module imports, by first name; imports in functions count too."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: relative import"
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    found |= {name.split(".")[1] for name in names if name.split(".")[0] == "ddil_jax" and "." in name}
  return found


def names(path: pathlib.Path) -> set[str]:
  """Every identifier of a module."""
  tree = ast.parse(path.read_text())
  return ({n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
          | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
          | {a.name for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names})


def test_the_walk_sees_imports():
  assert {"diffusion", "states", "objectives", "training", "models", "data"} <= imported(PACKAGE / "build.py") | \
      imported(PACKAGE / "runs.py")
  assert "Mesh" in names(PACKAGE / "training" / "parallel.py")
  assert {path.parent.name for path in MODULES if path.parent != PACKAGE} == set(ALLOWED)


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_imports_go_down(path):
  folder = path.relative_to(PACKAGE).parts[0]
  if folder in ALLOWED:
    assert imported(path) <= ALLOWED[folder] | BASE | {folder}
  elif folder.removesuffix(".py") in BASE:
    assert imported(path) <= BASE
  else:
    assert folder in COMPOSE | {"__init__.py"}


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_names_stay_where_they_belong(path):
  found, where = names(path), path.relative_to(PACKAGE).as_posix()
  if where not in COMPOSE:
    assert "ConfigDict" not in found and "ml_collections" not in found
  if where != "training/parallel.py":
    assert not found & {"Mesh", "make_mesh", "NamedSharding", "PartitionSpec", "pmap"}
  assert not found & {"NotImplementedError", "NotImplemented", "pickle"}
  called = {n.func.id for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
  assert not called & {"eval", "exec"}


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_documented_and_done(path):
  text = path.read_text()
  assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
  if text.strip() or path.name != "__init__.py":
    assert ast.get_docstring(ast.parse(text)), "a module says in its first line what it is"
