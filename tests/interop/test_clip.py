"""CLIP against transformers on random weights: pixels, towers, logits, folders, tokens."""

import functools
import json
import shutil
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from ddil_jax.errors import UsageError
from ddil_jax.interop import clip, configs, extractors, weights
from ddil_jax.main import main
from tests.running import refuse  # noqa: F401 (a fixture)

pytestmark = pytest.mark.xdist_group("extractors")
REASON = "parity needs PyTorch and transformers: pip install -r requirements-test.txt"
TOLERANCE = dict(rtol=1e-4, atol=1e-4)
TINY = dict(vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                               image_size=28, patch_size=7),
            text_config=dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
                             vocab_size=99, max_position_embeddings=12, bos_token_id=97, eos_token_id=98),
            projection_dim=16)
LARGE = dict(vision_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                                num_attention_heads=16, patch_size=14),
             text_config=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12), projection_dim=768)


@functools.cache
def libraries():
  """(torch, transformers' CLIP classes): imported when a test needs them, for they take seconds."""
  torch = pytest.importorskip("torch", reason=REASON)
  pytest.importorskip("transformers", reason=REASON)
  from transformers import CLIPConfig, CLIPModel
  from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
  return torch, CLIPConfig, CLIPModel, CLIPImageProcessorPil


def make_folder(folder, config=TINY):
  """A folder of random weights of about the size that trained ones have; returns the model in PyTorch."""
  torch, CLIPConfig, CLIPModel, CLIPImageProcessorPil = libraries()
  generator = torch.Generator().manual_seed(0)
  model = CLIPModel(CLIPConfig(**config)).eval()
  with torch.no_grad():
    for p in model.parameters():
      fan_in = p.shape[1:].numel() if p.ndim > 1 else 4
      p += torch.randn(p.shape, generator=generator) / fan_in**0.5 if p.ndim else 0
  model.save_pretrained(folder)
  CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
  return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """(folder, PyTorch's model, converted file)."""
  path = tmp_path_factory.mktemp("clip")
  model, out = make_folder(path), path / "converted.safetensors"
  assert main(["convert-extractor", "--kind=clip", str(path), f"--out={out}"]) == 0
  return path, model, out


def texts():
  rng = np.random.default_rng(1)
  tokens = rng.integers(3, 98, (5, 12)).astype(np.int32)
  for row, end in zip(tokens, (3, 11, 5, 1, 8), strict=True):
    row[end:] = 98  # the end, and padding by the same
  return tokens


@pytest.mark.parametrize("height, width", [(32, 32), (9, 12), (61, 40), (28, 28)])
def test_pixels(folder, height, width):
  path, _, out = folder
  levels = np.random.default_rng(0).integers(0, 256, (3, height, width, 3)).astype(np.uint8)
  wanted = libraries()[3].from_pretrained(path)(list(levels), return_tensors="np")["pixel_values"]
  name, module, variables = extractors.from_config(f"clip:{out}", True)
  assert name == "clip-uint8" and module.size == 28
  ours = module.apply(variables, (levels / 127.5 - 1).astype(np.float32), method="pixels")
  # Bicubic to 8 bits: a tie may round the other way.
  wrong = np.abs(ours - wanted.transpose(0, 2, 3, 1))
  assert wrong.max() < 1.01 / 255 / min(module.std) and np.mean(wrong > 1e-5) < 1e-3


def test_images_and_texts(folder):
  _, model, out = folder
  torch = libraries()[0]
  module, variables = extractors.load(out, "clip")
  assert module.end == 98
  images, tokens = np.random.default_rng(0).uniform(-1, 1, (3, 9, 12, 3)).astype(np.float32), texts()
  pixels = np.array(module.apply(variables, images, method="pixels").transpose(0, 3, 1, 2))
  with torch.no_grad():
    wanted = model(torch.from_numpy(tokens).long(), torch.from_numpy(pixels))
    image = model.get_image_features(torch.from_numpy(pixels)).pooler_output
    text = model.get_text_features(torch.from_numpy(tokens).long()).pooler_output
  logits, features = jax.jit(module.apply)(variables, images, tokens)
  assert image.std() > 0.2 and text.std() > 0.2 and wanted.logits_per_image.std() > 0.2
  np.testing.assert_allclose(features, image, **TOLERANCE)
  np.testing.assert_allclose(module.apply(variables, tokens, method="text_features"), text, **TOLERANCE)
  np.testing.assert_allclose(logits, wanted.logits_per_image, **TOLERANCE)
  alone = module.apply(variables, images)
  assert alone[0].shape == (3, 0)
  np.testing.assert_allclose(alone[1], features, atol=1e-5)


