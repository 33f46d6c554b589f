"""`ddil evaluate --images`: measures files as arrays are measured, and refuses what does not fit in one line."""

import json
import os
import pathlib
import tracemalloc

import jax
import numpy as np
import pytest
from PIL import Image

from ddil_jax import build, measure, measure_files
from ddil_jax import config as config_lib
from ddil_jax.data import image_files, pipeline
from ddil_jax.evaluation import results
from ddil_jax.main import main
from tests.running import refuse, shared  # noqa: F401 (fixtures)

pytestmark = pytest.mark.xdist_group("main")
FAKE = ("--reference=fake/train", "--config.data.image_size=8")


@pytest.fixture(scope="module")
def samples(shared, tmp_path_factory):  # noqa: F811
  """Noisy images of the fake set as uint8, their labels, and the folder of all files."""
  data = pipeline.load("fake", split="test", image_size=8)
  rng = np.random.default_rng(0)
  pixels = np.clip((data.images + 0.2 * rng.standard_normal(data.images.shape) + 1) * 127.5, 0, 255).astype(np.uint8)
  root = tmp_path_factory.mktemp("samples")
  np.save(root / "u8.npy", pixels)
  np.save(root / "f32.npy", (pixels / 127.5 - 1).astype(np.float32))
  np.savez_compressed(root / "z.npz", images=pixels, labels=data.labels)
  for i, (image, label) in enumerate(zip(pixels, data.labels)):
    path = root / "folder" / str(label) / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.squeeze()).save(path)
  return pixels, data.labels, root


def evaluate(*arguments) -> dict:
  """The result that the command writes."""
  out = pathlib.Path(os.environ["DDIL_DATA"]) / "out.json"
  assert main(["evaluate", *map(str, arguments), f"--out={out}"]) == 0
  return json.loads(out.read_text())


