"""The report, drawn from run directories that these tests write: all numbers here are made up."""

import html.parser
import json
import re
import sys

import matplotlib
import numpy as np
import pytest
import scipy.stats
from ddil_jax.errors import UsageError
from ddil_jax.evaluation import grids, report, report_rows

pytestmark = pytest.mark.xdist_group("report")  # its fixture is made once
FD = "fd@2000/test/digits-cnn-1a2b3c4d"
REST = {"kd": .0021, "precision": .91, "recall": .88, "density": 1.1, "coverage": .93}
# Made-up distances by seed: +ddil always lower, +reflected always higher, both of mixed sign.
VALUES = {"base": (3.90, 3.80, 3.88), "+ddil": (3.81, 3.75, 3.79), "+reflected": (6.6, 6.4, 6.9),
          "+ddil+reflected": (3.95, 3.70, 3.99)}


class Page(html.parser.HTMLParser):
  """The page as a reader gets it: text, elements, and whether every element is closed in order."""

  VOID = {"meta", "img", "br"}

  def __init__(self, text):
    super().__init__()
    self.elements, self.open, self.words = [], [], []
    self.feed(text)
    assert not self.open, f"unclosed {self.open}"

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag, f"</{tag}> out of order"

  def handle_data(self, data):
    self.words.append(data)

  @property
  def text(self):
    return " ".join(" ".join(self.words).split())

  def of(self, tag):
    return [attrs for name, attrs in self.elements if name == tag]


def metrics(fd, name=FD):
  rest = name.partition("@")[2]
  return {name: fd, "saturation@2000/-/-": .55, "class_accuracy@2000/-/" + rest.rpartition("/")[2]: .97} | {
      f"{k}@{rest}": v for k, v in REST.items()}


def shift(steps, level):
  rows = []
  for k in range(steps + 1):
    row = {"k": k, "t": 1 - k / steps, "bandwidth": 9.}
    for kind in ("sw2", "mmd2"):
      for pair, size in (("student_forward", level), ("student_teacher", .8 * level),
                         ("teacher_forward", .09), ("floor", .05)):
        v = (.04 + size * k / steps) * (1 if kind == "sw2" else .1)
        for name in (f"{kind}_{pair}", f"feature_{kind}_{pair}"):
          row |= {name: v, f"{name}_low": .9 * v, f"{name}_high": 1.15 * v}
    rows.append(row)
  return rows


