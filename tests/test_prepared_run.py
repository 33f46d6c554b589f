"""Runs on what `ddil prepare` wrote: latents and prompts in, decoded images out."""

import json
import pathlib

import flax
import jax
import numpy as np
import pytest
from PIL import Image

from ddil_jax import build, files, measure, prepare, prompting, serve, trained
from ddil_jax import config as config_lib
from ddil_jax.config import folder
from ddil_jax.data import fake, prepared
from ddil_jax.errors import UsageError
from ddil_jax.interop import configs, diffusers, extractors, weights
from ddil_jax.main import main
from tests.data import making
from tests.data.conftest import pipeline_folder  # noqa: F401 (a fixture)
from tests.running import SHORT, refuse, shared  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def made(pipeline_folder, tmp_path_factory):  # noqa: F811
  """(the set of 24 images, config.json of a network that reads its prompts, the set without pixels)."""
  base = tmp_path_factory.mktemp("prepared")
  files = {name: f"{pipeline_folder / name}.safetensors" for name in ("vae", "text_encoder")}
  options = prepare.Options(**files, tokenizer=str(pipeline_folder / "tokenizer"), keep_images=True, shard_size=10)
  prepare.prepare(str(making.write_folder(base / "src", 24)), str(base / "set"), options)
  prepare.prepare(str(base / "src"), str(base / "latents"), options._replace(keep_images=False))
  unet = json.loads((folder() / "unets" / "tiny.json").read_text())
  (base / "unet.json").write_text(json.dumps(unet | {"cross_attention_dim": making.TEXT["hidden_size"]}))
  return base / "set", base / "unet.json", base / "latents"


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
  """A tiny CLIP of random weights for the metrics, in the format of `ddil convert-extractor`."""
  tower = [8, 8, 1, 2, "gelu", 1e-5]
  fields = dict(vision=tower, text=tower, dim=4, size=14, patch=7, vocabulary=9, length=5, end=None, mean=[0.5] * 3,
                std=[0.5] * 3)
  kind = extractors.KINDS["clip"]
  module = kind.make(**fields)
  flat = flax.traverse_util.flatten_dict(weights.template(module, *kind.inputs(module)))
  rng = np.random.default_rng(0)
  path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
  files.save_arrays(path, {"/".join(k): making.draw(rng, k, v.shape) for k, v in flat.items()},
                    {"kind": "clip", "fields": fields, "sources": {}})
  return path


def train(run, data, unet, extractor) -> list[str]:
  return ["train", "--config=configs/emoji_teacher.py:smoke", f"--workdir={run}", *SHORT,
          "--config.data.name=prepared", f"--config.data.path={data}", "--config.data.image_size=0",
          f"--config.model.file={unet}", "--config.train.batch_size=8", f"--config.eval.extractor={extractor}"]


def test_what_cannot_be_measured_is_refused_before_training(made, extractor, tmp_path, refuse):  # noqa: F811
  data, unet, latents = made
  fd = "--config.eval.metrics=('fd',)"
  line = refuse(*train(tmp_path / "run", data, unet, ""), fd)
  assert "holds latents, which the small classifier does not know" in line
  line = refuse(*train(tmp_path / "run", latents, unet, f"clip:{extractor}"), fd)
  assert "has no images to compare decoded samples with: `ddil prepare --keep_images`" in line
  assert "prepared with image_size 16, not 8" in refuse(*train(tmp_path / "run", data, unet, ""),
                                                        "--config.data.image_size=8")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_from_disk_is_that_from_memory(made, extractor, tmp_path, monkeypatch):
  found = []
  for name, limit in (("memory", prepared._IN_MEMORY), ("disk", 0)):
    monkeypatch.setattr(prepared, "_IN_MEMORY", limit)
    run = tmp_path / name
    assert main(train(run, made[0], made[1], f"clip:{extractor}")) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert main(["sample", f"--workdir={run}", f"--out={run / 'samples.png'}", "--num_samples=2"]) == 0
    found.append(([row["student/loss"] for row in rows if "student/loss" in row],
                  [row["metrics"] for row in json.loads((run / "results.json").read_text())],
                  np.asarray(Image.open(run / "samples.png")).tolist()))
  assert found[0] == found[1] and len(found[0][0]) == 2


