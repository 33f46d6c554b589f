"""The evaluation on COCO as one command, on made-up images in the format of tfds' coco_captions."""

import json

import pytest
import tensorflow_datasets as tfds

from ddil_jax import config as config_lib
from ddil_jax.config import folder
from ddil_jax.data import prepared
from ddil_jax.main import main
from launch import coco
from tests.data import making
from tests.data.conftest import pipeline_folder  # noqa: F401 (a fixture)
from tests.data.test_prepare import Coco
from tests.running import SHORT, shared  # noqa: F401 (fixtures)
from tests.test_measure import random_weights


class Larger(Coco, skip_registration=True):
  """24 images to train on and 100 to compare with: each caption is looked for among 100."""
  name = "coco_captions"

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(5, 29), "val": self._generate_examples(29, 49),
            "restval": self._generate_examples(49, 129)}


@pytest.fixture
def sets(tmp_path):
  """A run's folder without checkpoints, and two sets of 80 images, 3 of them test: "own" of the run, and "coco"."""
  source = making.write_folder(tmp_path / "src", 80)
  found = {name: tmp_path / name for name in ("own", "coco")}
  for out in found.values():
    assert main(["prepare", str(source), f"--out={out}", "--image_size=8"]) == 0
    assert sum(len(shard.test) for shard in prepared.read_index(out).shards) == 3
  config = config_lib.load("configs/emoji_teacher.py:smoke", {"data.name": "prepared", "data.path": str(found["own"])})
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
  return found


PASSED = "config.eval.num_samples=3: at least 6 is needed"  # what comes next


def refused(tmp_path, capsys, num=3, prompts=3, said="") -> str:
  capsys.readouterr()
  assert coco.main([f"--workdir={tmp_path / 'run'}", f"--data={tmp_path / 'coco'}", f"--num_samples={num}",
                    f"--prompts={prompts}"]) == 2
  out, line = capsys.readouterr()
  assert said in out
  return line


def change(path, **values):
  """Index entries of a set; of "settings" the given ones."""
  index = json.loads((path / "index.json").read_text())
  index["settings"] |= values.pop("settings", {})
  (path / "index.json").write_text(json.dumps(index | values))


def test_captions_are_not_taken_twice(sets, tmp_path, capsys):
  assert "--num_samples=4: " in (line := refused(tmp_path, capsys, num=4)) and "coco has 3 test examples" in line
  assert "--prompts=4: " in refused(tmp_path, capsys, prompts=4)
  assert PASSED in refused(tmp_path, capsys)  # that many are enough


def test_data_of_other_networks_are_refused(sets, tmp_path, capsys):
  """By their hashes; a name says nothing."""
  network = lambda digit: {"name": "vae.safetensors", "sha256": digit * 64}  # noqa: E731
  change(sets["own"], settings={"files": {"text_encoder": network("a")}})
  change(sets["coco"], settings={"files": {"text_encoder": network("b")}})
  line = refused(tmp_path, capsys)
  assert "another text_encoder than" in line and "--text_encoder=vae.safetensors" in line
  change(sets["coco"], settings={"files": {"text_encoder": network("a"), "vae": network("a")}})
  assert "another vae than" in (line := refused(tmp_path, capsys)) and "prepare it without --vae" in line
  change(sets["coco"], settings={"files": {"text_encoder": network("a")}}, image_shape=[16, 16, 3])
  assert "[16, 16, 3] an example" in (line := refused(tmp_path, capsys)) and "--image_size=8" in line

  (sets["own"] / "index.json").unlink()
  change(sets["coco"], settings={"files": {}}, image_shape=[8, 8, 3])
  assert PASSED in refused(tmp_path, capsys, said="cannot be checked")
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  config["data"]["name"] = "fake_text"
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  assert "was trained on fake_text" in refused(tmp_path, capsys)


@pytest.mark.slow
def test_a_run_is_evaluated(pipeline_folder, tmp_path, capsys):  # noqa: F811
  """From the images to FID, CLIP score, density, coverage and LPIPS-diversity; nothing of the run changes."""
  tfds.disable_progress_bar()
  builder = Larger(data_dir=tmp_path / "tfds", file_format="array_record")
  builder.download_and_prepare()
  networks = [f"--{name}={pipeline_folder / name}.safetensors" for name in ("vae", "text_encoder")]
  assert main(["prepare", str(builder.data_path), f"--out={tmp_path / 'coco'}", "--keep_images", "--image_size=32",
               *networks, f"--tokenizer={pipeline_folder / 'tokenizer'}"]) == 0
  unet = json.loads((folder() / "unets" / "tiny.json").read_text())
  (tmp_path / "unet.json").write_text(json.dumps(unet | {"cross_attention_dim": making.TEXT["hidden_size"]}))
  run = tmp_path / "run"
  assert main(["train", "--config=configs/emoji_teacher.py:smoke", f"--workdir={run}", *SHORT,
               "--config.data.name=prepared", f"--config.data.path={tmp_path / 'coco'}", "--config.data.image_size=0",
               f"--config.model.file={tmp_path / 'unet.json'}", "--config.train.batch_size=8"]) == 0
  before = (run / "results.json").read_bytes()

  tower = [8, 8, 1, 2, "gelu", 1e-5]
  fields = dict(vision=tower, text=tower, dim=4, size=14, patch=7, vocabulary=making.TEXT["vocab_size"], end=None,
                length=making.TEXT["max_position_embeddings"], mean=[0.5] * 3, std=[0.5] * 3)
  clip = f"clip:{random_weights(tmp_path / 'clip', 'clip', fields)}"
  command = [f"--workdir={run}", f"--data={tmp_path / 'coco'}", f"--extractor={clip}", f"--captions={clip}",
             f"--lpips=lpips-alex:{random_weights(tmp_path / 'alex', 'lpips-alex')}", "--num_samples=100",
             "--prompts=3", "--samples_per_prompt=2"]
  assert coco.main(command) == 0
  found = {part: {name.split("/")[0] for name in rows[0]["metrics"]}
           for part, rows in json.loads((run / coco.RESULT).read_text()).items()}
  assert found == {"quality": {"fd@100", "density@100", "coverage@100", "clip_score@100", "r_precision@100"},
                   "diversity": {"saturation@6", "lpips_diversity@6"}}
  assert (run / "results.json").read_bytes() == before
  capsys.readouterr()
  assert coco.main([*command, f"--captions=clip:{tmp_path / 'absent'}"]) == 2
  assert "absent" in capsys.readouterr().err
