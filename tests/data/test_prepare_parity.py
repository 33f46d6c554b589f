"""Latents and embeddings of prepared sets against PyTorch's autoencoder and text encoders, on random weights."""

import json
import shutil

import numpy as np
import pytest

from ddil_jax import prepare
from ddil_jax.data import pipeline
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
  assert "warning: 1 prompts have more than 12 tokens and were cut" in capsys.readouterr().out
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
      close(row["image"], (mean + std * prepare.posterior_noise(file, mean.shape)) * making.VAE["scaling_factor"])
  close(data.null["text"], states(theirs, 0, [""]).last_hidden_state.numpy()[0])
  assert data.pixels.shape[1:] == (making.SIZE, making.SIZE, 3) and data.decoder == str(tmp_path / "out/vae.safetensors")


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
  assert tuple(data.null["time_ids"]) == plain and data.null["text"].shape == (12, 44)
  (pipeline_folder / "model_index.json").rename(tmp_path / "aside")
  try:
    options = prepare.Options(*(f"{pipeline_folder / name}.safetensors" for name in (
        "vae", "text_encoder", "text_encoder_2")), str(pipeline_folder))
    prepare.prepare(str(source), str(tmp_path / "empty"), options)
  finally:
    (tmp_path / "aside").rename(pipeline_folder / "model_index.json")
  null = pipeline.load("prepared", path=tmp_path / "empty").null
  close(null["text_pooled"], states(theirs, 1, [""]).text_embeds.numpy()[0])