def test_a_run_on_latents(made, extractor, pipeline_folder, tmp_path, monkeypatch, refuse, capsys):  # noqa: F811
  """Trains from disk, decodes its samples and measures them."""
  monkeypatch.setattr(prepared, "_IN_MEMORY", 0)
  run = tmp_path / "run"
  assert main(train(run, made[0], made[1], f"clip:{extractor}")) == 0
  rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  losses = [row["student/loss"] for row in rows if "student/loss" in row]
  measured = json.loads((run / "results.json").read_text())
  assert len(losses) == 2 and np.isfinite(losses).all() and "saturation@6/-/-" in measured[0]["metrics"]
  assert main(["sample", f"--workdir={run}", f"--out={run / 'samples.png'}", "--num_samples=2"]) == 0
  grid = np.asarray(Image.open(run / "samples.png"))
  assert grid.shape[-1] == 3 and grid.std() > 1

  def sample(*more):
    return ["sample", f"--workdir={run}", "--num_samples=2", "--guidance_scale=2", f"--out={tmp_path / 'grid.png'}", *more]

  encoder = f"--text_encoder={pipeline_folder / 'text_encoder'}.safetensors"
  tokenizer = f"--tokenizer={pipeline_folder / 'tokenizer'}"
  captions = prepared.load(made[0]).captions
  assert main(sample(f"--prompt={captions[0]}", "--prompt=../../a CAT " + "of wool " * 20, encoder, tokenizer,
                     f"--folder={tmp_path / 'files'}")) == 0
  assert "more than" in capsys.readouterr().out
  names = sorted(path.name for path in (tmp_path / "files").iterdir())
  assert len(names) == 4 and names[2].startswith("01-a-cat-of-wool") and names[3].endswith("-1.png")
  first = np.asarray(Image.open(tmp_path / "files" / names[0]))
  grid = np.asarray(Image.open(tmp_path / "grid.png"))
  assert first.shape == (16, 16, 3) and grid.shape[0] == 2 * grid.shape[1] // 2  # two rows of two
  assert "--text_encoder=FILE is needed: text_encoder.safetensors" in refuse(*sample("--prompt=a cat"))
  wrong = f"--text_encoder={pipeline_folder / 'vae'}.safetensors"
  assert "is not the text_encoder.safetensors with which" in refuse(*sample("--prompt=a cat", wrong, tokenizer))
  assert "--tokenizer=FOLDER is needed" in refuse(*sample("--prompt=a cat", encoder))


@pytest.fixture
def prompts(pipeline_folder, tmp_path):  # noqa: F811
  """Fields of a run on 40 prompts without images, of a tiny network without weights."""
  (tmp_path / "prompts.txt").write_text("".join(f"a cat with {i} tails\n" for i in range(40)))
  options = prepare.Options(vae=f"{pipeline_folder / 'vae'}.safetensors", image_size=16, keep_images=False,
                            text_encoder=f"{pipeline_folder / 'text_encoder'}.safetensors",
                            tokenizer=str(pipeline_folder / "tokenizer"))
  prepare.prepare(str(tmp_path / "prompts.txt"), str(tmp_path / "set"), options)
  unet = json.loads((folder() / "unets" / "tiny.json").read_text()) | {"cross_attention_dim": making.TEXT["hidden_size"]}
  (tmp_path / "unet.json").write_text(json.dumps(unet))
  return {"data.name": "prepared", "data.path": str(tmp_path / "set"), "data.image_size": "0",
          "model.file": str(tmp_path / "unet.json")}


