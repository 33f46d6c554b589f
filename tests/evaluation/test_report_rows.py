"""Reading sweeps: a row for every trial, whatever became of it. Configs are real, numbers made up."""

import json

import pytest

from ddil_jax import config as config_lib
from ddil_jax.evaluation import report, report_rows

FD = "fd@500/train/cnn-1"
WHY = "loss or gradient not finite for 3 steps in a row at step 7"


def write(folder, config, fd=None, steps=(4,), error="", claimed=True):
  """A trial's folder: with results, or with the error that ended it."""
  folder.mkdir(parents=True)
  plain, variant = config_lib.to_dict(config), "+ddil" if config.states.student else "base"
  if claimed:
    (folder / "config.json").write_text(json.dumps(plain))
  if error:
    (folder / report_rows.FAILED).write_text(json.dumps({"error": f"{error}; see {folder}", "config": plain,
                                                          "variant": variant}))
  if fd is not None:
    objective, *_ = report_rows.attempted(plain)[0]
    (folder / "results.json").write_text(json.dumps([
        {"objective": objective, "variant": variant, "steps": n, "seed": config.seed, "guidance_scale": 1.0,
         "metrics": {FD: fd}, "network_evaluations": n, "seconds": 1.0, "samples": "", "shift": []} for n in steps]))


def config(spec, **fields):
  return config_lib.load(spec, {name.replace("__", "."): str(value) for name, value in fields.items()})


@pytest.fixture
def sweep(tmp_path):
  """An interval x seed sweep of LCM: done, diverged before and after its folder was claimed, not yet begun."""
  top = tmp_path / "sweep"
  names = []
  for every in (1, 50):
    for seed in range(3):
      names.append(f"every={every}-seed={seed}")
      one = config("configs/digits_lcm.py:ddil", states__refresh_every=every, seed=seed)
      if (every, seed) == (50, 2):
        continue
      lost = every == 1 and seed < 2
      fd = None if lost else 4 + seed + every / 100
      write(top / names[-1], one, fd, (4, 2), WHY if lost else "", claimed=not lost or seed)
  (top / report_rows.TRIALS).write_text(json.dumps([{"name": n, "spec": "", "overrides": {}} for n in names]))
  return top


def test_a_sweep_has_a_row_for_every_trial_that_began(sweep):
  rows = report.load([sweep])
  assert [(r.label, r.steps, r.seed, r.fate if r.error else r.metrics[FD]) for r in rows] == [
      (f"+ddil, refresh_every={every}", steps, seed, value) for steps in (4, 2) for every, seed, value in (
          (1, 0, "diverged"), (1, 1, "diverged"), (1, 2, 6.01), (50, 0, 4.5), (50, 1, 5.5))]
  found = report.compare([sweep], baseline="refresh_every=50")
  assert [(r["setting"], r["steps"], r["mean"], r["failed"], r["difference"]) for r in found] == [
      ("+ddil, refresh_every=1", 4, 6.01, {"diverged": 2}, None), ("+ddil, refresh_every=50", 4, 5.0, {}, None),
      ("+ddil, refresh_every=1", 2, 6.01, {"diverged": 2}, None), ("+ddil, refresh_every=50", 2, 5.0, {}, None)]
  summary = report.write_report([sweep], sweep / "r.html")
  assert "sweep: 1 of 6 trials have no results yet: every=50-seed=2" in summary["missing"]
  page = (sweep / "r.html").read_text()
  assert page.count("2 seeds diverged [1]") == 2 and f"<li>{WHY}</li>" in page

def test_a_setting_whose_runs_all_failed_keeps_its_training_curve(tmp_path):
  for rate, error in ((1e-3, ""), (1e30, WHY)):
    folder = tmp_path / f"rate={rate:g}"
    write(folder, config("configs/digits_lcm.py", optimizer__learning_rate=rate), None if error else 4.0, (4,), error)
    (folder / "metrics.jsonl").write_text('{"step": 1, "student/loss": 0.5}\n{"step": 2, "student/loss": null}\n')
  report.write_report([tmp_path], tmp_path / "r.html")
  page = (tmp_path / "r.html").read_text()
  curves = page[page.index('id="training"'):]
  assert all(curves.count(f"base, learning_rate={rate}</") == 1 for rate in ("0.001", "1e+30"))


def test_stages_that_ended_before_a_trial_failed_count(tmp_path):
  for seed, error in ((0, ""), (1, "no space")):
    one = config("configs/digits_pd.py", seed=seed)
    top = tmp_path / "sweep" / f"seed={seed}"
    write(top, one, None if error else 5., (4, 2), error)
    for n in (4, 2)[:1 if error else 2]:
      stage = config("configs/digits_pd.py", seed=seed, train__stages=(), objective__num_steps=n)
      write(top / f"stage_{n}", stage, 5. + seed, (n,))
  rows = report.load([tmp_path / "sweep"])
  assert [(r.label, r.steps, r.seed, r.error or r.metrics[FD]) for r in rows] == [
      ("base", 4, 0, 5.), ("base", 4, 1, 6.), ("base", 2, 0, 5.), ("base", 2, 1, "no space")]
  assert rows[-1].fate == "failed"


def test_sweeps_of_sweeps_and_a_trial_whose_config_is_not_known(sweep):
  other = sweep.parent / "other" / "x"
  other.mkdir(parents=True)
  (other / report_rows.FAILED).write_text(json.dumps({"error": "no such file"}))
  (other.parent / report_rows.TRIALS).write_text("[3")
  missing = []
  runs = report_rows.runs_of([sweep.parent], missing)
  assert sum(len(run.rows) for run in runs) == 10
  text = "\n".join(missing)
  assert "x: failed before its config was known: no such file" in text
  assert "other: sweep.json cannot be read" in text
