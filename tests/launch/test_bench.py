"""The benchmark in its smallest size: it runs, and what it writes is what the docs read."""

import json
import statistics

import pytest

from launch import bench


@pytest.mark.slow
def test_smoke(tmp_path, capsys):
  out = tmp_path / "new" / "results.json"
  assert bench.main(["--smoke", f"--out={out}"]) == 0
  result = json.loads(out.read_text())
  assert list(out.parent.iterdir()) == [out]  # nothing temporary is left
  assert set(result) == {"machine", "load_average", "versions", "seconds", "repeats", "rows"}
  assert set(result["load_average"]) == {"before", "after"} and result["repeats"] == 2

  rows = {row["name"]: row for row in result["rows"]}
  assert len(rows) == len(result["rows"])
  assert {row["unit"] for row in rows.values()} == {"ratio", "steps/s", "samples/s", "s", "MiB"}
  for row in rows.values():
    assert 0 < row["low"] <= row["value"] <= row["high"]
    assert row["met"] is (None if row["target"] is None else row["value"] <= row["target"])
  assert rows["DDIM rollout of 2 steps / 2 forward passes"]["target"] == 1.1
  step = rows["pd: DDIL step / base step"]
  assert step["target"] == 1.25 and set(step["median_seconds"]) == {"ddil", "base"}
  assert set(step["refreshes"]) == {"student", "teacher"} and set(step["refreshes"].values()) <= {0, 1}

  assert rows["evaluation of 64 images 4x4"]["target"] == 600 and rows["evaluation of 64 images 4x4"]["metrics"] == 8
  assert 100 < rows["evaluation of 64 images 4x4, peak memory"]["value"] < 2048

  printed = capsys.readouterr().out
  assert all(name in printed for name in rows)


def test_programs_take_turns_and_ratios_are_medians_of_pairs():
  order, times = [], {"a": iter([9.0, 2.0, 6.0, 3.0]), "b": iter([9.0, 1.0, 2.0, 2.0])}

  def program(name):
    def run():
      order.append(name)
      return next(times[name])
    return run

  seconds = bench.alternate({"a": program("a"), "b": program("b")}, repeats=3)
  assert sorted(order[:2]) == ["a", "b"]  # the first runs, for compiling, are not measured
  assert order[2:] == ["a", "b"] * 3 and seconds == {"a": [2, 6, 3], "b": [1, 2, 2]}
  row = bench.ratio("a / b", seconds, "a", "b", target=1.9)
  assert row["value"] == statistics.median([2, 3, 1.5]) and (row["low"], row["high"]) == (1.5, 3)
  assert row["met"] is False
  assert bench.ratio("a / b", seconds, "a", "b", target=2.0)["met"] is True
  assert "MISSED" in bench.table([row])
  assert bench.rate("a", "steps/s", 12, seconds["a"])["value"] == 4