def test_prompts_alone_have_no_forward_states(prompts):
  """Nor images to be compared with; the student's own states suffice, and what is measured of samples alone."""
  data, on_own = prepared.load(prompts["data.path"]), {"states.forward": "0", "states.student": "1"}

  def built(fields):
    given = prompts | fields
    return build.build(config_lib.load("configs/emoji_dmd2.py:ddil,smoke", given), data)

  alone = on_own | {"eval.metrics": "('saturation',)"}
  for fields, words in [({}, "has prompts and no images.*states.forward=0"),
                        (on_own | {"objective.gan_weight": "1"}, "a GAN needs images"),
                        (on_own | {"eval.metrics": "('fd',)", "eval.extractor": "x"}, "leave fd out of config.eval"),
                        (on_own | {"eval.metrics": "('vendi',)"}, "holds prompts, which the small classifier"),
                        (alone | {"eval.shift_kinds": "()"}, "set config.eval.shift_samples to 0")]:
    with pytest.raises(UsageError, match=words):
      built(fields)
  assert built(alone | {"eval.shift_samples": "0"}).dataset.pixels is None


@pytest.mark.slow
def test_dmd2_learns_from_prompts_alone(prompts, tmp_path):
  """Without GAN, which needs images, on the student's own states."""
  config = json.loads(pathlib.Path(prompts["model.file"]).read_text())
  module, _ = configs.make(config)
  flat = flax.traverse_util.flatten_dict(weights.template(module, *module.example())["params"])
  rng = np.random.default_rng(0)
  params = flax.traverse_util.unflatten_dict({path: making.draw(rng, path, leaf.shape) for path, leaf in flat.items()})
  diffusers.save(tmp_path / "unet", params, {"kind": diffusers.KIND, "config": config, "source": "", "license": ""})
  fields = prompts | {"model.file": tmp_path / "unet", "states.forward": 0, "states.student": 1, "train.batch_size": 8}
  run = tmp_path / "run"
  assert main(["train", "--config=configs/emoji_dmd2.py:smoke", f"--workdir={run}", *SHORT,
               *(f"--config.{field}={value}" for field, value in fields.items())]) == 0
  rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  assert np.isfinite([row["critic/loss"] for row in rows if "critic/loss" in row]).all()
  assert list(json.loads((run / "results.json").read_text())[0]["metrics"]) == ["saturation@6/-/-"]


def test_own_prompts_are_encoded_as_those_of_the_set(made, pipeline_folder):  # noqa: F811
  """The states of a caption of the set are those that were stored."""
  config = config_lib.load("configs/emoji_lcm.py:smoke", {"data.name": "prepared", "data.path": str(made[0])})
  data = prepared.load(made[0])
  encode = prompting.encoder(config, [f"{pipeline_folder / 'text_encoder'}.safetensors"],
                             str(pipeline_folder / "tokenizer"))
  cond = prompting.conditions(data, encode, data.captions[:3], 2)
  np.testing.assert_allclose(cond["text"], np.repeat(data.cond["text"][:3], 2, axis=0), atol=1e-5)
  assert cond["label"].tolist() == [0] * 6


