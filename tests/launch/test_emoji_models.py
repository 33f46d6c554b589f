"""The demo's emoji and small networks: what is read, what is drawn, and that the files are read by what reads Stable
Diffusion's."""

import io
import json
import os
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddil_jax.interop import clip, diffusers, extractors
from launch import emoji as emoji_lib
from launch import emoji_models

pytestmark = pytest.mark.xdist_group("extractors")
REAL = pathlib.Path(os.environ.get("DDIL_DATA_DIR") or pathlib.Path(__file__).parents[3] / "shared" / "data") / "emoji"
# 22 emoji, one of them in six skin tones, one for two people.
FILES = [f"emoji_u26{i:02x}.png" for i in range(20)] + [
    "emoji_u1f44b.png", *(f"emoji_u1f44b_1f3f{tone}.png" for tone in "bcdef"),
    "emoji_u1f469_200d_1f468.png", "emoji_u1f469_1f3fb_200d_1f468_1f3ff.png"]


def write(folder, rows=None):
  """Two-coloured squares, half of them transparent, and captions of two words."""
  rng = np.random.default_rng(0)
  folder.mkdir(exist_ok=True)
  with zipfile.ZipFile(folder / emoji_lib.ARCHIVE, "w") as archive:
    for name in FILES:
      pixels = np.repeat(np.repeat(rng.integers(0, 256, (2, 2, 4)), 32, axis=0), 32, axis=1).astype(np.uint8)
      pixels[..., 3] = np.where(np.arange(64) < 32, 255, 0)
      data = io.BytesIO()
      Image.fromarray(pixels, "RGBA").save(data, "PNG")
      archive.writestr(name, data.getvalue())
  rows = rows or [{"file": name, "caption": f" square {i}", "keywords": ["box", "two  words"][:i % 3]}
                  for i, name in enumerate(FILES)]
  (folder / emoji_lib.CAPTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(the data's folder, a folder of networks after two steps of training)."""
  base = tmp_path_factory.mktemp("emoji")
  data, out = write(base / "data"), base / "out"
  assert emoji_models.main([f"--data={data}", f"--out={out}", "--smoke"]) == 0
  return data, out


def test_emoji(tmp_path):
  emoji = emoji_lib.load(write(tmp_path / "data"))
  assert emoji.images.shape == (28, 32, 32, 3) and emoji.images.dtype == np.uint8
  assert (emoji.images[:, :, 20:] == 255).all() and (emoji.images[:, :, :12] < 255).any(axis=(1, 2, 3)).all()
  assert emoji.captions[3] == "square 3" and emoji.keywords[2] == ("box", "two words")
  of = dict(zip(FILES, emoji.concepts, strict=True))
  assert len(set(of.values())) == 22
  assert len({number for name, number in of.items() if name.startswith("emoji_u1f44b")}) == 1
  assert of[FILES[-1]] == of[FILES[-2]] and 2 <= emoji.is_test.sum() < 8
  assert not set(emoji.concepts[emoji.is_test]) & set(emoji.concepts[~emoji.is_test])


def test_a_batch_has_each_emoji_once_and_all_skin_tones_in_turn():
  concepts, rng = np.array([0, 1, 1, 1, 2, 3, 3]), np.random.default_rng(0)
  drawn = [emoji_models.pick(rng, concepts, 3) for _ in range(200)]
  assert all(len(set(concepts[index])) == 3 for index in drawn)
  counts = np.bincount(np.concatenate(drawn), minlength=7)
  assert counts.min() > 20 and (np.bincount(concepts, counts) > 120).all()
  assert set(concepts[emoji_models.pick(rng, concepts, 9)]) == {0, 1, 2, 3}


def test_refuses(tmp_path, capsys):
  run = lambda: emoji_models.main([f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'out'}"])  # noqa: E731
  for spoil, words in ((lambda folder: None, "cannot read"),
                       (lambda folder: write(folder, [{"file": "a.png", "caption": "a"}]), "line 1 is not"),
                       (lambda folder: write(folder, [{"file": "a.png", "caption": "a", "keywords": []}]),
                        "a.png cannot be read"),
                       (lambda folder: write(folder, [{"file": name, "caption": "a", "keywords": []}
                                                      for name in FILES[:19]]), "19 emoji; at least 20 are needed"),
                       (lambda folder: (write(folder) / emoji_lib.ARCHIVE).write_bytes(b"PK"), "cannot read")):
    spoil(tmp_path / "data")
    assert run() == 2
    line = capsys.readouterr().err
    assert words in line and line.startswith("ddil: ") and line.count("\n") == 1
  assert not (tmp_path / "out").exists()


@pytest.mark.slow  # compiling the networks takes half a minute
def test_the_autoencoder(made):
  data, out = made
  module, params, about = diffusers.load(out / emoji_models.VAE)
  images = emoji_lib.load(data).images / np.float32(127.5) - 1
  mean, std = module.apply({"params": params}, images, method="encode")
  assert mean.shape == std.shape == (28, 8, 8, 4)
  assert np.std(mean) == pytest.approx(1, abs=0.2)  # of the scaling factor, which is of the training images
  assert module.apply({"params": params}, mean, method="decode").shape == images.shape
  with Image.open(out / emoji_models.RECONSTRUCTIONS) as picture:
    assert picture.size == (64, 64 + 1 + 64)  # one image above what became of it


@pytest.mark.slow
def test_the_text_encoder_is_that_of_clip(made):
  _, out = made
  tokens = clip.tokenize(out / emoji_models.TOKENIZER, ["square 3", "two words", "Zebra, 12"], emoji_models.LENGTH)
  assert tokens.shape == (3, 16) and (tokens[:, 0] == 0).all() and (tokens == 1).any(axis=1).all()
  module, variables = extractors.load(out / emoji_models.CLIP, "clip")
  encoder, params, about = diffusers.load(out / emoji_models.TEXT_ENCODER)
  states = encoder.apply({"params": params}, tokens)
  assert states.last.shape == (3, 16, 64)
  np.testing.assert_allclose(states.pooled @ variables["params"]["text_projection"]["kernel"],
                             module.apply(variables, tokens, method="text_features"), rtol=1e-5, atol=1e-5)

  torch = pytest.importorskip("torch", reason="parity needs PyTorch: pip install -r requirements-test.txt")
  import transformers
  diffusers.export(params, about, out / "exported")
  (out / "exported" / "diffusion_pytorch_model.safetensors").rename(out / "exported" / "model.safetensors")
  theirs = transformers.CLIPTextModel.from_pretrained(out / "exported")
  with torch.no_grad():
    wanted = theirs(torch.from_numpy(tokens).long())
  np.testing.assert_allclose(states.last, wanted.last_hidden_state, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(states.pooled, wanted.pooler_output, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_image_tower_is_an_extractor(made):
  data, out = made
  name, module, variables = extractors.from_config(f"clip:{out / emoji_models.CLIP}", True)
  images = emoji_lib.load(data).images / np.float32(127.5) - 1
  features = jax.jit(module.apply)(variables, images)[1]
  assert name == "clip-uint8" and features.shape == (28, 64) and np.ptp(features, axis=0).min() > 0


@pytest.mark.slow
def test_what_is_there_is_not_made_again(made, monkeypatch, capsys):
  data, out = made
  before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
  report = json.loads((out / emoji_models.REPORT).read_text())
  assert report["vae"]["steps"] == report["clip"]["steps"] == 2 and 0 <= report["clip"]["test_top1"] <= 1
  monkeypatch.setattr(emoji_models, "fit", None)
  assert emoji_models.main(["--data=/nowhere", f"--out={out}"]) == 0
  assert {path: path.stat().st_mtime_ns for path in before} == before
  assert f"steps {report['vae']['steps']}" in capsys.readouterr().out


def test_fit_finds_the_minimum():
  rng = np.random.default_rng(0)
  truth = rng.standard_normal((3, 2)).astype(np.float32)

  def batch(i):
    x = rng.standard_normal((16, 3)).astype(np.float32)
    return x, x @ truth

  def loss(params, key, x, y):
    value = jnp.square(x @ params["w"] - y).mean()
    return value, {"twice": 2 * value}

  params, numbers = emoji_models.fit(loss, {"w": np.zeros((3, 2), np.float32)}, batch, (200, 16, 0.1), "line")
  np.testing.assert_allclose(params["w"], truth, atol=1e-2)
  assert numbers["steps"] == 200 and numbers["twice"] == pytest.approx(2 * numbers["loss"]) and numbers["loss"] < 1e-3


@pytest.mark.skipif(not REAL.exists(), reason=f"no {REAL} (set DDIL_DATA_DIR)")
def test_all_captions_fit(tmp_path):
  rows = [json.loads(line) for line in (REAL / emoji_lib.CAPTIONS).read_text().splitlines()]
  captions, words = [row["caption"] for row in rows], [row["keywords"] for row in rows]
  emoji_models.train_tokenizer(emoji_lib.Emoji(None, captions, words, None, None), tmp_path)
  tokens = clip.tokenize(tmp_path, captions, emoji_models.LENGTH + 1)
  assert (tokens[:, emoji_models.LENGTH] == 1).all() and (tokens[:, 1:3] > 1).all(axis=1).any()
  assert len(np.unique(tokens, axis=0)) == len(set(caption.strip() for caption in captions))