def test_old_configs_read_texts_off_the_largest_token(tmp_path):
  """The original models' config.json names end token 2."""
  torch = libraries()[0]
  model = make_folder(tmp_path, TINY | {"text_config": TINY["text_config"] | {"eos_token_id": 2}})
  extractors.convert("clip", [tmp_path], tmp_path / "out")
  module, variables = extractors.load(tmp_path / "out", "clip")
  assert module.end is None
  with torch.no_grad():
    wanted = model.get_text_features(torch.from_numpy(texts()).long()).pooler_output
  np.testing.assert_allclose(module.apply(variables, texts(), method="text_features"), wanted, **TOLERANCE)


def test_products_are_in_full_precision():
  """Those of attention too: on GPUs and TPUs the default has 8 or 11 bits, which a parity on the CPU does not see."""
  module = clip.make(**clip.fields_of(TINY))
  arguments = extractors.KINDS["clip"].inputs(module)
  written = str(jax.make_jaxpr(module.apply)(weights.template(module, *arguments), *arguments))
  products = written.count("dot_general[") + written.count("conv_general_dilated[")
  assert products > 30 and written.count("HIGHEST") == 2 * products  # one for each side


def test_what_comes_after_the_end_does_not_matter(folder):
  module, variables = extractors.load(folder[2], "clip")
  tokens = texts()
  other = np.where(np.cumsum(tokens == 98, axis=1) > 1, 7, tokens)
  assert (other != tokens).any()
  np.testing.assert_allclose(module.apply(variables, other, method="text_features"),
                             module.apply(variables, tokens, method="text_features"), atol=1e-6)


@pytest.mark.parametrize("config, millions", [({}, 151), (LARGE, 427)], ids=["base-patch32", "large-patch14"])
def test_published_layouts(config, millions):
  """Names and shapes of the two published models, nothing computed; `{}` is base-patch32, all fields left out."""
  torch, CLIPConfig, CLIPModel, _ = libraries()
  with torch.device("meta"):
    theirs = {k: tuple(v.shape) for k, v in CLIPModel(CLIPConfig(**config)).state_dict().items()}
  entry = extractors.KINDS["clip"]
  module = entry.make(**clip.fields_of(config))
  shapes = weights.template(module, *entry.inputs(module))
  names = weights.names(shapes, entry.rename)
  flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
          for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
  ours = {name: sorted(flat["/".join(path)]) for path, name in names.items()}
  ours["logit_scale"] = []
  assert ours == {name: sorted(shape) for name, shape in theirs.items()}
  assert sum(int(np.prod(shape)) for shape in flat.values()) // 1_000_000 == millions