def write_run(path, objective, variant, seed, steps=(4,), guidance=1.0, fd=4.0, lines=12, config=None,
              **changes):
  """A run directory with everything; returns its rows."""
  (path / "samples").mkdir(parents=True)
  rng = np.random.default_rng(seed)
  rows = []
  for n in steps:
    file = f"samples/steps{n}.png"
    images = np.tanh(rng.standard_normal((32, 8, 8, 1)))
    grids.save_png(path / file, grids.image_grid(images, columns=8, scale=4))
    rows.append({"objective": objective, "variant": variant, "steps": n, "seed": seed,
                 "guidance_scale": guidance, "metrics": metrics(fd and fd * 4 / n), "network_evaluations": n,
                 "seconds": 21.5, "samples": file, "shift": [] if objective == "teacher" else
                 shift(n, .1 if "ddil" in variant else .16)} | changes)
  (path / "results.json").write_text(json.dumps(rows))
  sources = ("forward", "student", "teacher") if "ddil" in variant else ("forward",)
  log = [{"step": 25 * i, "time": 1.5 * i, "student/loss": (v := .3 / i + .01 * rng.random()),
          "critic/loss": None, "student/grad_norm": 2 * v, "steps_per_second": 20. + rng.random()}
         | {f"student/loss@{s}": v * (1 + .3 * j) if s in sources else None
            for j, s in enumerate(("forward", "student", "teacher"))} for i in range(1, lines + 1)]
  (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
  (path / "config.json").write_text(json.dumps(config or {
      "seed": seed, "data": {"name": "digits"}, "objective": {"name": objective},
      "states": {"forward": 1.0 if sources == ("forward",) else .5}, "train": {"steps": 300, "ema": [.99]}}))
  (path / "versions.json").write_text(json.dumps({"jax": "0.10.2", "flax": "0.12.8"}))
  return rows


def write_study(top, values=VALUES, objective="pd", curves=True):
  """Run directories of a teacher and of an objective's variants, with distances by seed."""
  kept = {} if curves else {"lines": 0, "shift": []}
  runs = [top / "teacher"]
  write_run(runs[0], "teacher", "", 0, steps=(32, 8, 4, 2, 1), fd=5.0, **kept)
  for variant, by_seed in values.items():
    for seed, fd in enumerate(by_seed):
      runs.append(top / f"{objective}-{variant.replace('+', '_')}-{seed}")
      write_run(runs[-1], objective, variant, seed, fd=fd, **kept)
  return runs


@pytest.fixture(scope="module")
def study(tmp_path_factory):
  top = tmp_path_factory.mktemp("study")
  runs = write_study(top)
  out = top / "report.html"
  summary = report.write_report(runs, out, title="Made up")
  text = out.read_text(encoding="utf-8")
  return runs, out, summary, text, Page(text)


def cells(summary, table=0, objective="pd", steps=4):
  return next(g for g in summary["tables"][table]["groups"]
              if (g["objective"], g["steps"]) == (objective, steps))["cells"]


def test_summary_holds_the_means_their_intervals_and_the_paired_differences(study):
  _, _, summary, text, page = study
  assert summary["missing"] == [] and summary["runs"] == 13 and summary["rows"] == 17
  assert [t["metric"] for t in summary["tables"]] == [FD] and summary["tables"][0]["comparisons"] == 3
  found = cells(summary)
  for variant, by_seed in VALUES.items():
    assert found[variant]["mean"] == pytest.approx(np.mean(by_seed))
    low, high = scipy.stats.ttest_1samp(by_seed, 0).confidence_interval()
    assert (found[variant]["interval"]["low"], found[variant]["interval"]["high"]) == pytest.approx((low, high))
    if variant != "base":
      test = scipy.stats.ttest_rel(by_seed, VALUES["base"])
      difference = found[variant]["difference"]
      assert (difference["mean"], difference["p"]) == pytest.approx(
          (np.mean(np.subtract(by_seed, VALUES["base"])), test.pvalue))
      # p = .029, .002 and .78; Holm asks for at most .05 / 3 of the smallest, then .05 / 2.
      assert found[variant]["mark"] == {"+ddil": "*", "+reflected": "**"}.get(variant, "")
  assert found["base"]["difference"] is None and found["base"]["baseline"] is None
  assert "3.78 ± 0.08 3 seeds Δ −0.08 ± 0.06 * lower in 3/3 beats teacher: yes" in page.text
  assert "Δ +2.77 ± 0.55 ** lower in 0/3 beats teacher: no" in page.text
  assert "lower in 1/3" in page.text and "for the 3 comparisons made here" in page.text
  # Coloured only where marked: a gain green, a loss red.
  assert [re.sub(" .*", "", x) for x in re.findall(r'<small class="good">Δ (.*?)</small>', text)] == ["−0.08"]
  assert [re.sub(" .*", "", x) for x in re.findall(r'<small class="bad">Δ (.*?)</small>', text)] == ["+2.77"]
  json.dumps(summary)


def test_two_seeds_that_agree_are_given_no_interval_and_no_mark(tmp_path):
  values = {"base": (3.9, 3.8), "+ddil": (3.2, 3.1), "+reflected": (6., 6.)}
  runs = write_study(tmp_path, values, curves=False)
  summary = report.write_report(runs, tmp_path / "r.html")
  assert all(c["mark"] == "" and c["interval"]["low"] is None for c in cells(summary).values())
  assert summary["tables"][0]["comparisons"] == 0
  text = Page((tmp_path / "r.html").read_text(encoding="utf-8")).text
  assert "3.15 3.10 to 3.20 2 seeds: no interval Δ −0.70, lower in 2/2" in text
  assert "comparisons made here" not in text


def test_one_seed_shows_no_spread(tmp_path):
  runs = write_study(tmp_path, {"base": (3.9,), "+ddil": (3.1,)}, curves=False)
  report.write_report(runs, tmp_path / "r.html")
  text = Page((tmp_path / "r.html").read_text(encoding="utf-8")).text
  assert "3.10 1 seed: no interval Δ −0.80, lower in 1/1" in text


def test_differences_use_shared_seeds_only():
  rows = [{"objective": "pd", "variant": v, "steps": 4, "seed": s, "guidance_scale": 1., "metrics": {FD: fd}}
          for v, s, fd in (("base", 0, 10.), ("base", 1, 2.), ("+ddil", 1, 1.5), ("+ddil", 2, 1.))]
  line = next(line for line in report.terminal_table(rows).splitlines() if line.startswith("pd"))
  assert line.split() == ["pd", "4", "1", "-", "6.00", "1.25", "(-0.50", "1/1)"]


def test_page_makes_no_request_and_its_ids_are_unique(study):
  *_, text, page = study
  for tag, attrs in page.elements:
    for name in ("src", "href", "xlink:href", "data", "srcset", "action", "poster"):
      if name in attrs:
        assert attrs[name].startswith(("#", "data:image/png;base64,")), (tag, attrs)
  assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
  assert "@import" not in text
  assert set(re.findall(r"url\((.)", text)) == {"#"}
  namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
  assert set(re.findall(r"https?://[^\"' <)]*", text)) <= namespaces
  ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
  assert len(ids) == len(set(ids))
  used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text))
  assert {a or b for a, b in used} <= set(ids)


