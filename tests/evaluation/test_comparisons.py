"""Comparisons of settings: what with what, in which direction, and when not. All numbers are made up."""

import csv
import io

import numpy as np
import pytest
import scipy.stats

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import comparisons, meanings, report_rows, report_table, results
from ddil_jax.evaluation.report_labels import Setting

FD, ACCURACY = "fd@500/train/cnn-1", "class_accuracy@500/-/cnn-1"


def setting(variant, **values):
  return Setting(variant, values, {f: f"{f}={v:g}" for f, v in values.items()})


def rows(of, values, objective="pd", steps=4, metric=FD, scale=1.0):
  """Rows of a setting, one a seed."""
  raw = [{"objective": objective, "variant": of.variant, "steps": steps, "seed": s, "guidance_scale": scale,
          "metrics": {metric: v}, "network_evaluations": steps} for s, v in values.items()]
  return [report_rows.check(r, [])._replace(setting=of) for r in raw]


def seeds(*values):
  return dict(enumerate(values))


BASE, DDIL = setting("base"), setting("+ddil")


def test_compare_gives_what_scipy_gives():
  a, b = seeds(4., 4.4, 4.2, 4.1, 4.6), {s: v for s, v in enumerate((4.1, 4.0, 3.7, 4.3), 1)}
  base, ddil = comparisons.compare(rows(BASE, a) + rows(DDIL, b))
  assert (base["setting"], base["baseline"], base["difference"], base["seeds"]) == ("base", None, None, 5)
  assert (ddil["setting"], ddil["baseline"], ddil["seeds"], ddil["shared_seeds"], ddil["lower"]) == \
      ("+ddil", "base", 4, 4, 4)
  test = scipy.stats.ttest_rel(list(b.values()), list(a.values())[1:])
  interval = test.confidence_interval()
  assert (ddil["p"], ddil["difference_low"], ddil["difference_high"]) == pytest.approx((test.pvalue, *interval))
  assert ddil["significant"] and ddil["significant_holm"] and ddil["comparisons"] == 1
  assert (ddil["low"], ddil["high"]) == pytest.approx(tuple(scipy.stats.ttest_1samp(
      list(b.values()), 0).confidence_interval()))


SWEPT = [setting(v, rate=r) for v in ("base", "+ddil") for r in (1, 2)]


@pytest.mark.parametrize("settings, wanted, expected", [
    ([BASE, DDIL], None, {"+ddil": "base"}),
    ([DDIL, setting("+reflected")], None, {"+reflected": "+ddil"}),
    ([BASE, DDIL], "+ddil", {"base": "+ddil"}),
    # Each with the one that is like it in all else.
    (SWEPT, None, {"+ddil, rate=1": "base, rate=1", "+ddil, rate=2": "base, rate=2"}),
    (SWEPT, "rate=1", {"base, rate=2": "base, rate=1", "+ddil, rate=2": "+ddil, rate=1"}),
    (SWEPT, "base, rate=1", {s.label: "base, rate=1" for s in SWEPT[1:]}),
    # A base that knows no such field; one that differs in more, but is the only one.
    ([BASE, *SWEPT[2:]], None, {"+ddil, rate=1": "base", "+ddil, rate=2": "base"}),
    ([SWEPT[0], SWEPT[3]], None, {"+ddil, rate=2": "base, rate=1"}),
    # None fits: two bases, neither alike.
    ([*SWEPT[:2], setting("+ddil", rate=3)], None, {}),
    # By the last part of a field's name, and by what the label shows.
    ([Setting("base", {"states.every": 50}), Setting("base", {"states.every": 1}, {"states.every": "every=1"})],
     "every=50", {"base, every=1": "base"}),
    ([Setting("base", {"a.on": True}, {"a.on": "on=yes"}), BASE], "a.on=True", {"base": "base, on=yes"}),
])
def test_what_is_compared_with_what(settings, wanted, expected):
  assert comparisons.baselines(settings, wanted) == expected


def test_each_metric_knows_its_direction_and_unlike_names_share_no_table():
  given = rows(BASE, seeds(.5, .6), metric=ACCURACY) + rows(DDIL, seeds(.5, .6))
  found = comparisons.summarise(given, "class_accuracy")
  assert [(t["metric"], t["better"], t["labels"]) for t in found] == [(ACCURACY, "higher", ["base"])]
  other = "fd@9/train/cnn-1"
  given = rows(BASE, seeds(.5)) + rows(DDIL, seeds(.6)) + rows(DDIL, seeds(.7), metric=other)
  assert [t["metric"] for t in comparisons.summarise(given)] == [FD, other]
  assert [t["labels"] for t in comparisons.summarise(given, other)] == [["+ddil"]]


def test_every_metric_has_a_meaning():
  assert {*results.METRICS, "lpips_diversity", "clip_score", "r_precision"} == set(meanings.METRICS)
  assert meanings.of(FD).better == "lower" and meanings.of("mine@5/-/-") == ("mine", "", "")


def test_holm_counts_all_comparisons_of_the_table():
  rng = np.random.default_rng(0)
  noise = rng.normal(0, .1, 5)
  given = rows(BASE, seeds(*(4 + noise)))
  for i in range(9):
    given += rows(setting("+ddil", rate=i), seeds(*(4 + noise + rng.normal(-.15 * (i == 0), .1, 5))))
  found = comparisons.compare(given)
  first = next(r for r in found if r["setting"] == "+ddil, rate=0")
  assert {r["comparisons"] for r in found} == {9}
  assert .05 / 9 < first["p"] < .05 and first["significant"] and not first["significant_holm"]
  text = report_table.markdown(found)
  assert " * " in text and "** " not in text.split("\n\n")[1]
  assert "for the 9 comparisons made here (without any true difference, about 0.45 of these" in text


