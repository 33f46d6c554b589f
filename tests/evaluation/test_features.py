import logging
import time

import flax.linen as nn
import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import features as f
from ddil_jax.training import parallel


class Cnn(nn.Module):
  """Two convolutions; (logits [B,K], features [B,32])."""

  num_classes: int = 10
  act: object = nn.relu

  @nn.compact
  def __call__(self, x):
    x = self.act(nn.Conv(16, (3, 3))(x))
    x = self.act(nn.Conv(32, (3, 3), strides=2)(x))
    x = self.act(nn.Dense(32)(x.reshape(x.shape[0], -1)))
    return nn.Dense(self.num_classes)(x), x


class Tiny(nn.Module):
  """Quick to compile, for the tests of the cache."""

  num_classes: int = 10
  act: object = nn.relu

  @nn.compact
  def __call__(self, x):
    x = self.act(nn.Dense(8)(x.reshape(x.shape[0], -1)))
    return nn.Dense(self.num_classes)(x), x


class WithStatistics(nn.Module):

  @nn.compact
  def __call__(self, x):
    h = nn.BatchNorm(use_running_average=True)(x).reshape(x.shape[0], -1)
    return nn.Dense(10)(h), h


pytestmark = pytest.mark.xdist_group("features")  # its fixture is made once


@pytest.fixture(scope="module")
def digits():
  data = load_digits()
  return (data.images[..., None] / 8 - 1).astype(np.float32), data.target


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
  images, labels = train_part(digits)
  cache, done = tmp_path_factory.mktemp("cache"), []
  start = time.process_time()
  extractor = f.train_classifier(Cnn(), images, labels, 10, cache, "digits-cnn", progress=done.append)
  assert done == list(range(1, f.STEPS + 1))
  return extractor, cache, time.process_time() - start


def train_part(digits):
  held_out = np.arange(len(digits[0])) % 4 == 0  # the file is ordered by writer: spread over all
  return [x[~held_out] for x in digits]


def quick(digits, cache, **kw):
  images, labels = digits
  defaults = {"module": Tiny(), "images": images[:200], "labels": labels[:200], "num_classes": 10,
              "cache_dir": cache, "name": "few", "steps": 3, "batch_size": 16}
  return f.train_classifier(**defaults | kw)


def test_it_learns_digits_in_seconds(digits, trained):
  images, labels = digits
  extractor, _, seconds = trained
  accuracy = np.mean(extractor.logits(images[::4]).argmax(axis=1) == labels[::4])
  assert accuracy > 0.97
  assert seconds < 30  # 15 on an idle core
  assert extractor.num_classes == 10
  name, tag = extractor.name.rsplit("-", 1)
  assert name == "digits-cnn" and len(tag) == 8 and int(tag, 16) >= 0


def test_outputs_do_not_depend_on_how_images_are_handed_over(digits, trained):
  images, _ = digits
  extractor = trained[0]
  logits, features = extractor.outputs(images[:300])
  assert logits.shape == (300, 10) and features.shape == (300, 32) and features.dtype == np.float32
  pieces = np.concatenate([extractor.features(images[i:i + 7]) for i in range(0, 300, 7)][:43])[:300]
  np.testing.assert_allclose(pieces, features, atol=1e-5)
  np.testing.assert_array_equal(extractor.features(images[:300]), features)
  p = f.probabilities(logits[:20])
  np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-12)
  np.testing.assert_array_equal(p.argmax(axis=1), logits[:20].argmax(axis=1))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_outputs_do_not_depend_on_the_devices(digits, trained, count):
  images, _ = digits
  devices = parallel.spread("mesh", jax.devices()[:count])
  sizes = []

  def outputs(x):
    sizes.append((len(x), len(x.sharding.device_set)))
    return x.mean(axis=(1, 2)), x.reshape(len(x), -1)

  mean, flat = f.in_batches(outputs, images[:70], devices, batch_size=32)
  np.testing.assert_array_equal(flat, images[:70].reshape(70, -1))
  np.testing.assert_allclose(mean, images[:70].mean(axis=(1, 2)), atol=1e-6)
  assert sizes == [({1: 32, 3: 33, 8: 32}[count], count)] * 3
  few = f.make_extractor(Tiny(), Tiny().init(jax.random.key(0), images[:1]), images.shape[1:], "few")
  spread = f.make_extractor(Tiny(), Tiny().init(jax.random.key(0), images[:1]), images.shape[1:], "few", devices)
  assert spread.name == few.name
  np.testing.assert_allclose(spread.features(images[:300]), few.features(images[:300]), atol=1e-5)


