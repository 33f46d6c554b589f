"""Converted networks against PyTorch on random weights, and what converting refuses; by the command line."""

import functools
import pathlib
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from ddil_jax import files
from ddil_jax.errors import UsageError
from ddil_jax.interop import extractors, weights
from ddil_jax.main import main
from ddil_jax.models.inception import InceptionV3
from ddil_jax.models.lpips import MIN_SIZE
from tests.running import refuse  # noqa: F401 (a fixture)

torch = pytest.importorskip("torch", reason="parity needs PyTorch: pip install -r requirements-test.txt")
from tests.interop import published  # noqa: E402

pytestmark = pytest.mark.xdist_group("extractors")
TOLERANCE = dict(rtol=1e-4, atol=1e-4)


def take_as_published(patch, kind, *paths):
  """Makes the hash of files the one that is expected: the published weights cannot be here."""
  entry = extractors.KINDS[kind]
  sources = [p._replace(sha256=weights.sha256(path)) for p, path in zip(entry.sources, paths)]
  patch.setitem(extractors.KINDS, kind, entry._replace(sources=tuple(sources)))


def channels_first(images):
  return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def some_images(shape, seed=0):
  """Samples that leave [-1, 1], none of them near the middle between two 8-bit levels."""
  rng = np.random.default_rng(seed)
  return ((rng.integers(-30, 286, shape) + rng.uniform(-0.4, 0.4, shape)) / 127.5 - 1).astype(np.float32)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
  """(file of random weights as published, the converted file, images, PyTorch's logits and features)."""
  folder = tmp_path_factory.mktemp("inception")
  source, out = folder / "inception.pth", folder / "inception.safetensors"
  images, w = some_images((2, 8, 8, 1)), published.Weights()
  levels = torch.from_numpy((images * 127.5 + 128).clip(0, 255).astype(np.uint8).transpose(0, 3, 1, 2))
  x = 2 * torch.nn.functional.interpolate(levels.float().repeat(1, 3, 1, 1) / 255, (299, 299), mode="bilinear",
                                          align_corners=False) - 1
  logits, features = published.inception(w, x)
  torch.save(w.state, source)
  with pytest.MonkeyPatch.context() as patch:
    take_as_published(patch, "inception", source)
    assert main(["convert-extractor", "--kind=inception", str(source), f"--out={out}"]) == 0
  return source, out, images, logits.numpy(), features.numpy()


def test_inception(inception):
  """From images as samples come, through quantisation and resize, to logits and features."""
  _, out, images, logits, features = inception
  name, module, variables = extractors.from_config(f"inception:{out}", True)
  assert name == "inception-torch-uint8" and module == InceptionV3("torch", True)
  ours = jax.jit(module.apply)(variables, images)
  assert features.std() > 0.5 and logits.std() > 0.5
  np.testing.assert_allclose(ours[0], logits, **TOLERANCE)
  np.testing.assert_allclose(ours[1], features, **TOLERANCE)


@pytest.mark.parametrize("resize, quantise, pixels", [
    ("torch", False, lambda x: x), ("torch", True, lambda x: np.floor(127.5 * x + 128) / 127.5 - 1),
    ("tf1", True, lambda x: (np.floor(127.5 * x + 128) - 128) / 128),
    ("clean", False, lambda x: (127.5 * x - 0.5) / 128)])
def test_inceptions_pixels(monkeypatch, resize, quantise, pixels):
  """What the first layer gets; images of 299x299 are not resized. The resizes themselves: test_preprocess.py."""
  seen = []

  def stop(self, x):
    seen.append(np.asarray(x))
    raise StopIteration

  monkeypatch.setattr("ddil_jax.models.inception.Conv.__call__", stop)
  x = some_images((1, 299, 299, 3)).clip(-1, 1)
  with pytest.raises(StopIteration):
    InceptionV3(resize, quantise).init(jax.random.key(0), x)
  np.testing.assert_allclose(seen[0], pixels(x), atol=1e-5)