def test_every_picture_has_an_alternative_text(study):
  _, _, _, _, page = study
  images, figures = page.of("img"), page.of("svg")
  assert len(images) == 5 + 4  # the teacher at five step counts, four variants
  assert all(a["alt"].startswith("Grid of samples: ") for a in images)
  # Shift twice in states and twice in features, one figure per source, training curves of teacher and students.
  assert len(figures) == 7
  assert all(a["role"] == "img" and a["aria-label"] for a in figures)


def test_curves_are_drawn_from_the_logged_numbers(study):
  *_, page = study
  for words in ("to the forward marginal", "to the teacher's rollout", "student/grad_norm",
                "steps_per_second", "forward states", "student states"):
    assert words in page.text
  assert "critic/loss" not in page.text  # null in every line


def test_same_input_gives_the_same_bytes(study, tmp_path):
  runs, out, *_ = study
  report.write_report(runs, tmp_path / "again.html", title="Made up")
  assert (tmp_path / "again.html").read_bytes() == out.read_bytes()


def test_matplotlib_is_left_as_it_was(study):
  before = dict(matplotlib.rcParams)
  runs, out, *_ = study
  report.write_report(runs[:2], out.with_name("two.html"))
  assert dict(matplotlib.rcParams) == before
  pyplot = sys.modules.get("matplotlib.pyplot")
  assert pyplot is None or not pyplot.get_fignums()


def test_configs_show_what_differs_first(study):
  *_, page = study
  assert "3 fields differ between 13 runs run objective.name seed states.forward teacher" in page.text
  assert "3 fields alike in all runs data.name = digits train.ema = [0.99] train.steps = 300" in page.text
  assert "jax 0.10.2" in page.text


