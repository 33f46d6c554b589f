"""Measuring a network: the numbers do not depend on how the samples are drawn, and no images are kept."""

import functools
import json

import jax
import numpy as np
import pytest

from ddil_jax import build as build_lib
from ddil_jax import config as config_lib
from ddil_jax import measure
from ddil_jax.errors import RunError
from ddil_jax.evaluation import results, sampling
from tests.running import shared  # noqa: F401 (fixture)

pytestmark = pytest.mark.xdist_group("main")


@pytest.fixture(scope="module")
def built(shared):  # noqa: F811
  config = config_lib.load("configs/digits_teacher.py:smoke", {
      "model.channel_mult": "(1,)", "objective.sampler_steps": "2", "eval.sampler_steps": "()",
      "eval.guidance_scales": "()", "eval.num_samples": "70", "eval.bootstrap": "8",
      "eval.metrics": str(tuple(results.METRICS))})
  config.unlock()
  parts = build_lib.build(config)
  return config, parts, parts.parts.init_student(jax.random.key(0), ())


def measured(built, patch, batch_size, count):
  config, parts, params = built
  config = config.copy_and_resolve_references()
  config.eval.batch_size, config.train.parallel = batch_size, "mesh"
  patch.setattr(measure.parallel, "spread", functools.partial(SPREAD, devices=jax.devices()[:count]))
  row, = measure.measure(config, parts, params, (), shift=False)
  return row


SPREAD = measure.parallel.spread


@pytest.fixture(scope="module")
def reference(built):
  with pytest.MonkeyPatch.context() as patch:
    return measured(built, patch, 70, 1)


@pytest.mark.parametrize("batch_size, count", [(23, 1), (32, 3), (16, 8)])
def test_numbers_depend_neither_on_the_batch_size_nor_on_the_devices(built, reference, monkeypatch, batch_size, count):
  row = measured(built, monkeypatch, batch_size, count)
  assert list(row["metrics"]) == list(reference["metrics"]) and len(row["metrics"]) == len(results.METRICS)
  for name, value in reference["metrics"].items():
    assert row["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    for part, bound in reference["intervals"][name].items():
      assert row["intervals"][name][part] == pytest.approx(bound, rel=1e-4, abs=1e-4), (name, part)


def test_a_row_is_ready_for_json_and_has_its_pictures(built, tmp_path):
  config, parts, params = built
  row, = measure.measure(config, parts, params, (), tmp_path / "samples", shift=False)
  assert json.loads(json.dumps(row)) == row
  assert (tmp_path / row["samples"]).read_bytes()[:4] == b"\x89PNG"


def test_no_more_than_a_batch_of_images_is_kept(built, monkeypatch):
  config, parts, params = built
  alive, most = [], []

  class Counted(np.ndarray):
    def __del__(self):
      if id(self) in alive:
        alive.remove(id(self))

  def batches(*args):
    for batch in draw(*args):
      counted = batch.view(Counted)
      alive.append(id(counted))
      most.append(len(alive))
      yield counted
      del counted

  draw = sampling.sample_batches
  monkeypatch.setattr(measure.sampling, "sample_batches", batches)
  config = config.copy_and_resolve_references()
  config.eval.batch_size, config.eval.bootstrap = 10, 0
  measure.measure(config, parts, params, (), shift=False)
  assert len(most) == 7 and max(most) <= 2


def test_samples_that_are_not_finite_are_a_failed_run(built):
  config, parts, params = built
  with pytest.raises(RunError, match="at 2 steps hold values that are not finite: the run diverged"):
    measure.measure(config, parts, jax.tree.map(lambda x: x * np.nan, params), (), shift=False)