def test_the_cache_returns_the_same_extractor(digits, trained, monkeypatch):
  images, labels = train_part(digits)
  extractor, cache, _ = trained
  monkeypatch.setattr(f, "_fit", None)  # training again would fail
  again = f.train_classifier(Cnn(), images, labels, 10, cache, "digits-cnn")
  assert again.name == extractor.name
  np.testing.assert_array_equal(again.features(images[:9]), extractor.features(images[:9]))
  assert len(list(cache.iterdir())) == 1


def test_the_name_follows_parameters_and_the_file_the_recipe(digits, cached, tmp_path):
  _, labels = digits
  name, file, content = cached
  assert quick(digits, tmp_path).name == name  # training is reproducible
  assert (tmp_path / file).read_bytes() == content
  others = [quick(digits, tmp_path, labels=(labels[:200] + 1) % 10),
            quick(digits, tmp_path, module=Tiny(act=nn.silu)), quick(digits, tmp_path, seed=1)]
  assert len({name, *(e.name for e in others)}) == 4
  assert len(list(tmp_path.iterdir())) == 4


@pytest.fixture(scope="module")
def cached(digits, tmp_path_factory):
  """A quick extractor's name, the name of its cache file and the content."""
  folder = tmp_path_factory.mktemp("quick")
  extractor = quick(digits, folder)
  path, = folder.iterdir()
  return extractor.name, path.name, path.read_bytes()


@pytest.mark.parametrize("damage", ["flip", "truncate", "pickle", "empty"])
def test_a_damaged_cache_is_made_again(digits, cached, tmp_path, damage, caplog):
  name, file, good = cached
  path = tmp_path / file
  flipped = bytearray(good)
  flipped[-5] ^= 0x10
  bad = {"flip": bytes(flipped), "truncate": good[:-40], "pickle": b"\x80\x04K\x01.", "empty": b""}
  path.write_bytes(bad[damage])
  with caplog.at_level(logging.WARNING):
    again = quick(digits, tmp_path)
  assert again.name == name
  assert path.name in caplog.text and "again" in caplog.text
  assert path.read_bytes() == good


def test_a_cache_of_other_code_is_made_again(digits, cached, tmp_path, caplog, monkeypatch):
  name, file, before = cached
  path = tmp_path / file
  path.write_bytes(before)
  # The same fields and parameters, another computation.
  call = Tiny.__call__
  monkeypatch.setattr(Tiny, "__call__", lambda self, x: [2 * y for y in call(self, x)])
  with caplog.at_level(logging.WARNING):
    quick(digits, tmp_path)
  assert "belongs to another version of the classifier" in caplog.text
  assert path.read_bytes() != before
  assert name.encode() in before


def test_shifts_move_by_fractions_and_repeat_the_edge():
  x = np.arange(12, dtype=np.float32).reshape(3, 4, 1)
  right, half_down, still = f._shift(np.stack([x, x, x]), np.array([[0.0, 1.0], [0.5, 0.0], [0.0, 0.0]]))
  np.testing.assert_allclose(right[..., 0], [[1, 2, 3, 3], [5, 6, 7, 7], [9, 10, 11, 11]])
  np.testing.assert_allclose(half_down[..., 0], [[2, 3, 4, 5], [6, 7, 8, 9], [8, 9, 10, 11]])
  np.testing.assert_array_equal(still, x)


def test_bad_input_is_named(digits, trained, tmp_path):
  images, labels = digits
  few = images[:200]
  with pytest.raises(UsageError, match=r"images lie in 0..16; expected \[-1, 1\]"):
    quick(digits, None, images=8 * (few + 1))
  with pytest.raises(UsageError, match="labels lie in 0..9; expected 0..4"):
    quick(digits, None, num_classes=5)
  with pytest.raises(UsageError, match="expected 200 integers"):
    quick(digits, None, labels=labels[:10])
  with pytest.raises(UsageError, match="the classifier has 7 logits; the data has 10 classes"):
    quick(digits, None, module=Tiny(num_classes=7))
  with pytest.raises(UsageError, match=r"collections \['batch_stats', 'params'\]"):
    quick(digits, None, module=WithStatistics())
  with pytest.raises(UsageError, match="name 'a/b' of the extractor"):
    quick(digits, None, name="a/b")
  with pytest.raises(UsageError, match=r"images of shape \(28, 28, 1\); expected \(8, 8, 1\)"):
    trained[0].features(np.zeros((2, 28, 28, 1), np.float32))
  bad = few.copy()
  bad[17, 0, 0] = np.nan
  with pytest.raises(UsageError, match="images has non-finite numbers in 1 of 200 rows, first row 17"):
    trained[0].features(bad)
  (tmp_path / "file").write_text("")
  with pytest.raises(UsageError, match="cannot write"):
    quick(digits, tmp_path / "file")