def test_agreement_with_the_prompts_of_the_samples(extractor):
  """Images that are drawn for the prompts of `conditions`, in its order; a caption that two examples have counts once."""
  rng = np.random.default_rng(0)
  data = fake.load_text(num_examples=120, image_size=14, channels=3)
  data = data._replace(tokens=rng.integers(0, 9, (120, 5)).astype(np.int32), captions=[f"number {i}" for i in range(120)])
  data.tokens[7], data.captions[7] = data.tokens[3], data.captions[3]
  config = config_lib.load("configs/emoji_lcm.py:smoke", {
      "eval.captions": f"clip:{extractor}", "eval.num_samples": "130", "eval.quantise": "False"})
  agreement = measure.caption_agreement(config, data)
  images = rng.uniform(-1, 1, (130, 14, 14, 3)).astype(np.float32)
  for _ in agreement.tap([images[:100], images[100:]]):
    pass
  values = {name.partition("@")[0]: value for name, value in agreement.measured().values.items()}
  assert set(values) == {"clip_score", "r_precision"}

  _, module, variables = extractors.from_config(f"clip:{extractor}", False)
  index = [data.captions.index(prompt) for prompt in measure.prompts(data, 130)]
  seen = np.asarray(module.apply(variables, images, method="image_features"))
  read = np.asarray(module.apply(variables, data.tokens[index], method="text_features"))
  unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
  assert values["clip_score"] == pytest.approx(100 * np.maximum((unit(seen) * unit(read)).sum(1), 0).mean(), rel=1e-4)

  with pytest.raises(UsageError, match="reads 5 tokens, those of fake_text are 4"):
    measure.caption_agreement(config, data._replace(tokens=data.tokens[:, :4]))
  with pytest.raises(UsageError, match="the data set fake_text has no prompts"):
    build.build(config)


def test_own_prompts_are_drawn_for_the_page(made, extractor, pipeline_folder, monkeypatch):  # noqa: F811
  """One that is too long is cut, and the page is told."""
  config = config_lib.load("configs/emoji_lcm.py:smoke", {"data.name": "prepared", "data.path": str(made[0]),
                                                          "data.image_size": "0", "model.file": str(made[1]),
                                                          "eval.extractor": f"clip:{extractor}"})
  monkeypatch.setattr(trained, "load_teacher", lambda config, built: built.init_teacher(jax.random.key(0)))
  monkeypatch.setattr(trained, "params_of", lambda config, built, workdir: (
      built.objective.init(jax.random.key(0), built.init_teacher(jax.random.key(0)))["student"], {}))
  with pytest.raises(UsageError, match="--text_encoder=FILE is needed"):
    serve.Drawing(config, "run")
  drawing = serve.Drawing(config, "run", [f"{pipeline_folder / 'text_encoder'}.safetensors"],
                          str(pipeline_folder / "tokenizer"))
  assert drawing.reads_text and not drawing.classes and drawing.guidance == (1, 3, 2)
  drawn = drawing.draw(drawing.sides[0], 1, serve.Request("a cat " + "of wool " * 20, num=1, guidance_scale=2.0))
  assert drawn.images.shape == (1, 16, 16, 3) and "has more than 12 tokens" in drawn.notes[0]


@pytest.mark.slow  # 40 CPU seconds; the networks' folders themselves are compared in tests/parity
def test_a_student_that_reads_the_scale_is_exported(tmp_path):
  """LCM's embedding of the guidance scale comes with it, and diffusers gives the student's output."""
  import diffusers as theirs
  import jax.numpy as jnp
  import torch

  run, out = tmp_path / "run", tmp_path / "student"
  assert main(["train", "--config=configs/emoji_lcm.py:smoke", f"--workdir={run}", *SHORT]) == 0
  assert main(["export", str(run), f"--out={out}"]) == 0
  unet = theirs.UNet2DConditionModel.from_pretrained(out, subfolder="unet").eval()
  assert unet.config.time_cond_proj_dim == 64
  config = trained.saved_config(run)
  built = build.build(config)
  params, _ = trained.params_of(config, built, run)
  rng = np.random.default_rng(0)
  x, text = rng.standard_normal((2, 8, 8, 4), np.float32), rng.standard_normal((2, 77, 16), np.float32)
  x0 = built.parts.student(params, jnp.asarray(x), jnp.full(2, 500.0), {"text": jnp.asarray(text)})
  alpha, sigma = built.parts.process.alpha(500.0), built.parts.process.sigma(500.0)
  with torch.no_grad():
    v = unet(torch.tensor(x).permute(0, 3, 1, 2), 500, torch.tensor(text)).sample.permute(0, 2, 3, 1).numpy()
  np.testing.assert_allclose(x0, alpha * x - sigma * v, atol=1e-4)