def test_names_are_escaped_everywhere(tmp_path):
  evil = "<script>alert(1)</script>&\"'$x^2$"
  runs = write_study(tmp_path, {"base": (3.9, 3.8), evil: (3.8, 3.7)}, objective="pd")[:1]
  write_run(tmp_path / "r & <b>1", evil, evil, 0, config={evil: {"name": evil}, "data": {"name": evil}})
  write_run(tmp_path / "r2", evil, "base", 0)
  runs += [tmp_path / "r & <b>1", tmp_path / "r2"]
  report.write_report(runs, tmp_path / "r.html", title=evil)
  text = (tmp_path / "r.html").read_text(encoding="utf-8")
  page = Page(text)
  assert "<script" not in text and "alert(1)" in page.text and "$x^2$" in page.text
  assert any(evil in a["alt"] for a in page.of("img"))
  assert any(evil in a["aria-label"] for a in page.of("svg"))


def test_missing_pieces_are_named_and_do_not_stop_the_report(tmp_path):
  runs = write_study(tmp_path, {"base": (3.9, 3.8), "+ddil": (3.8, 3.7)})
  base0, base1, ddil0, ddil1 = runs[1:]
  (base0 / "metrics.jsonl").unlink()
  (base1 / "results.json").write_text('[{"objective": "pd", "steps"')
  (ddil0 / "samples/steps4.png").write_text("no picture")
  (ddil0 / "config.json").write_text("[]")
  with (ddil1 / "metrics.jsonl").open("a") as f:
    f.write('{"step": 325, "student/lo')
  empty = tmp_path / "empty"
  empty.mkdir()
  missing = report.write_report([*runs, empty], tmp_path / "r.html")["missing"]
  text = "\n".join(missing)
  assert f"{base0.name}: metrics.jsonl is absent" in missing
  assert f"{base1.name}: results.json cannot be read" in text
  assert f"{ddil0.name}: no sample grid of pd +ddil, 4 steps, guidance scale 1, seed 0" in missing
  assert f"{ddil0.name}: config.json holds a list, expected a dict" in missing
  assert f"{ddil1.name}: 1 damaged line of metrics.jsonl left out" in missing
  assert sum(m.startswith("empty: ") for m in missing) == 4
  page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
  assert all(" ".join(m.split()) in page.text for m in missing)
  assert str(tmp_path) not in page.text


def test_a_run_with_a_log_only_says_what_is_not_there(tmp_path):
  write_run(tmp_path / "run", "pd", "base", 0)
  (tmp_path / "run/results.json").unlink()
  report.write_report([tmp_path / "run"], tmp_path / "r.html")
  page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
  for words in ("No Fréchet distance", "No results.json with rows", "No sample grids",
                "No covariate-shift curves", "hold no result of a distilled student"):
    assert words in page.text
  assert len(page.of("svg")) == 1


def test_values_that_are_not_finite_are_shown_and_left_out_of_the_means(tmp_path):
  runs = write_study(tmp_path, {"base": (3.9, 3.8, 3.7), "+ddil": (float("nan"), None, 3.5)})
  log = (runs[1] / "metrics.jsonl").read_text()
  log += '{"step": 400, "student/loss": NaN, "student/grad_norm": Infinity}\n'
  (runs[1] / "metrics.jsonl").write_text(log)
  rows = json.loads((runs[1] / "results.json").read_text())
  rows[0]["shift"][1] |= {"sw2_student_forward": float("nan"), "sw2_floor": None,
                          "sw2_student_teacher_low": None}
  (runs[1] / "results.json").write_text(json.dumps(rows))
  summary = report.write_report(runs, tmp_path / "r.html")
  ddil = cells(summary)["+ddil"]
  assert ddil["mean"] == 3.5 and ddil["difference"]["mean"] == pytest.approx(-.2)
  assert ddil["failed"] == {s: ("not finite", f"the metric of pd-_ddil-{s} is not finite") for s in (0, 1)}
  text = (tmp_path / "r.html").read_text(encoding="utf-8")
  assert "2 seeds not finite [1][2]" in Page(text).text
  assert not re.search(r"\bnan\b|\binf\b", text.replace("font", ""), flags=re.I)


