"""The benchmark in its smallest size: it runs, and what it writes is what the docs read."""

import importlib.metadata
import json
import statistics

import jax
import numpy as np
import pytest

from ddil_jax import build
from launch.bench import __main__ as bench
from launch.bench import against_torch, growth, large, measure


@pytest.mark.slow
def test_smoke(tmp_path, capsys):
  out = tmp_path / "new" / "results.json"
  assert bench.main(["--smoke", f"--out={out}"]) == 0
  result = json.loads(out.read_text())
  assert {path.name for path in out.parent.iterdir()} == {"results.json", "results.md"}  # nothing temporary is left
  assert set(result) == {"machine", "load_average", "versions", "seconds", "seconds_of", "repeats", "left_out",
                         "rows"}
  assert set(result["load_average"]) == {"before", "after"} and result["repeats"] == 2 and not result["left_out"]

  rows = {row["name"]: row for row in result["rows"]}
  assert len(rows) == len(result["rows"])
  assert {row["unit"] for row in rows.values()} == {"ratio", "steps/s", "samples/s", "examples/s", "s", "MiB",
                                                    "relative", "share", "exponent"}
  for row in rows.values():
    assert row["low"] <= row["value"] <= row["high"]
    assert row["low"] >= 0 or row["unit"] == "exponent"
    assert (row["met"] is None) == (row["target"] is None) == (row["bound"] is None)
  assert rows["DDIM rollout of 2 steps / 2 forward passes"]["target"] == 1.05
  step = rows["pd: DDIL step / base step"]
  assert step["target"] == 1.15 and set(step["median_seconds"]) == {"ddil", "base"}
  assert set(step["refreshes"]) == {"student", "teacher"} and set(step["refreshes"].values()) <= {0, 1}

  for name in ("pd", "8x8 teacher"):
    assert rows[f"{name}: loss, ours and PyTorch's on the same draws"]["met"]
    assert rows[f"{name}: our steps, times as fast as PyTorch's (eager)"]["value"] > 0
  shares = [row["value"] for row in rows.values() if row["unit"] == "share"]
  assert sum(shares) == pytest.approx(1, abs=1e-3) and min(shares[:3]) > 0  # of the convolutions
  # A device has its part of the batch, and all parameters: less than alone, more than half.
  assert -1 < rows["step: memory over devices"]["value"] < 0
  assert rows["ddil plan: peak measured / predicted, most of it parameters"]["predicted_mib"] > 100

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

  seconds = measure.alternate({"a": program("a"), "b": program("b")}, repeats=3)
  assert sorted(order[:2]) == ["a", "b"]  # the first runs, for compiling, are not measured
  assert order[2:] == ["a", "b"] * 3 and seconds == {"a": [2, 6, 3], "b": [1, 2, 2]}
  row = measure.ratio("a / b", seconds, "a", "b", target=1.9)
  assert row["value"] == statistics.median([2, 3, 1.5]) and (row["low"], row["high"]) == (1.5, 3)
  assert row["met"] is False
  assert measure.ratio("a / b", seconds, "a", "b", target=2.0)["met"] is True
  assert "MISSED" in bench.terminal([row])
  assert measure.ratio("a / b", seconds, "a", "b", 1.9, "at least")["met"] is True
  assert measure.ratio("a / b", seconds, "a", "b", 1.9, "within")["met"] is False
  assert measure.rate("a", "steps/s", 12, seconds["a"])["value"] == 4


@pytest.mark.parametrize("method", [pytest.param(name, marks=() if name == "teacher" else pytest.mark.slow)
                                    for name in against_torch.METHODS])
def test_the_step_in_pytorch_is_the_same(method, monkeypatch):
  """Losses of the first three steps on the same draws; another learning rate shows."""
  size = measure.SMOKE
  config = against_torch._config(method, size)
  config.model.channel_mult = (1, 2)
  dataset = build.load_data(config, "train")
  network = against_torch.perturbed(build.build(config, dataset).parts.init_student(jax.random.key(1), ()))
  window = measure.Window(config, dataset, network, 3)
  against_torch.apart(window)
  name = against_torch.METHODS[method]
  ours = against_torch.seen(window, name, 3)
  assert against_torch.loss_difference(window, name, ours) < 1e-4
  window.config.optimizer.update(learning_rate=1e-2, critic_learning_rate=1e-2)
  assert against_torch.loss_difference(window, name, ours) > against_torch.LOSS_TOLERANCE


def test_without_pytorch(monkeypatch, capsys):
  """It is said, in the result too, and all else is measured."""
  def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "version", version)
  monkeypatch.setattr(measure, "left_out", [])
  assert against_torch.against_torch(None, None, measure.SMOKE) == []
  assert "against PyTorch, which is not installed" in capsys.readouterr().err and len(measure.left_out) == 1


