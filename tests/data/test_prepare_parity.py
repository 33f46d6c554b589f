"""Latents and embeddings of prepared sets against PyTorch's autoencoder and text encoders, on random weights."""

import json
import shutil

import numpy as np
import pytest

from ddil_jax import prepare, prepare_shards
from ddil_jax.data import pipeline, prepared
from ddil_jax.errors import UsageError
from ddil_jax.main import main
from tests.data import making
from tests.running import shared  # noqa: F401 (a fixture: compiled programs)

REASON = "parity needs PyTorch and transformers: pip install -r requirements-test.txt"
COUNT = 6


@pytest.fixture(scope="module")
def theirs(pipeline_folder, tmp_path_factory):
  """PyTorch's (autoencoder, text encoders, tokenizers) of the same folders."""
  torch = pytest.importorskip("torch", reason=REASON)
  transformers = pytest.importorskip("transformers", reason=REASON)
  diffusers = pytest.importorskip("diffusers", reason=REASON)
  torch.set_num_threads(1)
  base = tmp_path_factory.mktemp("theirs")
  encoders = []
  for name, kind in (("text_encoder", transformers.CLIPTextModel),
                     ("text_encoder_2", transformers.CLIPTextModelWithProjection)):
    shutil.copytree(pipeline_folder / name, base / name)
    (base / name / "diffusion_pytorch_model.safetensors").rename(base / name / "model.safetensors")
    config = json.loads((base / name / "config.json").read_text()) | {"model_type": "clip_text_model"}
    (base / name / "config.json").write_text(json.dumps(config))
    model, report = kind.from_pretrained(base / name, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    encoders.append(model.eval())
  tokenizers = [transformers.CLIPTokenizer.from_pretrained(pipeline_folder / name)
                for name in ("tokenizer", "tokenizer_2")]
  vae = diffusers.AutoencoderKL.from_pretrained(pipeline_folder / "vae").eval()
  return torch, vae, encoders, tokenizers


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A folder of images of another shape than they are prepared in; one caption is too long."""
  folder = making.write_folder(tmp_path_factory.mktemp("parity") / "src", COUNT)
  lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
  lines[2]["caption"] = "a big red square " * 9
  (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
  (folder / "001.png").write_bytes(making.png(making.pixels(1, 40, 24)))
  return folder


def load_all(path):
  """{caption: its rows} and the null condition, of both splits."""
  rows = {}
  for split in ("train", "test"):
    try:
      data = pipeline.load("prepared", path=path, split=split)
    except ValueError:
      continue  # no test example in so few
    for i, caption in enumerate(data.captions):
      rows.setdefault(caption, []).append({"image": data.images[i], "pixels": data.pixels[i]} |
                                          {name: x[i] for name, x in data.cond.items()})
  return data, rows


def states(theirs, which, prompts):
  torch, _, encoders, tokenizers = theirs
  tokens = tokenizers[which](prompts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
  with torch.no_grad():
    return encoders[which](tokens.input_ids, output_hidden_states=True)


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(np.abs(b).max()))
  assert float(np.std(b)) > 0.05


def test_stable_diffusion(theirs, source, pipeline_folder, tmp_path, capsys):
  """The last state, normalised; posterior samples times the scaling factor; the empty prompt; cut prompts counted."""
  torch, vae, _, _ = theirs
  files = [f"--{name}={pipeline_folder / name}.safetensors" for name in ("vae", "text_encoder")]
  assert main(["prepare", str(source), f"--out={tmp_path}/out", *files, f"--tokenizer={pipeline_folder / 'tokenizer'}",
               "--keep_images", "--shard_size=4"]) == 0
  assert "warning: 1 prompt has more than 12 tokens and was cut" in capsys.readouterr().out
  data, rows = load_all(tmp_path / "out")
  assert sum(map(len, rows.values())) == COUNT
  names = {line["caption"]: [] for line in map(json.loads, (source / "captions.jsonl").read_text().splitlines())}
  for line in map(json.loads, (source / "captions.jsonl").read_text().splitlines()):
    names[line["caption"]].append(line["file"])
  for caption, found in rows.items():
    wanted = states(theirs, 0, [caption]).last_hidden_state.numpy()[0]
    for row, file in zip(found, names[caption], strict=True):
      close(row["text"], wanted)
      with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(row["pixels"].transpose(2, 0, 1)[None].copy())).latent_dist
      mean, std = (x.numpy()[0].transpose(1, 2, 0) for x in (posterior.mean, posterior.std))
      drawn = mean + std * prepare_shards.posterior_noise(file, mean.shape)
      close(row["image"], drawn * making.VAE["scaling_factor"])
  close(data.null["text"], states(theirs, 0, [""]).last_hidden_state.numpy()[0])
  assert data.pixels.shape[1:] == (making.SIZE, making.SIZE, 3)
  assert data.decoder == str(tmp_path / "out/vae.safetensors")


def test_sdxl(theirs, source, pipeline_folder, tmp_path):
  """Both encoders' states before the last layer, the pooled one, sizes and crops; no prompt is zeros, as the
  pipeline's model_index.json says."""
  files = [f"--{name}={pipeline_folder / name}.safetensors" for name in ("vae", "text_encoder", "text_encoder_2")]
  out = tmp_path / "out"
  assert main(["prepare", str(source), f"--out={out}", *files, f"--tokenizer={pipeline_folder}", "--keep_images"]) == 0
  data, rows = load_all(out)
  for caption, found in rows.items():
    first, second = (states(theirs, i, [caption]) for i in range(2))
    wanted = np.concatenate([s.hidden_states[-2].numpy()[0] for s in (first, second)], axis=-1)
    for row in found:
      close(row["text"], wanted)
      close(row["text_pooled"], second.text_embeds.numpy()[0])
  ids = sorted(tuple(row["time_ids"].tolist()) for found in rows.values() for row in found)
  plain = (16.0, 16.0, 0.0, 0.0, 16.0, 16.0)
  # 40 x 24: its width becomes 16, its height 26 2/3, of which the middle stays.
  assert ids == [plain] * (COUNT - 1) + [(40.0, 24.0, 5.0, 0.0, 16.0, 16.0)]
  assert not data.null["text"].any() and not data.null["text_pooled"].any()
  assert sorted(data.null) == ["text", "text_pooled"] and data.null["text"].shape == (12, 44)
  (pipeline_folder / "model_index.json").rename(tmp_path / "aside")
  try:
    options = prepare.Options(*(f"{pipeline_folder / name}.safetensors" for name in (
        "vae", "text_encoder", "text_encoder_2")), str(pipeline_folder))
    prepare.prepare(str(source), str(tmp_path / "empty"), options)
  finally:
    (tmp_path / "aside").rename(pipeline_folder / "model_index.json")
  null = pipeline.load("prepared", path=tmp_path / "empty").null
  close(null["text_pooled"], states(theirs, 1, [""]).text_embeds.numpy()[0])


def test_a_set_is_whole_and_can_be_mended(theirs, source, pipeline_folder, tmp_path):
  """Its own autoencoder and null condition; what goes missing is named, and made again with the same bytes."""
  out = tmp_path / "out"
  command = ["prepare", str(source), f"--out={out}", f"--tokenizer={pipeline_folder / 'tokenizer'}",
             *(f"--{name}={pipeline_folder / name}.safetensors" for name in ("vae", "text_encoder"))]
  assert main(command) == 0
  before = {p.name: p.read_bytes() for p in out.iterdir()}
  assert before["vae.safetensors"] == (pipeline_folder / "vae.safetensors").read_bytes()
  for name in ("vae.safetensors", "null.safetensors", "shard-00000.array_record"):
    (out / name).unlink()
    with pytest.raises(UsageError, match=name):
      pipeline.load("prepared", path=out)
    assert main(command) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_statistics_and_lazy_rows(theirs, source, pipeline_folder, tmp_path, monkeypatch):
  """Bounds, mean and deviation per channel are those of all latents; on disk the rows are the same.

  In half precision they are rounded, take half the space, and what is too large for it is skipped.
  """
  options = prepare.Options(f"{pipeline_folder}/vae.safetensors", f"{pipeline_folder}/text_encoder.safetensors",
                            tokenizer=f"{pipeline_folder}/tokenizer", shard_size=2, keep_images=True)
  index = prepare.prepare(str(source), str(tmp_path / "full"), options)
  data, rows = load_all(tmp_path / "full")
  latents = np.stack([row["image"] for found in rows.values() for row in found])
  flat = latents.reshape(-1, latents.shape[-1])
  np.testing.assert_array_equal(data.bounds, [flat.min(0), flat.max(0)])
  np.testing.assert_allclose(index.latents["mean"], flat.mean(0), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(index.latents["std"], flat.std(0), rtol=1e-4)
  assert index.latents["scaling_factor"] == making.VAE["scaling_factor"]
  data = pipeline.load("prepared", path=tmp_path / "full")

  names, noise = [f"{i:03d}.png" for i in range(COUNT)], prepare_shards.posterior_noise
  monkeypatch.setattr(prepare_shards, "posterior_noise", lambda key, shape: noise(key, shape) * 1e7**(key == "003.png"))
  half_index = prepare.prepare(str(source), str(tmp_path / "half"), options._replace(dtype="float16"))
  half = pipeline.load("prepared", path=tmp_path / "half")
  assert half_index.skipped == {"its latents are not finite as float16": 1}
  kept = np.flatnonzero([key != "003.png" for key in names if not prepared.is_test(key)])
  assert len(kept) == len(data.images) - 1
  for a, b in ((half.images, data.images), (half.cond["text"], data.cond["text"])):
    np.testing.assert_array_equal(a, b[kept].astype(np.float16).astype(np.float32), strict=True)
  stored = np.concatenate([half.images, pipeline.load("prepared", path=tmp_path / "half", split="test").images])
  np.testing.assert_array_equal(half.bounds, [stored.min((0, 1, 2)), stored.max((0, 1, 2))])
  sizes = [{name: np.dtype(f["dtype"]).itemsize for name, f in i.fields.items()} for i in (index, half_index)]
  assert [size.pop("latents") + size.pop("text") for size in sizes] == [8, 4] and sizes[0] == sizes[1]

  monkeypatch.setattr(prepared, "_IN_MEMORY", 0)
  lazy = pipeline.load("prepared", path=tmp_path / "half")
  np.testing.assert_array_equal(lazy.images[np.array([3, 1])], half.images[np.array([3, 1])], strict=True)
  lazy = pipeline.load("prepared", path=tmp_path / "full")
  assert not isinstance(lazy.images, np.ndarray)
  at = np.array([2, 0, 2])
  for a, b in ((lazy.images, data.images), (lazy.pixels, data.pixels), (lazy.cond["text"], data.cond["text"])):
    assert (a.shape, a.dtype, len(a)) == (b.shape, b.dtype, len(b))
    np.testing.assert_array_equal(a[at], b[at], strict=True)


def test_prompts_alone(theirs, pipeline_folder, tmp_path):
  """The shape of what is to be generated is the autoencoder's; there is nothing to learn from."""
  (tmp_path / "prompts.txt").write_text("a red square\na big circle\n")
  options = prepare.Options(f"{pipeline_folder}/vae.safetensors", f"{pipeline_folder}/text_encoder.safetensors",
                            tokenizer=f"{pipeline_folder}/tokenizer")
  prepare.prepare(str(tmp_path / "prompts.txt"), str(tmp_path / "out"), options)
  data = pipeline.load("prepared", path=tmp_path / "out")
  side = making.SIZE // 2
  assert data.images.shape == (2, side, side, 4) and np.isnan(data.images[np.array([1])]).all()
  assert data.decoder and data.bounds is None and data.pixels is None
  close(data.cond["text"][1], states(theirs, 0, ["a big circle"]).last_hidden_state.numpy()[0])