def test_tokens(tmp_path):
  libraries()
  vocabulary = {"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "ab</w>": 4, "<|startoftext|>": 5, "<|endoftext|>": 6}
  (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
  (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
  tokens = clip.tokenize(tmp_path, ["AB  a", "b", "ab ab ab ab ab"], length=6)
  np.testing.assert_array_equal(tokens, [[5, 4, 2, 6, 6, 6], [5, 3, 6, 6, 6, 6], [5, 4, 4, 4, 4, 6]])
  assert tokens.dtype == np.int32


def test_texts_without_transformers(tmp_path, monkeypatch):
  with pytest.raises(UsageError, match="has no tokenizer: tokenizer.json"):
    clip.tokenize(tmp_path, ["a"])
  (tmp_path / "tokenizer.json").write_text("{}")
  monkeypatch.setitem(sys.modules, "transformers", None)
  with pytest.raises(UsageError, match="pip install transformers.*or give token ids"):
    clip.tokenize(tmp_path, ["a"])


def test_folders_that_do_not_fit(refuse, folder, tmp_path):  # noqa: F811
  run = lambda: refuse("convert-extractor", "--kind=clip", tmp_path / "m", f"--out={tmp_path / 'out'}")  # noqa: E731
  assert "config.json" in run()

  def spoil(name, **changes):
    shutil.rmtree(tmp_path / "m", ignore_errors=True)
    shutil.copytree(folder[0], tmp_path / "m")
    path = tmp_path / "m" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return run()

  assert "'siglip'" in spoil("config.json", model_type="siglip")
  for change, words in (
      (dict(text_config={"hidden_act": "relu"}), "unknown hidden_act 'relu'"),
      (dict(text_config={"hidden_act": ["gelu"]}), "unknown hidden_act"),
      (dict(vision_config={"num_attention_heads": 7}), "7 attention heads do not divide 768 channels"),
      (dict(vision_config={"num_attention_heads": 0}), "num_attention_heads=0: a whole number from 1 to"),
      (dict(vision_config=3), "vision_config: an object is expected"),
      (dict(text_config={"hidden_size": "x"}), "hidden_size='x': a whole number"),
      (dict(text_config={"num_hidden_layers": 10**9}), "num_hidden_layers=1000000000: a whole number from 1 to 128"),
      (dict(text_config={"layer_norm_eps": "0"}), "layer_norm_eps='0': a number is expected"),
      (dict(vision_config={"image_size": 10**9}), "image_size=1000000000: a whole number"),
      (dict(vision_config={"patch_size": 29, "image_size": 28}), "patch_size=29 is larger than image_size=28"),
      (dict(projection_dim=[1]), "projection_dim=[1]: a whole number"),
      # Numbers that are allowed, one by one: nothing of such a size is made.
      (dict(vision_config={"image_size": 16384, "patch_size": 1, "hidden_size": 16380}), "fit (1, 1, 3, 16380)"),
  ):
    assert words in spoil("config.json", **change), words
  line = spoil("config.json", projection_dim=8)
  assert "visual_projection.weight has shape (16, 32), which does not fit (32, 8)" in line
  assert "resample" in spoil("preprocessor_config.json", resample=2)
  for name, value in (("mean", [0.5, 0.5]), ("mean", "0.5"), ("std", [0.5, 0.0, 0.5]), ("mean", [0.5, 0.5, True]),
                      ("std", [1, 1, 128])):
    assert f"image_{name} has to be three numbers" in spoil("preprocessor_config.json", **{f"image_{name}": value})
  tensors = safetensors.numpy.load_file(folder[0] / "model.safetensors")
  spoil("preprocessor_config.json", resample=2)
  (tmp_path / "m" / "preprocessor_config.json").unlink()
  for change, words in ((lambda t: t.pop("vision_model.pre_layrnorm.weight"), "pre_layrnorm.weight is missing"),
                        (lambda t: t.update(extra=np.zeros(2, np.float32)), "extra is unknown")):
    changed = dict(tensors)
    change(changed)
    safetensors.numpy.save_file(changed, tmp_path / "m" / "model.safetensors")
    assert words in run()
  content = (folder[0] / "model.safetensors").read_bytes()
  for part in (content[:-50], content[:50], b""):
    (tmp_path / "m" / "model.safetensors").write_bytes(part)
    assert "model.safetensors is absent, damaged" in run()
  header = json.dumps({"logit_scale": {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [0, 1]}}).encode()
  (tmp_path / "m" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
  assert "logit_scale is of type F8_E5M2" in run()
  for text, words in (("[]", "no JSON object"), ("[" * 100_000, "cannot read"),
                      (" " * (weights.LARGEST_JSON + 1), "larger than any such file")):
    (tmp_path / "m" / "config.json").write_text(text)
    assert words in run()
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("projected", [False, True])
def test_text_encoders(projected):
  """What Stable Diffusion (last state) and SDXL (penultimate, pooled and projected) read."""
  torch = libraries()[0]
  import transformers
  generator = torch.Generator().manual_seed(0)
  config = transformers.CLIPTextConfig(**TINY["text_config"], projection_dim=16, hidden_act="gelu")
  model = (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config).eval()
  with torch.no_grad():
    for p in model.parameters():
      p += torch.randn(p.shape, generator=generator) / p.shape[-1]**0.5
  fields = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
  module, rest = configs.make(fields)
  tensors = {name: value.numpy() for name, value in model.state_dict().items()}
  variables = weights.to_flax(weights.template(module, *module.example()), configs.full_names(tensors), "model",
                              weights.NUMBERED, r".*\.position_ids")
  with torch.no_grad():
    wanted = model(torch.from_numpy(texts()).long(), output_hidden_states=True)
  ours = jax.jit(module.apply)(variables, texts())
  pooled = wanted.text_embeds if projected else wanted.pooler_output
  for a, b in zip(ours, (wanted.last_hidden_state, wanted.hidden_states[-2], pooled), strict=True):
    assert b.std() > 0.2
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
  assert not rest