HLO = """
%inside.1 (p: f32[8,8], q: f32[8,8]) -> f32[8,8] {
  ROOT %dot.3 = f32[8,8]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %c.1 = f32[8,8,8,4]{3,2,1,0} convolution(%x, %k), window={size=3x3 pad=1_1x1_1}, metadata={op_name="jvp()/conv"}
  %c.2 = f32[8,8,8,4]{3,2,1,0} convolution(%x, %k), window={size=3x3 pad=1_1x1_1}, metadata={op_name="transpose(jvp())"}
  %c.3 = f32[4,3,3,4]{3,2,1,0} convolution(%x, %g), window={size=8x8 pad=1_1x1_1}
  %f.1 = f32[8,8]{1,0} fusion(%x, %y), kind=kCustom, calls=%inside.1
  ROOT %f.2 = f32[8]{0} fusion(%x), kind=kLoop, calls=%other
}
"""


def test_where_the_time_goes():
  """Kinds of a program's operations, and how long they took: to the end that another thread may tell."""
  kinds = against_torch.kinds_of(HLO)
  assert [kinds.get(op) for op in ("c.1", "c.2", "c.3", "f.1", "f.2")] == [
      against_torch.FORWARD, against_torch.BY_INPUT, against_torch.BY_WEIGHT, against_torch.PRODUCTS, None]
  events = [{"name": op, "ts": ts, "dur": dur, "args": {"hlo_op": op}} for op, ts, dur in
            (("c.1", 0, 2), ("c.1", 100, 3), ("f.2", 50, 7))]
  events += [{"name": "end: c.1", "ts": 10}, {"name": "end: c.1", "ts": 130}, {"name": "other", "ts": 1, "dur": 5}]
  assert against_torch.durations(events) == {"c.1": 40, "f.2": 7}


def test_exponents():
  assert growth.exponent((1, 2, 4, 8), [3 * n**1.5 for n in (1, 2, 4, 8)]) == pytest.approx(1.5)


@pytest.mark.slow
@pytest.mark.parametrize("method", large.METHODS)
def test_the_step_of_stable_diffusion_in_pytorch_is_the_same(method, tmp_path):
  """Losses of four steps on the same draws, on the tiny network; another learning rate shows."""
  from ddil_jax.interop import diffusers
  config = large.config_of(method, measure.SMOKE)
  config.optimizer.update(learning_rate=1e-3, clip=1.0)
  config.states.refresh_every = 2
  if method == "dmd2":
    config.objective.period = 2
  ours = large.Ours(config)
  about = diffusers.architecture(config.model.file)[1]
  folders = {}
  for name, params in {**ours.state.params, "teacher": ours.frozen["teacher"]}.items():
    own = {"time_cond_proj_dim": config.model.guidance_embedding} if name == "student" and method == "lcm" else {}
    folders[name] = str(tmp_path / name)
    diffusers.export(jax.device_get(params.get("net", params)), about | {"config": about["config"] | own}, folders[name])
  seen = ours.look(4)
  for rate, same in ((1e-3, True), (1e-1, False)):
    config.optimizer.update(learning_rate=rate, critic_learning_rate=rate)
    theirs, worst = large.Theirs(ours, folders=folders, dtype="float32"), 0.0
    for batch, found, losses in seen:
      states = theirs_of(theirs, found)
      for player, loss in theirs.step(batch, states).items():
        worst = max(worst, abs(loss - losses[player]) / abs(losses[player]))
    assert (worst < 1e-4) == same, worst
  theirs(3)  # by its own draws, with rollouts of its own
  assert theirs.step._buffers


def theirs_of(theirs, found):
  import torch
  states = {name: theirs.step.images(np.array(v)) if v.ndim == 4 else torch.from_numpy(np.array(v))
            for name, v in found.items()}
  return states | {"k": states["k"].long()}


def test_rows_of_stable_diffusions_size():
  """Utilisation by the operations that were counted; the target stands at the better of PyTorch's two."""
  size = measure.Size(window=10)
  found = {"ours": {"seconds": [2.0, 1.0, 2.0], "operations": [989e12] * 3, "bytes": 2**30, "device": "NVIDIA H200"},
           "eager": {"seconds": [4.0, 4.0, 4.0], "operations": [], "bytes": 2**31, "device": "NVIDIA H200"},
           "compiled": {"seconds": [3.0, 2.0, 3.0], "operations": [], "bytes": None, "device": "NVIDIA H200"}}
  rows = {row["name"].partition(": ")[2]: row for row in large.rows_of("lcm", found, size)}
  assert rows["of the chip's peak rate"]["value"] == 0.5 and rows["of the chip's peak rate"]["met"]
  assert rows["our steps, times as fast as PyTorch's (eager)"]["target"] is None
  assert rows["our steps, times as fast as PyTorch's (compiled)"]["value"] == 1.5
  assert rows["steps of ours"]["value"] == 5 and rows["memory, eager"]["value"] == 2048
  assert "memory, compiled" not in rows
  for kind, flops in (("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("cpu", None)):
    assert (large.chip_of(kind) and large.chip_of(kind).flops) == flops