def test_unlike_measurements_get_tables_of_their_own(tmp_path):
  runs = write_study(tmp_path, {"base": (3.9, 3.8), "+ddil": (3.8, 3.7)}, curves=False)
  other = "fd@500/test/digits-cnn-1a2b3c4d"
  rows = json.loads((runs[-1] / "results.json").read_text())
  rows[0]["metrics"] = metrics(1.0, other)
  (runs[-1] / "results.json").write_text(json.dumps(rows))
  summary = report.write_report(runs, tmp_path / "r.html")
  assert [t["metric"] for t in summary["tables"]] == [FD, other]
  assert cells(summary, 0)["+ddil"]["values"] == {0: 3.8}
  assert cells(summary, 1)["+ddil"]["difference"] is None  # no base was measured that way
  assert "The rows were measured in 2 ways" in Page((tmp_path / "r.html").read_text(encoding="utf-8")).text
  lines = report.terminal_table([r for run in runs for r in json.loads((run / "results.json").read_text())])
  assert FD in lines and other in lines


def test_directory_of_runs_stands_for_its_runs_and_repeated_rows_count_once(tmp_path):
  top, out = tmp_path / "top", tmp_path / "r.html"
  runs = write_study(top, curves=False)
  given = report.write_report(runs, out)
  merged = [r for run in runs for r in json.loads((run / "results.json").read_text())]
  (top / "results.json").write_text(json.dumps(merged))
  assert report.write_report([top], out) == given and given["rows"] == 17
  merged[-1]["metrics"][FD] = 1.0
  (top / "results.json").write_text(json.dumps(merged))
  summary = report.write_report([top], out)
  assert len(summary["missing"]) == 1 and "unlike rows for pd +ddil+reflected" in summary["missing"][0]
  assert summary["tables"] == given["tables"]


def test_a_resumed_run_counts_a_step_once(tmp_path):
  write_run(tmp_path / "run", "pd", "base", 0, lines=4)
  with (tmp_path / "run/metrics.jsonl").open("a") as f:
    f.write('{"step": 75, "student/loss": 0.5}\n')
  run, = report_rows.runs_of([tmp_path / "run"], [])
  assert [line["step"] for line in run.log] == [25, 50, 75, 100]
  # The later value counts; what only the first line of the step has (an evaluation's, the loss's) stays.
  assert run.log[2]["student/loss"] == .5 and run.log[2]["student/grad_norm"] > 0


def test_samples_outside_the_run_are_not_shown(tmp_path):
  write_run(tmp_path / "other", "pd", "base", 0)
  write_run(tmp_path / "run", "pd", "base", 0, lines=0, shift=[], samples="../other/samples/steps4.png")
  summary = report.write_report([tmp_path / "run"], tmp_path / "r.html")
  assert summary["missing"] == ["run: no sample grid of pd base, 4 steps, guidance scale 1, seed 0"]
  assert not Page((tmp_path / "r.html").read_text(encoding="utf-8")).of("img")


def test_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  write_run(tmp_path / "run", "pd", "base", 0, lines=0, shift=[])
  out = tmp_path / "deep/r.html"
  report.write_report([tmp_path / "run"], out)
  before = out.read_bytes()
  monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
  with pytest.raises(RuntimeError, match="no space"):
    report.write_report([tmp_path / "run"], out, title="other")
  assert out.read_bytes() == before
  assert [p.name for p in out.parent.iterdir()] == ["r.html"]


def test_mistakes_of_the_user_are_one_line(tmp_path):
  with pytest.raises(UsageError, match="no run directory .*absent; expected") as e:
    report.write_report([tmp_path / "absent"], tmp_path / "r.html")
  assert "\n" not in str(e.value)
  with pytest.raises(UsageError, match="nothing to report"):
    report.write_report([tmp_path], tmp_path / "r.html")
  with pytest.raises(UsageError, match="nothing to report in no directory"):
    report.write_report([], tmp_path / "r.html")
  assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("scale", [1e-5, 1., 40., 2e4])