@pytest.fixture(scope="module")
def lpips(tmp_path_factory):
  """net -> (converted file, images a, images b, PyTorch's distances)."""
  @functools.cache
  def make(net):
    folder, size = tmp_path_factory.mktemp(net), MIN_SIZE[net]
    a, b = some_images((3, size, size + 2, 3)), some_images((3, size, size + 2, 3), 1)
    a[2] = b[2]
    w, backbone, heads, out = published.Weights(), folder / "backbone.pth", folder / "heads.pth", folder / "converted"
    wanted = published.lpips(w, channels_first(a), channels_first(b), net).numpy()
    torch.save({k: v for k, v in w.state.items() if not k.startswith("lin")}, backbone)
    torch.save({k: v for k, v in w.state.items() if k.startswith("lin")}, heads)
    with pytest.MonkeyPatch.context() as patch:
      take_as_published(patch, f"lpips-{net}", backbone, heads)
      assert main(["convert-extractor", f"--kind=lpips-{net}", str(backbone), str(heads), f"--out={out}"]) == 0
    return out, a, b, wanted
  return make


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips(lpips, net):
  out, a, b, wanted = lpips(net)
  module, variables = extractors.load(out, f"lpips-{net}")
  assert wanted[:2].min() > 0.1 and wanted[2] == 0
  distance = jax.jit(functools.partial(module.apply, method="distance"))(variables, a, b)
  np.testing.assert_allclose(distance, wanted, **TOLERANCE)
  with pytest.raises(UsageError, match=f"at least {MIN_SIZE[net]} are needed"):
    module.apply(variables, a[:, 1:])


def test_published_names():
  """The hashes that the published names carry, in full where the file is at hand in a package."""
  sources = [p for kind in extractors.KINDS.values() for p in kind.sources if p.sha256]
  assert [p.name for p in sources if p.sha256 in p.name] == [
      "pt_inception-2015-12-05-6726825d.pth", "alexnet-owt-7be5be79.pth", "vgg16-397923af.pth"]
  assert all(len(p.sha256) == (8 if p.sha256 in p.name else 64) for p in sources)


def test_wrong_file(refuse, inception, tmp_path):  # noqa: F811
  convert = ("convert-extractor", f"--out={tmp_path / 'out.safetensors'}")
  line = refuse(*convert, "--kind=inception", inception[0])
  assert weights.sha256(inception[0])[:8] in line and "6726825d" in line
  assert "pt_inception-2015-12-05-6726825d.pth" in line and "github.com/mseitzer/pytorch-fid" in line
  line = refuse(*convert, "--kind=incepton", inception[0])
  assert "'incepton'" in line and "did you mean inception" in line and "lpips-vgg" in line
  line = refuse(*convert, "--kind=lpips-alex", inception[0])
  assert "alexnet-owt-7be5be79.pth" in line and "alex.pth" in line and "1 paths" in line
  line = refuse(*convert, "--kind=inception", tmp_path / "nowhere.pth")
  assert "nowhere.pth" in line and "No such file" in line
  refuse(*convert, "--kind=inception", tmp_path)
  refuse(*convert, "--kind=inception", inception[0], "--config.seed=1")
  assert not list(tmp_path.iterdir())