def test_files_are_measured_as_arrays_are(samples, capsys):
  pixels, labels, root = samples
  names = ",".join(results.METRICS)
  result = evaluate(f"--images={root / 'z.npz'}", *FAKE, f"--metrics={names}", "--bootstrap=10")
  config = config_lib.defaults({"data.name": "fake", "data.image_size": "8"})
  train = pipeline.load("fake", image_size=8)
  extractor = build.load_classifier(config, train)
  expected = results.evaluate((pixels / 127.5 - 1).astype(np.float32), labels, train.images, "train", extractor,
                              options=results.Options(bootstrap=10))
  assert set(result["metrics"]) == set(expected.values)
  for name, value in expected.values.items():
    assert result["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert result["intervals"][name] == pytest.approx(expected.intervals[name]._asdict(), rel=1e-4, abs=1e-5), name
  assert result["num"] == len(pixels) and result["extractor"] == extractor.name
  assert result["seconds"] > 0 and result["peak_memory_mib"] > 50 and "jax" in result["versions"]
  said = capsys.readouterr().out.splitlines()
  assert len(said) == 1 + len(results.METRICS) and "[" in said[1]


def test_every_kind_of_file_gives_the_same(samples):
  _, _, root = samples
  fd = lambda r: next(v for k, v in r["metrics"].items() if k.startswith("fd@"))  # noqa: E731
  found = {kind: evaluate(f"--images={root / kind}", *FAKE) for kind in ("u8.npy", "f32.npy", "z.npz", "folder")}
  for result in found.values():
    assert fd(result) == pytest.approx(fd(found["u8.npy"]), rel=1e-4)
  # Without labels class accuracy is left out; folders named by the classes' numbers are labels.
  accuracy = {kind: [v for k, v in r["metrics"].items() if k.startswith("class_accuracy@")] for kind, r in found.items()}
  assert accuracy["u8.npy"] == [] and accuracy["folder"] == accuracy["z.npz"] != []
  assert len({r["content"] for r in found.values()}) == 4


def test_a_reference_in_files_trains_its_classifier_and_is_cached(samples, tmp_path, monkeypatch):
  pixels, labels, root = samples
  np.savez(tmp_path / "ref set.npz", images=pixels[:, ::2, ::2], labels=labels % 3)
  np.save(tmp_path / "small.npy", pixels[1::2, ::2, ::2])
  first = evaluate(f"--images={tmp_path / 'small.npy'}", f"--reference={tmp_path / 'ref set.npz'}")
  name = first["reference"]
  assert name.startswith("ref_set-") and first["extractor"].startswith("ref_set-cnn-")
  assert f"fd@{len(pixels) // 2}/{name}/{first['extractor']}" in first["metrics"]
  cached = [p.name for p in build.cache_dir(config_lib.defaults()).glob(f"{first['extractor']}-on-*")]
  assert len(cached) == 1
  results._memory.clear()
  monkeypatch.setattr(measure.features, "_fit", None)  # training again would fail
  assert evaluate(f"--images={tmp_path / 'small.npy'}", f"--reference={tmp_path / 'ref set.npz'}")["metrics"] == \
      first["metrics"]


def test_a_data_set_lends_its_classifier(samples):
  _, _, root = samples
  result = evaluate(f"--images={root / 'folder'}", f"--reference={root / 'u8.npy'}", "--config.data.name=fake",
                    "--config.data.image_size=8", "--metrics=fd,class_accuracy")
  assert result["extractor"].startswith("fake-cnn-") and result["reference"].startswith("u8-")
  assert any(name.startswith("class_accuracy@") for name in result["metrics"])


def test_numbers_do_not_depend_on_the_devices(samples, monkeypatch):
  _, _, root = samples
  metrics = {}
  spread = measure.parallel.spread
  for count in (1, 3, 8):
    monkeypatch.setattr(measure.parallel, "spread", lambda mode, n=count: spread("mesh", jax.devices()[:n]))
    results._memory.clear()
    metrics[count] = evaluate(f"--images={root / 'z.npz'}", *FAKE)["metrics"]
  for count in (3, 8):
    assert metrics[count] == pytest.approx(metrics[1], rel=1e-4, abs=1e-4)


def test_images_are_not_held_in_memory(samples, tmp_path):
  """65,536 images of 8x8 are 16 MiB as floats, 32 as doubles; held are their features, 8 MiB, and a batch."""
  num = 65_536
  np.save(tmp_path / "many.npy", np.resize(samples[0], (num, 8, 8, 1)))
  given, train = image_files.open_images(tmp_path / "many.npy"), pipeline.load("fake", image_size=8)
  extractor = build.load_classifier(config_lib.defaults({"data.name": "fake", "data.image_size": "8"}), train)
  arguments = ("train", extractor, ("fd", "saturation"))
  results.evaluate(train.images, None, train.images, *arguments)  # compiles
  tracemalloc.start()
  measured = results.evaluate(given.batches(), None, train.images, *arguments)
  peak = tracemalloc.get_traced_memory()[1] / 2**20
  tracemalloc.stop()
  assert len(measured.values) == 2 and 8 < peak < 20, peak


@pytest.mark.parametrize("arguments, words", [
    ((), ["either --workdir", "or --images"]),
    (("--workdir=w", "--images=x"), ["either --workdir", "or --images"]),
    (("--images={root}/u8.npy",), ["--images needs --reference"]),
    (("--workdir=w", "--reference=x"), ["--reference needs --images"]),
    (("--workdir=w", "--out=x"), ["--out needs --images"]),
    (("--images={root}/u8.npy", "--shift", *FAKE), ["--shift needs --workdir"]),
    (("--images={root}/none", *FAKE), ["no folder or file", "none"]),
    (("--images={root}/u8.npy", "--reference=fak/train"), ["no reference fak/train", "fake"]),
    (("--images={root}/u8.npy", *FAKE, "--metrics=fdd"), ["unknown metric 'fdd'", "did you mean fd"]),
    (("--images={root}/u8.npy", *FAKE, "--metrics=class_accuracy"), ["class_accuracy", "u8.npy has no labels"]),
    (("--images={root}/u8.npy", *FAKE, "--bootstrap=1"), ["bootstrap is 1"]),
    (("--images={root}/u8.npy", *FAKE, "--bootstrap=few"), ["config.eval.bootstrap=few", "int"]),
    (("--images={root}/u8.npy", "--reference=fake/train", "--config.data.image_size=16"),
     ["images of 8x8x1", "reference fake/train of 16x16x1", "image_size"]),
    (("--images={root}/u8.npy", "--reference={root}/f32.npy"), ["has no labels to train the small classifier on"]),
    (("--images={root}/few.npy", *FAKE), ["precision needs at least 6 samples (5 neighbours); there are 4"]),
    (("--images={root}/u8.npy", "--reference={root}/few.npy"), ["precision needs at least 6 reference images", "4"]),
    (("--images={root}/strange", *FAKE, "--metrics=class_accuracy"), ["class 'cat'", "the classes are 0, 1"]),
    (("--images={root}/wrong.npz", *FAKE, "--metrics=class_accuracy"), ["lie in 0..99; expected 0..9"]),
    (("--images={root}/empty", *FAKE), ["empty holds no images"]),
])
def test_mistakes_are_refused_in_one_line(samples, refuse, tmp_path, monkeypatch, arguments, words):  # noqa: F811
  pixels, _, root = samples
  monkeypatch.chdir(tmp_path)
  np.save(root / "few.npy", pixels[:4])
  np.savez(root / "wrong.npz", images=pixels, labels=np.where(np.arange(len(pixels)) == 7, 99, 0))
  (root / "empty").mkdir(exist_ok=True)
  for name in ("cat", "1"):
    (root / "strange" / name).mkdir(parents=True, exist_ok=True)
    for i in range(6):
      Image.fromarray(pixels[i].squeeze()).save(root / "strange" / name / f"{i}.png")
  line = refuse("evaluate", *(a.format(root=root) for a in arguments))
  assert all(word in line for word in words), line
  assert not list(tmp_path.iterdir())


def test_results_of_unlike_references_are_not_compared(samples):
  """The same numbers of images and extractor, another set of the same name: the names differ."""
  _, _, root = samples
  fields = ("--config.data.name=fake", "--config.data.image_size=8", "--metrics=fd")
  a = evaluate(f"--images={root / 'u8.npy'}", f"--reference={root / 'u8.npy'}", *fields)["metrics"]
  b = evaluate(f"--images={root / 'u8.npy'}", f"--reference={root / 'f32.npy'}", *fields)["metrics"]
  with pytest.raises(measure_files.UsageError, match="cannot be compared: they differ in reference"):
    results.compare(a, b)