def test_terminal_table_aligns_and_fits(tmp_path, scale):
  rows = []
  for i, (objective, steps, guidance) in enumerate(
      (o, s, g) for o in ("pd", "dmd2", "a_long_name_of_ours") for s in (16, 2) for g in (1., 7.5)):
    for variant in (*VALUES, "+reflected at 1.1", "+ddil at .75/.25/0"):
      for seed in range(3):
        rows.append({"objective": objective, "variant": variant, "steps": steps, "seed": seed,
                     "guidance_scale": guidance,
                     "metrics": {FD: scale * (1 + i + .1 * seed + .01 * len(variant))}})
  rows += [{"objective": "teacher", "variant": "", "steps": s, "seed": 0, "guidance_scale": 1.,
            "metrics": {FD: s}} for s in (32, 16, 2)]
  lines = report.terminal_table(rows).splitlines()
  assert max(map(len, lines)) <= 100
  heads = [i for i, line in enumerate(lines) if line.startswith("student")]
  assert heads
  names = []
  for start in heads:
    block = lines[start:lines.index("", start)]
    assert len(block) == 1 + 12
    cuts = [m.start() for m in re.finditer(r"(?<=  )\S", block[0])]
    names += re.split(r"\s{2,}", block[0])[4:]
    teacher_end = block[0].index("teacher") + len("teacher")
    for line in block[1:]:
      assert line[teacher_end - 1:teacher_end].strip(), line  # right-aligned under its head
      for cut in cuts[3:]:  # each variant starts under its head, after two blanks
        assert len(line) <= cut or line[cut - 2:cut] == "  ", line
    ends = {re.match(r" *[\d.e+-]+", line[cuts[3]:]).end() for line in block[1:]}
    assert len(ends) == 1  # the means of a column end in one place
  assert len(names) == 6  # every variant once
  assert any("In brackets: mean paired difference" in line for line in lines)
  assert sum(line.startswith("teacher at guidance scale 1: 32 steps") for line in lines) == 1


def test_terminal_table_of_nothing_and_of_bad_rows():
  assert "No Frechet distance" in report.terminal_table([])
  failed = {"objective": "pd", "variant": "base", "steps": 4, "seed": 0, "guidance_scale": 1,
            "metrics": {FD: float("nan")}}
  text = report.terminal_table([failed, {"objective": "pd"}, 3])
  assert "note: a row of results.json without steps, guidance_scale, seed is left out" in text
  line = next(line for line in text.splitlines() if line.startswith("pd"))
  assert line.split() == ["pd", "4", "1", "-", "-"]
  assert "teacher: its own sampler" in text and "In brackets" not in text  # one setting: there is nothing to compare


def test_seeds_of_unlike_teachers_are_named_and_stages_are_not(tmp_path):
  for seed, teacher in enumerate(("aaaa", "aaaa", "bbbb")):
    write_run(tmp_path / f"pd-{seed}", "pd", "base", seed, steps=(4, 2), teacher=teacher)
  missing = []
  report_rows.teachers([row for run in report_rows.runs_of([tmp_path], []) for row in run.rows], missing)
  assert missing == ["pd base, guidance scale 1: seeds of 2 unlike teachers are averaged (pd-0 and 1 more; pd-2)"]
  _, _, listed = report._load([tmp_path])
  assert missing[0] in listed
  again = []
  report_rows.teachers([row for run in report_rows.runs_of([tmp_path / "pd-0", tmp_path / "pd-1"], [])
                        for row in run.rows], again)
  assert again == []


def test_intervals_over_samples_stand_below_their_values(tmp_path):
  write_run(tmp_path / "a", "pd", "base", 0, fd=3.9, intervals={FD: {"mean": 4.1, "low": 3.71, "high": 4.13}})
  write_run(tmp_path / "b", "pd", "base", 1, fd=3.8)
  report.write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "r.html")
  text = Page((tmp_path / "r.html").read_text()).text
  assert "3.90 3.71 to 4.13" in text and "3.80 3" not in text