def test_what_is_in_a_file_is_checked(refuse, tmp_path, monkeypatch):  # noqa: F811
  """A right hash is not enough."""
  w, x, backbone, heads = published.Weights(), torch.zeros(1, 3, 31, 31), tmp_path / "alex.pth", tmp_path / "heads.pth"
  published.lpips(w, x, x, "alex")
  torch.save({}, heads)

  def attempt(content) -> str:
    backbone.write_bytes(content) if isinstance(content, bytes) else torch.save(content, backbone)
    take_as_published(monkeypatch, "lpips-alex", backbone, heads)
    line = refuse("convert-extractor", "--kind=lpips-alex", backbone, heads, f"--out={tmp_path / 'out'}")
    assert "alex.pth" in line
    return line

  torch.save(w.state, backbone)
  whole = backbone.read_bytes()
  for part in (whole[:-1000], whole[:1000], b"", b"\x80\x04K\x01."):
    assert "damaged" in attempt(part)
  assert "other things than tensors" in attempt({"lin0": pathlib.Path("x")})
  assert "no state dict" in attempt([torch.zeros(2)])
  name = "features.6.weight"
  assert f"{name} is missing" in attempt({k: v for k, v in w.state.items() if k != name})
  assert "features.7.weight is unknown" in attempt(w.state | {"features.7.weight": torch.zeros(2)})
  line = attempt(w.state | {name: w.state[name][:300]})
  assert f"{name} has shape (300, 192, 3, 3), which does not fit (3, 3, 192, 384)" in line
  assert f"{name} has values that are not finite" in attempt(w.state | {name: w.state[name] / 0})
  assert "; 10 more such" in attempt({"a": torch.zeros(1)})
  # The distance is that of an embedding only if no head is negative.
  assert "negative weights" in attempt({k: -v if k.startswith("lin3") else v for k, v in w.state.items()})
  assert not (tmp_path / "out").exists()


def test_without_torch(refuse, inception, tmp_path, monkeypatch):  # noqa: F811
  take_as_published(monkeypatch, "inception", inception[0])
  monkeypatch.setitem(sys.modules, "torch", None)
  line = refuse("convert-extractor", "--kind=inception", inception[0], f"--out={tmp_path / 'out'}")
  assert "PyTorch is needed" in line and "pip install torch" in line
  extractors.load(inception[1], "inception")  # the converted file needs none


def test_converted_files_are_checked(lpips, tmp_path):
  def message(path, kind="lpips-alex"):
    with pytest.raises(UsageError) as error:
      extractors.load(path, kind)
    return str(error.value)

  line = message(tmp_path / "nowhere.safetensors", "inception")
  assert all(word in line for word in (
      "nowhere.safetensors", "pt_inception-2015-12-05-6726825d.pth", "https://github.com/mseitzer/pytorch-fid",
      "ddil convert-extractor --kind=inception", "small classifier"))
  good = lpips("alex")[0]
  content = good.read_bytes()
  for name, part in (("short", content[:-100]), ("flipped", content[:-100] + b"x" * 100), ("none", b""),
                     ("foreign", safetensors.numpy.save({"a": np.zeros(2)}))):
    (tmp_path / name).write_bytes(part)
    line = message(tmp_path / name)
    assert name in line and "convert the published files again: `ddil convert-extractor" in line
  assert "published files again" in message(good.parent / "heads.pth")  # not converted at all
  assert "holds 'lpips-alex', not 'clip'" in message(good, "clip")
  arrays, about = files.load_arrays(good)
  files.save_arrays(tmp_path / "old", {k: v for k, v in arrays.items() if "lin3" not in k}, about)
  assert "another version (missing: params/lin3 (256,))" in message(tmp_path / "old")
  files.save_arrays(tmp_path / "old", arrays, "something")
  assert "holds 'another file'" in message(tmp_path / "old")


@pytest.mark.parametrize("text, words", [
    ("incepton:x", ["unknown extractor 'incepton'", "did you mean inception", "clip"]),
    ("inception", ["inception:FILE.safetensors"]), ("weights.pth", ["unknown extractor"])])
def test_names_in_configs(text, words):
  with pytest.raises(UsageError) as error:
    extractors.from_config(text, True)
  assert all(word in str(error.value) for word in words)


def test_preprocessing_is_in_the_name(inception):
  name, module, _ = extractors.from_config(f"inception-tf1:{inception[1]}", False)
  assert name == "inception-tf1-float" and module == InceptionV3("tf1", False)
