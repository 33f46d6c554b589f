"""What settings are called, from the real configs: fields that differ, and nothing else."""

import itertools

import pytest

from ddil_jax import config as config_lib
from ddil_jax import sweep
from ddil_jax.evaluation import report_labels, report_rows
from launch import study


def row(spec, steps=4, seed=0, scale=1.0, **fields):
  """A row of a run of a real config."""
  overrides = {name.replace("__", "."): str(value) for name, value in (fields | {"seed": seed}).items()}
  config = config_lib.to_dict(config_lib.load(spec, overrides))
  objective, *_ = report_rows.attempted(config)[0]
  raw = {"objective": objective, "variant": variant_of(config), "steps": steps, "seed": seed, "guidance_scale": scale,
         "metrics": {}}
  return report_rows.check(raw, [])._replace(config=report_labels.flatten(config))


def variant_of(config) -> str:
  """What `measure.variant` would say, without building anything."""
  drawn = [name for name in ("forward", "student", "teacher", "dagger") if config["states"][name] not in (0, 0.0)]
  own = "student" if config["objective"]["name"] == "dmd2" else "forward"
  return "+ddil" * (drawn != [own]) + "+reflected" * (config["reflect"]["kind"] != "identity") or "base"


def labels(rows):
  return [r.label for r in report_labels.with_settings(rows)]


LCM, PD = "configs/digits_lcm.py", "configs/digits_pd.py"


def test_a_variant_says_what_it_changes():
  rows = [row(f"{LCM}:{arg}", seed=seed, teacher__path=f"t{seed}", eval__num_samples=500 + seed)
          for arg in ("", "ddil", "reflected", "ddil,reflected") for seed in (0, 1)]
  assert labels(rows) == [v for v in ("base", "+ddil", "+reflected", "+ddil+reflected") for _ in range(2)]


def test_swept_fields_are_named_shortly():
  rows = [row(f"{LCM}:ddil", states__refresh_every=n, train__steps=t) for n in (1, 50) for t in (60, 300)]
  assert labels(rows) == [f"+ddil, refresh_every={n}, train.steps={t}" for n in (1, 50) for t in (60, 300)]
  assert report_labels.with_settings(rows)[1].setting.values == {"states.refresh_every": 1, "train.steps": 300}


def test_fields_that_change_nothing_there_are_not_named():
  base = [row(LCM, states__refresh_every=n, reflect__lo=lo) for n in (1, 50) for lo in (-1.0, -1.1)]
  assert labels(base) == ["base"] * 4
  both = base + [row(f"{LCM}:ddil,reflected", states__refresh_every=n, reflect__lo=lo)
                 for n in (1, 50) for lo in (-1.0, -1.1)]
  assert labels(both)[:5] == ["base"] * 4 + ["+ddil+reflected, lo=-1, refresh_every=1"]


def test_priors_that_differ_within_a_variant_are_named_but_for_zeros():
  priors = [dict(zip(("states__forward", "states__student", "states__teacher"), p))
            for p in ((1., 0., 0.), (0., 1., 0.), (.5, 0., .5), (.5, "('linear', 0.0, 0.5, 1.0)", .25))]
  assert labels([row(LCM, **p) for p in priors]) == [
      "base", "+ddil, student=1", "+ddil, forward=0.5, states.teacher=0.5",
      "+ddil, forward=0.5, student=linear(0, 0.5, 1), states.teacher=0.25"]


def test_fields_count_only_where_rows_are_comparable():
  # Another method, another step count and another guidance scale have configs of their own.
  rows = [row(PD), row(PD, steps=2, objective__num_steps=2), row(f"{PD}:guided", scale=3.0), row(LCM)]
  assert labels(rows) == ["base"] * 4
  rows = [row(PD, train__stages=stages) for stages in ("(4,2)", "(8,4)")] + [row(LCM)]
  assert labels(rows) == ["base, stages=(4, 2)", "base, stages=(8, 4)", "base"]


def test_what_most_settings_have_goes_without_saying_but_for_yes_and_no():
  others = [dict(optimizer__clip=0.5), dict(states__capacity=4096), dict(states__replay=False)]
  rows = [row(f"{LCM}:ddil", seed=seed, **fields) for fields in ({}, *others) for seed in range(2)]
  assert labels(rows)[::2] == ["+ddil, replay=yes", "+ddil, clip=0.5, replay=yes", "+ddil, capacity=4096, replay=yes",
                               "+ddil, replay=no"]
  setting = report_labels.with_settings(rows)[0].setting
  assert setting.unnamed == {"optimizer.clip": "clip=1", "states.capacity": "capacity=1024"}
  # Settings count, not runs: a sweep that has only begun has the labels of the finished one.
  assert labels(rows[:3]) == ["+ddil, clip=1", "+ddil, clip=1", "+ddil, clip=0.5"]


@pytest.mark.parametrize("part", study.PARTS)
def test_every_setting_of_the_study_has_a_label_of_its_own(part):
  rows = []
  for trial in sweep.trials(f"configs/study/{part}.py", {"teacher.path": "teacher"}):
    config = config_lib.to_dict(trial.config())
    flat = report_labels.flatten(config)
    for objective, steps, scale in report_rows.attempted(config):
      raw = dict(objective=objective, variant=variant_of(config), steps=steps, seed=config["seed"], guidance_scale=scale)
      rows.append(report_rows.check(raw, [])._replace(config=flat))
  seen = [(r.group, r.label, r.seed) for r in report_labels.with_settings(rows)]
  assert len(seen) == len(set(seen))


def test_rows_without_config_and_configs_that_lack_a_field():
  old, new = row(LCM), row(LCM, optimizer__clip=0.5)
  del old.config["optimizer.clip"]
  bare = row(LCM)._replace(config={})
  assert labels([old, new, bare]) == ["base", "base, clip=0.5", "base"]


def test_order_is_by_variant_then_size():
  values = (0.5, 10.0, 9.0)
  rows = [row(f"{LCM}:{arg}", optimizer__clip=v) for arg, v in itertools.product(("ddil", ""), values)]
  found = sorted(report_labels.with_settings(rows), key=lambda r: r.setting.order)
  assert [r.label for r in found] == [f"{v}, clip={c}" for v in ("base", "+ddil") for c in ("0.5", "9", "10")]


@pytest.mark.parametrize("value, text", [
    (0.1, "0.1"), (1.0, "1"), (5e-4, "0.0005"), (0.123456789, "0.123456789"), (True, "yes"), ((8, 4), "(8, 4)"),
    ([], "()"), (["cosine", 1.0, 0.0, 0.5], "cosine(1, 0, 0.5)"), ("raw", "raw")])
def test_values_as_text(value, text):
  assert report_labels.text(value) == text
