"""Runs measured by published networks: their weights here are random, of the published sizes or small."""

import re

import flax
import jax
import numpy as np
import pytest

from ddil_jax import build as build_lib
from ddil_jax import config as config_lib
from ddil_jax import files, measure
from ddil_jax.interop import clip, extractors, weights
from ddil_jax.main import main
from tests.running import SHORT, refuse, shared  # noqa: F401 (fixtures)

pytestmark = pytest.mark.xdist_group("extractors")
TEACHER = ("--config=configs/digits_teacher.py:smoke", *SHORT)
SMALL = dict(vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                image_size=16, patch_size=8),
             text_config=dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                              vocab_size=9, max_position_embeddings=4), projection_dim=6)


def random_weights(path, kind, fields=()):
  """A file as `ddil convert-extractor` writes it, with weights that keep the size of what passes."""
  entry = extractors.KINDS[kind]
  module, rng = entry.make(**dict(fields)), np.random.default_rng(0)

  def draw(leaf):
    fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 0
    return rng.standard_normal(leaf.shape) * (2 / fan_in)**0.5 if fan_in else rng.uniform(0.5, 1, leaf.shape)

  variables = jax.tree.map(lambda leaf: draw(leaf).astype(np.float32), weights.template(module, *entry.inputs(module)))
  flat = flax.traverse_util.flatten_dict(variables, sep="/")
  files.save_arrays(path, flat, {"kind": kind, "fields": dict(fields), "sources": {}})
  return path


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
  return random_weights(tmp_path_factory.mktemp("clip") / "clip.safetensors", "clip", clip.fields_of(SMALL))


@pytest.fixture(scope="module")
def alex(tmp_path_factory):
  return random_weights(tmp_path_factory.mktemp("alex") / "alex.safetensors", "lpips-alex")


def measured(**fields) -> dict[str, tuple[str, float]]:
  """metric -> (what it was measured by, value), of a network of random parameters."""
  fields = {"data.image_size": 32, "eval.num_samples": 24, "eval.batch_size": 24,
            "eval.sampler_steps": (), "objective.sampler_steps": 1} | {f"eval.{k}": v for k, v in fields.items()}
  config = config_lib.load("configs/digits_teacher.py:smoke", {name: str(value) for name, value in fields.items()})
  built = build_lib.build(config)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda p: p + 0.05 * rng.standard_normal(p.shape).astype(np.float32),
                        built.parts.init_student(jax.random.key(0), None))
  row, = measure.measure(config, built, params, None, shift=False)
  assert row["intervals"].keys() == (row["metrics"].keys() if config.eval.bootstrap else set())
  assert all(i["low"] <= row["metrics"][name] <= i["high"] for name, i in row["intervals"].items())
  return {name.partition("@")[0]: (name.partition("@")[2], value) for name, value in row["metrics"].items()}


@pytest.mark.slow
def test_published_weights(shared, small_clip, alex):  # noqa: F811
  """They give the features; whether the class is right is still for the small classifier to say."""
  fields = dict(metrics=("fd", "class_accuracy", "saturation"), extractor=f"clip:{small_clip}",
                lpips=f"lpips-alex:{alex}", num_samples=48)
  values = measured(**fields)
  train = values["fd"][0].split("/")[1]  # a published network does not say which train split that is
  assert re.fullmatch("fake-train-[0-9a-f]{8}", train)
  assert {metric: by.rpartition("-")[0] for metric, (by, _) in values.items()} == {
      "fd": f"48/{train}/clip-uint8", "class_accuracy": "48/-/fake-cnn", "saturation": "48/-/",
      "lpips_diversity": "48/-/lpips-alex-uint8"}
  assert values["fd"][1] > 0 and 0 < values["lpips_diversity"][1] < 10
  raw = measured(**fields, quantise=False, bootstrap=5)
  assert raw["fd"][0].startswith(f"48/{train}/clip-float-") and raw["lpips_diversity"][0].startswith("48/-/lpips-alex-fl")
  assert 0 < abs(raw["lpips_diversity"][1] / values["lpips_diversity"][1] - 1) < 0.1
  alone = measured(metrics=("class_accuracy",), num_samples=48)
  assert raw["class_accuracy"] == values["class_accuracy"] == alone["class_accuracy"]


def test_files_by_published_weights(shared, small_clip, tmp_path, capsys):  # noqa: F811
  """With them neither images nor reference need labels, nor a data set."""
  for seed, name in enumerate(("samples", "real")):
    np.save(tmp_path / f"{name}.npy", np.random.default_rng(seed).integers(0, 256, (30, 32, 32, 3), np.uint8))
  assert main(["evaluate", f"--images={tmp_path}/samples.npy", f"--reference={tmp_path}/real.npy",
               f"--extractor=clip:{small_clip}", "--metrics=fd,vendi", f"--out={tmp_path}/out.json"]) == 0
  result = files.read_json(tmp_path / "out.json")
  assert result["extractor"].startswith("clip-uint8-")
  assert result["metrics"].keys() == {f"fd@30/{result['reference']}/{result['extractor']}",
                                      f"vendi@30/-/{result['extractor']}"}
  assert result["reference"].startswith("real-") and "real-" in capsys.readouterr().out


def test_the_name_follows_the_weights(shared, small_clip, tmp_path):  # noqa: F811
  arrays, about = files.load_arrays(small_clip)
  other = tmp_path / "other.safetensors"
  files.save_arrays(other, arrays | {"params/logit_scale": arrays["params/logit_scale"] + 1}, about)
  first, second = (measured(metrics=("vendi",), extractor=f"clip:{path}")["vendi"][0]
                   for path in (small_clip, other))
  assert first != second


def test_refusals_before_training(refuse, small_clip, alex, tmp_path):  # noqa: F811
  def line(*fields):
    said = refuse("train", *TEACHER, f"--workdir={tmp_path / 'w'}", *(f"--config.eval.{field}" for field in fields))
    assert not (tmp_path / "w").exists()
    return said

  said = line("extractor=inception:nowhere.safetensors")
  assert "pt_inception-2015-12-05-6726825d.pth" in said and "ddil convert-extractor" in said
  assert "the small classifier" in said
  assert "did you mean inception" in line("extractor=incepton:x")
  assert "has no path" in line("extractor=clip")
  assert f"{small_clip} holds 'clip', not 'inception'" in line(f"extractor=inception:{small_clip}")
  said = line(f"extractor=clip:{small_clip}", "metrics=('inception_score','inception_score_std')", "num_samples=20")
  assert "needs logits" in said and "clip-uint8" in said
  assert "lpips-alex:FILE" in line(f"lpips=clip:{small_clip}")
  said = refuse("train", *TEACHER, f"--workdir={tmp_path / 'w'}", f"--config.eval.lpips=lpips-alex:{alex}",
                "--config.data.image_size=32", "--config.eval.num_samples=39", "--config.eval.bootstrap=5")
  assert "needs 4 samples of each of the 10 classes, as the bootstrap halves them; num_samples is 39" in said
  assert "images of 8x8 pixels are too small" in line(f"lpips=lpips-alex:{alex}")
  (tmp_path / "short").write_bytes(alex.read_bytes()[:-9])
  assert "short is damaged" in line(f"lpips=lpips-alex:{tmp_path / 'short'}")