def failed(of, seed, why="loss or gradient not finite for 3 steps in a row"):
  return [rows(of, {seed: None})[0]._replace(metrics={}, error=why)]


def test_a_run_that_failed_is_part_of_its_cell():
  hot, lost = setting("+ddil", rate=9), setting("+ddil", rate=99)
  given = rows(BASE, seeds(4., 4.1, 4.3, 4.4)) + rows(hot, seeds(3.9, 4., 4.2)) + failed(hot, 3) + \
      failed(lost, 0) + failed(lost, 1, "no space")
  found = {r["setting"]: r for r in comparisons.compare(given)}
  assert found[hot.label]["failed"] == {"diverged": 1} and found[hot.label]["shared_seeds"] == 3
  assert found[lost.label]["mean"] is None and found[lost.label]["difference"] is None
  text = report_table.markdown(list(found.values()))
  assert "4.03 ± 0.38 (3), 1 diverged [1]" in text and "| 1 diverged, 1 failed [1] [2] " in text
  assert "\n[1] loss or gradient not finite for 3 steps in a row\n[2] no space" in text
  # It stands where it would have been measured; where nothing was measured so, with all the others.
  more = rows(BASE, seeds(4.), metric="fd@9/train/cnn-1")
  for n, where in ((9, [0, 1]), (500, [1, 0]), (77, [1, 1])):
    one = [failed(lost, 0)[0]._replace(config={"eval.num_samples": n})]
    assert [lost.label in t["labels"] for t in comparisons.summarise(rows(BASE, seeds(4.)) + more + one)] == where
  # A seed that another try has finished is not lost.
  assert comparisons.compare(rows(BASE, seeds(4.)) + failed(BASE, 0))[0]["failed"] == {}


def test_a_baseline_that_diverged_leaves_the_table_standing():
  found = comparisons.compare(failed(BASE, 0) + rows(DDIL, seeds(4.)))
  assert [(r["setting"], r["mean"], r["difference"]) for r in found] == [("base", None, None), ("+ddil", 4., None)]


def test_one_teacher_is_a_column_and_several_are_settings():
  teacher = rows(setting(""), seeds(5.), "teacher")
  text = report_table.markdown(comparisons.compare(teacher + rows(BASE, seeds(4.))))
  head, _, line = text.splitlines()[2:5]
  assert [c.strip() for c in head.split("|")[1:-1]] == ["method", "steps", "setting", "teacher", "fd"]
  assert [c.strip() for c in line.split("|")[1:-1]] == ["pd", "4", "base", "5.00", "4.00 (1)"]
  assert "| teacher" in report_table.markdown(comparisons.compare(teacher))
  rates = rows(setting("", rate=1), seeds(5., 5.), "teacher") + rows(setting("", rate=2), seeds(4., 4.5), "teacher")
  found = comparisons.compare(rates)
  assert [(r["setting"], r["baseline"], r["difference"]) for r in found] == [
      ("rate=1", None, None), ("rate=2", "rate=1", -.75)]


def test_markdown_is_one_table_whatever_a_label_holds():
  text = report_table.markdown(comparisons.compare(rows(setting("a|b\nc"), seeds(4.)) + rows(DDIL, seeds(3.))))
  lines = [line for line in text.splitlines() if line.startswith("|")]
  assert len(lines) == 4 and len(set(map(len, lines))) == 1 and "a\\|b c" in text


def test_csv_has_all_digits():
  given = rows(BASE, seeds(1 / 3, 2.)) + rows(setting("+ddil", rate=2), seeds(1., 2.)) + failed(BASE, 2, "a, \"b\"")
  base, ddil = csv.DictReader(io.StringIO(report_table.to_csv(comparisons.compare(given))))
  assert float(base["mean"]) == (1 / 3 + 2) / 2 and base["failed"] == "1 failed" and base["reasons"] == 'a, "b"'
  assert ddil["rate"] == "2" and base["rate"] == "" and float(ddil["difference"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("given, wanted, words", [
    (rows(BASE, seeds(4.)) + rows(DDIL, seeds(3.)), dict(baseline="+reflected"),
     ["'+reflected'", "there are: base; +ddil"]),
    (rows(SWEPT[0], seeds(4.)) + rows(SWEPT[1], seeds(3.)), dict(baseline="rate=3"), ["'rate=3'", "rate=1, rate=2"]),
    (rows(BASE, seeds(4.)), dict(metric="fdd"), ["'fdd'", "there are: fd"]),
    ([], dict(metric="fd"), ["none"]),
    (rows(BASE, seeds(4.)) + rows(DDIL, seeds(3.), metric="fd@9/test/cnn-1"), {},
     ["pd, 4 steps", "'base' and '+ddil'", "cannot be compared", "n is 500 against 9",
      "reference is train against test"]),
    (rows(BASE, seeds(4.)) + rows(DDIL, seeds(3.), metric="fd@500/train/cnn-2"), {},
     ["extractor is cnn-1 against cnn-2", "evaluate both alike"]),
    (rows(BASE, {0: 4., 1: 4.}) + rows(DDIL, {2: 3.}), {}, ["share no seed", "0, 1 against 2"]),
])
def test_what_cannot_be_compared_is_refused(given, wanted, words):
  with pytest.raises(UsageError) as error:
    comparisons.compare(given, **wanted)
  assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_one_pair_that_can_be_compared_is_enough():
  other = rows(setting("+reflected"), seeds(3.), metric="fd@9/test/cnn-1")
  given = rows(BASE, seeds(4.)) + rows(DDIL, seeds(3.)) + other
  assert [r["difference"] for r in comparisons.compare(given)] == [None, -1., None]
