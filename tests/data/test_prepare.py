"""`ddil prepare`: sources, what is skipped, shards that continue, how sets are read. Networks: test_prepare_parity."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
from collections import Counter

import numpy as np
import pytest
import safetensors.numpy
import tensorflow_datasets as tfds
from PIL import Image

from ddil_jax import prepare, prepare_shards
from ddil_jax.data import captioned, pipeline, prepared
from ddil_jax.errors import RunError, UsageError
from ddil_jax.evaluation import image_sets
from ddil_jax.main import main
from tests.data import making
from tests.running import ROOT, refuse  # noqa: F401 (a fixture)

EMOJI = pathlib.Path(os.environ.get("DDIL_DATA_DIR") or ROOT.parent / "shared" / "data") / "emoji"
SIZE = making.SIZE


def run(source, out, *arguments) -> int:
  return main(["prepare", str(source), f"--out={out}", f"--image_size={SIZE}", *map(str, arguments)])


def contents(folder) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in folder.iterdir()}


def load(path, split="train"):
  return pipeline.load("prepared", path=path, split=split)


def floats(array):
  return array.astype(np.float32) / 127.5 - 1


@pytest.fixture(scope="module")
def many(tmp_path_factory):
  """(a folder of 45 images, the set made of it in shards of 7)."""
  base = tmp_path_factory.mktemp("many")
  source = making.write_folder(base / "src", 45)
  assert run(source, base / "out", "--shard_size=7") == 0
  return source, base / "out"


def test_what_is_read_is_what_was_there(many):
  """Pixels to the bit, captions, both splits; a batch is a function of seed and step."""
  source, out = many
  found = {}
  for split in ("train", "test"):
    data = load(out, split)
    assert data.images.dtype == np.float32 and data.labels.dtype == np.int32 and data.num_classes == 1
    assert not data.decoder and data.bounds is None and data.pixels is None and not data.cond and not data.null
    for image, caption in zip(data.images, data.captions, strict=True):
      found[image.tobytes()] = caption, split
  assert len(found) == 45
  for i in range(45):
    image = floats(making.pixels(i))
    nearest = min(found, key=lambda x: np.abs(np.frombuffer(x, np.float32).reshape(image.shape) - image).max())
    np.testing.assert_allclose(np.frombuffer(nearest, np.float32).reshape(image.shape), image, atol=1e-6)
    held_out = int.from_bytes(hashlib.sha256(f"{i:03d}.png".encode()).digest()[:8], "big") % 20 == 0
    assert found[nearest] == (making.caption(i), "test" if held_out else "train")
  assert {split for _, split in found.values()} == {"train", "test"}
  assert pipeline.preflight(load(out))["count"] == Counter(split for _, split in found.values())["train"]
  a, b = (pipeline.batches(load(out), 8, 3) for _ in range(2))
  a[0], a[5]
  np.testing.assert_array_equal(a[7]["image"], b[7]["image"], strict=True)


def test_index(many):
  value = json.loads((many[1] / "index.json").read_text())
  assert value["count"] == 45 and [s["count"] for s in value["shards"]] == [7] * 6 + [3]
  assert value["fields"] == {"pixels": {"shape": [SIZE, SIZE, 3], "dtype": "uint8"}}
  for shard in value["shards"]:
    data = (many[1] / shard["file"]).read_bytes()
    assert len(data) == shard["bytes"] and hashlib.sha256(data).hexdigest() == shard["sha256"]
  assert str(many[0].parent) not in json.dumps(value)  # a set can be moved


def test_larger_sets_stay_on_disk(many, monkeypatch):
  """The same rows, without reading all; one reading a batch."""
  whole = load(many[1])
  monkeypatch.setattr(prepared, "_IN_MEMORY", 0)
  data = load(many[1])
  assert not isinstance(data.images, np.ndarray)
  assert (data.images.shape, data.images.dtype, len(data.images)) == (whole.images.shape, np.float32, len(whole.images))
  index = np.array([20, 3, 3, 31, 0])
  np.testing.assert_array_equal(data.images[index], whole.images[index], strict=True)
  assert list(data.captions) == list(whole.captions) and data.captions[1:3] == list(whole.captions)[1:3]
  assert data.captions[-1] == whole.captions[-1]
  with pytest.raises(IndexError):
    data.images[np.array([len(whole.images)])]
  assert pipeline.preflight(data) == pipeline.preflight(whole)
  monkeypatch.setattr(image_sets, "_BATCH", 16)
  on_disk, in_memory = image_sets.image_set(data.images), image_sets.image_set(whole.images)
  assert type(on_disk) is image_sets.OnDisk and on_disk.content == in_memory.content and on_disk.shape == in_memory.shape
  assert [len(batch) for batch in on_disk.batches()][:2] == [16, 16]
  a, b = pipeline.batches(data, 8, 3), pipeline.batches(whole, 8, 3)
  for step in (0, 11, 5):
    np.testing.assert_array_equal(a[step]["image"], b[step]["image"], strict=True)
  # In order they are read ahead, by several threads, from any step on.
  with contextlib.closing(pipeline.Ahead(a, 5, 40)) as ahead:
    for step in range(5, 40):
      np.testing.assert_array_equal(ahead[step]["image"], b[step]["image"], strict=True)

  read = []
  monkeypatch.setattr(prepared._Records, "_read", lambda self, shard, at, f=prepared._Records._read: (
      read.append(shard), f(self, shard, at))[1])
  data.images[index], data.images[index]
  assert len(read) == len(set(read)) > 1


def test_bad_files_are_counted_and_listed(tmp_path, capsys, monkeypatch):
  source = making.write_folder(tmp_path / "src", 30)
  (source / "000.png").write_bytes((source / "000.png").read_bytes()[:200])
  (source / "001.png").write_text("no image")
  (source / "deep").mkdir()
  (source / "deep" / "lonely.png").write_bytes(making.png(making.pixels(1)))
  (tmp_path / "secret.png").write_bytes(making.png(making.pixels(2)))
  (source / "link.png").symlink_to(tmp_path / "secret.png")
  Image.fromarray(np.zeros((90, 90, 3), np.uint8)).save(source / "bomb.png")
  lines = [{"file": "../secret.png", "caption": "a"}, {"file": str(tmp_path / "secret.png"), "caption": "a"},
           {"file": "link.png", "caption": "a"}, {"file": "gone.png", "caption": "a"}, {"file": "captions.jsonl",
           "caption": "a"}, {"file": "002.png", "caption": "  "}, {"file": 3, "caption": "a"}, {"file": "003.png"},
           {"file": "bomb.png", "caption": "a"}, [1], {"file": "x" * 300 + ".png", "caption": "a"}]
  with open(source / "captions.jsonl", "a") as f:
    f.write("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n\n")
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
  assert run(source, tmp_path / "out", "--shard_size=10") == 0
  rows = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
  reasons = {row["file"]: row["reason"] for row in rows}
  assert len(rows) == len(reasons) == 15
  for name, words in {"000.png": "", "001.png": "not an image", "deep/lonely.png": "no caption",
                      "captions.jsonl:31": "points out of the source", "captions.jsonl:32": "points out of the source",
                      "link.png": "a link that points out", "gone.png": "no such file",
                      "captions.jsonl:35": "is no image by its name", "002.png": "no caption",
                      "captions.jsonl:37": "no text 'file'", "captions.jsonl:38": "no text 'caption'",
                      "bomb.png": "exceeds limit", "captions.jsonl:40": "no JSON object",
                      "captions.jsonl:42": "no JSON object",
                      "x" * 300 + ".png": "File name too long"}.items():
    assert words in reasons[name], (name, reasons[name])
  index = prepared.read_index(tmp_path / "out")
  assert sum(s.count for s in index.shards) == 28 and sum(index.skipped.values()) == 15
  assert index.skipped["no caption"] == 2
  said = capsys.readouterr().out
  assert "15 skipped: " in said and re.search(r"shard 4 of 4: 32 of 32 examples, [\d.,]+/s, 0 s left\n", said)
  data = load(tmp_path / "out")
  assert len(data.skipped) == 15 and "15 files skipped" in pipeline.preflight(data)["summary"]


def test_captions_of_any_kind(tmp_path, pipeline_folder):
  """A byte order mark, half a character, control characters; through the tokenizer too."""
  source = making.write_folder(tmp_path / "src", 3)
  captions = ["größe 🙂 名", "\\ud83d half", "a\\u0000b\\n"]
  lines = "\r\n".join(f'{{"file": "{i:03d}.png", "caption": "{text}"}}' for i, text in enumerate(captions))
  (source / "captions.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
  assert run(source, tmp_path / "out", f"--text_encoder={pipeline_folder}/text_encoder.safetensors",
             f"--tokenizer={pipeline_folder}/tokenizer") == 0
  found = [c for split in ("train", "test") for c in load_or_none(tmp_path / "out", split)]
  assert sorted(found) == sorted(["größe 🙂 名", "? half", "a\0b\n"])


def load_or_none(path, split) -> list[str]:
  try:
    return list(load(path, split).captions)
  except UsageError as e:
    assert f"no {split} examples" in str(e)
    return []


def test_nothing_usable(tmp_path, refuse):  # noqa: F811
  source = making.write_folder(tmp_path / "src", 2)
  for file in source.glob("*.png"):
    file.write_text("no image")
  line = refuse("prepare", source, f"--out={tmp_path / 'out'}", "--image_size=8", "--shard_size=1")
  assert "no example that can be used; the first of 2 that failed: 000.png: not an image" in line
  (source / "000.png").write_bytes(making.png(making.pixels(0)))  # a shard of nothing is no obstacle to the others
  assert main(["prepare", str(source), f"--out={tmp_path / 'out'}", "--image_size=8", "--shard_size=1"]) == 0
  assert [s.file for s in prepared.read_index(tmp_path / "out").shards] == ["shard-00000.array_record"]


def test_a_disk_that_fails_is_no_bad_file(tmp_path, monkeypatch, refuse):  # noqa: F811
  source = making.write_folder(tmp_path / "src", 3)

  def fails(self):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(pathlib.Path, "read_bytes", fails)
  assert "000.png cannot be read: [Errno 5]" in refuse("prepare", source, f"--out={tmp_path / 'out'}",
                                                       f"--image_size={SIZE}", code=1)


def test_zip(tmp_path):
  """Captions in the archive or beside it; RGBA onto white; names are looked up, never unpacked."""
  clear = np.zeros((SIZE, SIZE, 4), np.uint8)
  clear[:4] = 255, 0, 0, 255
  members = {"a/000.png": making.png(clear), "../001.png": making.png(making.pixels(1)),
             "lonely.png": making.png(making.pixels(2))}
  lines = "".join(json.dumps({"file": file, "caption": "x"}) + "\n" for file in ("a/000.png", "../001.png", "b.png"))
  making.write_zip(tmp_path / "beside.zip", members)
  (tmp_path / "captions.jsonl").write_text(lines)
  (tmp_path / "own").mkdir()
  making.write_zip(tmp_path / "own" / "inside.zip", members | {"captions.jsonl": lines.encode()})
  for path in (tmp_path / "beside.zip", tmp_path / "own" / "inside.zip"):
    source = captioned.open_source(path)
    assert source.kind == "zip" and len(source.identities) == 1
    assert dict(source.skipped) == {"captions.jsonl:2": "'../001.png' points out of the source",
                                    "b.png": "no such file", "lonely.png": "no caption", "../001.png": "no caption"}
    assert run(path, tmp_path / path.stem) == 0
    image = load(tmp_path / path.stem, "test" if prepared.is_test("a/000.png") else "train").images[0]
    assert (image[:4] == [1, -1, -1]).all() and (image[4:] == 1).all()


def test_webdataset(tmp_path):
  folder = tmp_path / "tars"
  making.write_tar(folder / "000.tar", {
      "dir/a.png": making.png(making.pixels(0)), "dir/a.txt": b"from a text",
      "b.png": making.png(making.pixels(1)), "b.json": json.dumps({"caption": "from json", "x": 1}).encode(),
      "c.png": b"", "d.txt": b"no picture", "e.png": making.png(making.pixels(4)), "e.json": b"[]", "f.cls": b"7",
      "../g.png": b"", "h.png": making.png(making.pixels(5)), "j.v2.png": b"", "j.v2.txt": b"a", "3.5mm.PNG": b"",
      "b.seg.png": b""}, {"i.png": "/etc/passwd"})
  making.write_tar(folder / "001.tar", {"a.PNG": making.png(making.pixels(2)), "a.txt": b"another a",
                                        "a.json": b"{}", "a.jpg": b"second"})
  (folder / "002.tar.gz").write_bytes(b"")
  source = captioned.open_source(folder)
  assert source.kind == "webdataset" and len(source.identities) == 4
  examples = [source.read(i) for i in (0, 1, 3)]
  assert [(e.key, e.caption) for e in examples] == [
      ("000/dir/a", "from a text"), ("000/b", "from json"), ("001/a", "another a")]
  assert [e.image for e in examples] == [making.png(making.pixels(i)) for i in range(3)]
  assert dict(source.skipped) == {
      "000/c": "no caption", "000/d": "no image", "000/../g.png": "points out of the source", "000/h": "no caption",
      "000/i.png": "no plain file", "001/a.jpg": "a second one of its key",
      "002.tar.gz": "a compressed tar file: unpack it to .tar"} | dict.fromkeys(
          ("000/j.v2.png", "000/3.5mm.PNG", "000/b.seg.png"), "a second dot in its name: a key ends at the first one")
  assert run(folder, tmp_path / "out") == 0
  skipped = prepared.read_index(tmp_path / "out").skipped
  assert skipped["no text 'caption'"] == 1 and skipped["a second dot in its name: a key ends at the first one"] == 3


def test_huge_files_are_not_read(tmp_path, monkeypatch):
  """In all three, by the size that is claimed; a claim that is too low gives no more than it says."""
  monkeypatch.setattr(captioned, "_LARGEST_IMAGE", 500)
  big, small = making.png(making.pixels(0)), making.png(np.zeros((2, 2, 3), np.uint8))
  assert len(big) > 500 > len(small)
  lines = "".join(json.dumps({"file": f"{i}.png", "caption": "a"}) + "\n" for i in range(2))
  members = {"0.png": big, "1.png": small, "captions.jsonl": lines.encode()}
  (tmp_path / "folder").mkdir()
  for name, data in members.items():
    (tmp_path / "folder" / name).write_bytes(data)
  making.write_zip(tmp_path / "images.zip", members)
  making.write_tar(tmp_path / "tars" / "0.tar", {k: v for i in range(2) for k, v in (
      (f"{i}.png", members[f"{i}.png"]), (f"{i}.txt", b"a"))})
  for name in ("folder", "images.zip", "tars"):
    source = captioned.open_source(tmp_path / name)
    assert source.read(1).image == small
    with pytest.raises(ValueError, match=f"{len(big)} bytes; 500 are the most allowed"):
      source.read(0)


class Coco(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """The features of coco_captions that count, and another one."""
  VERSION = tfds.core.Version("1.1.0")
  name = "coco_captions"

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        "image": tfds.features.Image(encoding_format="png"), "image/filename": tfds.features.Text(),
        "image/id": np.int64,
        "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})}))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(0, 5), "val": self._generate_examples(5, 7),
            "restval": self._generate_examples(7, 9)}

  def _generate_examples(self, start, end):
    for i in range(start, end):
      texts = [] if i == 4 else [f"caption {i}", "another one"]
      yield i, {"image": making.png(making.pixels(i)), "image/filename": f"{i:03d}.jpg", "image/id": i,
                "captions": [{"id": j, "text": t} for j, t in enumerate(texts)]}


def test_tfds(tmp_path):
  """The first caption of each image; the set's own splits, of which all but "train" are held out."""
  tfds.disable_progress_bar()
  builder = Coco(data_dir=tmp_path / "tfds", file_format="array_record")
  builder.download_and_prepare()
  assert run(builder.data_path, tmp_path / "out") == 0
  train, test = (load(tmp_path / "out", split) for split in ("train", "test"))
  assert sorted(train.captions) == [f"caption {i}" for i in range(4)]
  assert sorted(test.captions) == [f"caption {i}" for i in range(5, 9)]
  assert train.skipped == (("train/004.jpg", "no caption"),)
  for data in (train, test):
    for image, caption in zip(data.images, data.captions, strict=True):
      np.testing.assert_allclose(image, floats(making.pixels(int(caption[-1]))), atol=1e-6)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_prompts(tmp_path, suffix):
  """There are no images: what learns from them anyway is found out."""
  lines = [f"prompt {i}" for i in range(150)]
  if suffix == "jsonl":
    lines = [json.dumps({"caption" if i % 2 else "prompt": line}) for i, line in enumerate(lines)] + ['{"x": 1}']
  (tmp_path / f"prompts.{suffix}").write_text("\n\n".join(lines) + "\n")
  assert run(tmp_path / f"prompts.{suffix}", tmp_path / "out") == 0
  parts = [load(tmp_path / "out", split) for split in ("train", "test")]
  assert sorted([*parts[0].captions, *parts[1].captions]) == sorted(f"prompt {i}" for i in range(150))
  assert parts[0].images.shape[1:] == (SIZE, SIZE, 3) and np.isnan(parts[0].images[np.array([3, 0])]).all()
  assert "images 16x16x3, none there, prompts only" in pipeline.preflight(parts[0])["summary"]
  with pytest.raises(UsageError, match="are not finite"):
    pipeline.preflight(parts[0]._replace(captions=()))
  assert parts[0].skipped == ((("prompts.jsonl:301", "no text 'caption' or 'prompt'"),) if suffix == "jsonl" else ())


# Shards -------------------------------------------------------------------------------------


def test_killed_and_continued(tmp_path):
  """SIGKILL in the middle; the same command gives the bytes of an undisturbed run, and keeps what was finished."""
  source = making.write_folder(tmp_path / "src", 60)
  assert run(source, tmp_path / "whole", "--shard_size=1") == 0
  out = tmp_path / "out"
  process = subprocess.Popen([sys.executable, "-m", "ddil_jax", "prepare", source, f"--out={out}", "--shard_size=1",
                              f"--image_size={SIZE}"], cwd=ROOT, stdout=subprocess.DEVNULL)
  deadline = time.monotonic() + 120
  while len(list(out.glob("shard-*.json"))) < 5 and process.poll() is None and time.monotonic() < deadline:
    time.sleep(0.001)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  finished = {p: p.stat().st_mtime_ns for p in out.glob("shard-*.json")}
  assert 5 <= len(finished) < 60 and not (out / "index.json").exists()
  with pytest.raises(UsageError, match="`ddil prepare` has not finished there"):
    load(out)
  assert run(source, out, "--shard_size=1") == 0
  assert contents(out) == contents(tmp_path / "whole")
  assert all(path.stat().st_mtime_ns == when for path, when in finished.items())


def test_processes_share_the_shards(many, tmp_path, capsys):
  source, whole = many
  for i in (1, 0, 2):
    capsys.readouterr()
    assert run(source, tmp_path / "out", "--shard_size=7", f"--process={i}/3") == 0
    assert (tmp_path / "out" / "index.json").exists() == (i == 2)
    if i == 1:
      assert "5 of 7 shards are left to other processes" in capsys.readouterr().out
      assert sorted(p.name for p in (tmp_path / "out").glob("*_record")) == [prepared.shard_name(n) for n in (1, 4)]
  assert contents(tmp_path / "out") == contents(whole)


def test_only_what_changed_is_made_anew(tmp_path, refuse):  # noqa: F811
  source, out = making.write_folder(tmp_path / "src", 30), tmp_path / "out"
  assert run(source, out, "--shard_size=5") == 0
  times = {p.name: p.stat().st_mtime_ns for p in out.glob("*_record")}
  (source / "012.png").write_bytes(making.png(making.pixels(99)))
  assert run(source, out, "--shard_size=5") == 0
  changed = [name for name, when in times.items() if (out / name).stat().st_mtime_ns != when]
  assert changed == [prepared.shard_name(2)]
  (out / prepared.shard_name(4)).unlink()
  (source / "captions.jsonl").write_text(making.captions(22))
  assert run(source, out, "--shard_size=5") == 0
  assert len(list(out.glob("shard-*"))) == 2 * 5 and sum(s.count for s in prepared.read_index(out).shards) == 22
  line = refuse("prepare", source, f"--out={out}", "--shard_size=5", "--image_size=8")
  assert f"other settings: image_size was {SIZE}, now 8; give another --out" in line
  line = refuse("prepare", making.write_folder(tmp_path / "other", 3), f"--out={out}", "--shard_size=5",
                f"--image_size={SIZE}")
  assert "other settings: source was" in line and "other" in line


def test_a_shard_and_what_is_said_of_it_belong_together(many, tmp_path, monkeypatch):
  """Stopped between the two while an image was another one: the old words must not vouch for the new shard."""
  source, out = tmp_path / "src", tmp_path / "out"
  shutil.copytree(many[0], source)
  assert run(source, out, "--shard_size=7") == 0
  before = contents(out)
  image, stat = (source / "010.png").read_bytes(), (source / "010.png").stat()
  (source / "010.png").write_bytes(making.png(making.pixels(99)))
  with monkeypatch.context() as patch:
    patch.setattr(prepare_shards.Found, "about", lambda *_: sys.exit(9))
    with pytest.raises(SystemExit):
      run(source, out, "--shard_size=7")
  name = prepared.shard_name(1)
  assert (out / name).read_bytes() != before[name] and (out / name).stat().st_size == len(before[name])
  (source / "010.png").write_bytes(image)
  os.utime(source / "010.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert run(source, out, "--shard_size=7") == 0
  assert contents(out) == before


def test_estimate_dry_run_and_space(many, tmp_path, capsys, monkeypatch, refuse):  # noqa: F811
  assert run(many[0], tmp_path / "out", "--dry_run") == 0
  said = capsys.readouterr().out
  assert "45 examples in 1 shards, 1 of them to be made here" in said and not (tmp_path / "out").exists()
  sizes = [len(prepared.encode("000.png", making.caption(i), {"pixels": making.pixels(i)})) for i in range(45)]
  assert f"an example takes {sum(sizes) / 45:.0f} B" in said
  monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
  line = refuse("prepare", many[0], f"--out={tmp_path / 'out'}", f"--image_size={SIZE}", code=1)
  assert "KiB are needed, 1000 B are free; free space, or give another --out" in line
  assert not (tmp_path / "out").exists()


def test_no_space_while_writing(tmp_path):
  """What array_record says of a full disk, in our words; nothing half stays."""
  (tmp_path / f".{prepared.shard_name(0)}.tmp").symlink_to("/dev/full")
  with pytest.raises(RunError, match=r"cannot write .*shard-00000.*No space left on device"):
    with prepared.new_shard(tmp_path / prepared.shard_name(0)) as write:
      for _ in range(100):
        write(b"x" * 100_000)
  assert not list(tmp_path.iterdir())


# Damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [False, True])
def test_damaged_shards_are_named(many, tmp_path, lazy, monkeypatch):
  monkeypatch.setattr(prepared, "_IN_MEMORY", 0 if lazy else 2**30)
  name = prepared.shard_name(3)
  data = (many[1] / name).read_bytes()

  def message(change) -> str:
    for file, content in contents(many[1]).items():
      (tmp_path / file).write_bytes(content)
    change(tmp_path / name)
    with pytest.raises(UsageError) as error:
      found = load(tmp_path).images
      found[np.arange(len(found))]
    return str(error.value)

  assert f"{name} is missing" in message(pathlib.Path.unlink)
  assert f"{name} has 65,536 bytes where {len(data):,} were written" in message(lambda p: p.write_bytes(data[:65536]))
  at = data.index(making.pixels(23).tobytes()[:64])
  flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]
  words = "is damaged" if lazy else "does not have the hash"
  assert f"{name} {words}" in message(lambda p: p.write_bytes(flipped))
  assert f"{name} {words}" in message(lambda p: p.write_bytes(bytes(len(data))))
  if lazy:  # from the threads that read ahead, too
    with pytest.raises(UsageError, match=f"{name} is damaged"):
      ahead = pipeline.Ahead(pipeline.batches(load(tmp_path), 8, 3), 0, 9)
      [ahead[step] for step in range(9)]
    ahead.close()


def test_damaged_index(many, tmp_path):
  for file, content in contents(many[1]).items():
    (tmp_path / file).write_bytes(content)
  value = json.loads((tmp_path / "index.json").read_text())

  def message(**change):
    (tmp_path / "index.json").write_text(json.dumps({k: v for k, v in (value | change).items() if v is not None}))
    with pytest.raises(UsageError) as error:
      load(tmp_path)
    return str(error.value)

  assert "has format 7; this version reads 1" in message(format=7)
  assert "index.json is damaged (KeyError: 'fields')" in message(fields=None)
  assert "index.json is damaged" in message(shards=[{"file": "x"}])
  assert "names a shard out of its folder" in message(shards=[value["shards"][0] | {"file": "../../etc/passwd"}])
  (tmp_path / "index.json").write_text("{")
  with pytest.raises(UsageError, match="index.json is damaged"):
    load(tmp_path)
  (tmp_path / "index.json").write_text(json.dumps(value))
  (tmp_path / "skipped.jsonl").write_text("x")
  with pytest.raises(UsageError, match="skipped.jsonl is absent or damaged"):
    load(tmp_path)


def test_records_are_safetensors():
  """No pickles; texts of any kind."""
  record = prepared.encode("k\udc80", "größe 🙂", {"x": np.arange(3, dtype=np.int32)})
  arrays = safetensors.numpy.load(record)
  assert arrays["caption"].tobytes().decode() == "größe 🙂" and arrays["x"].tolist() == [0, 1, 2]


# Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments,words", [
    (["{tmp}/none", "--image_size=8"], "no folder or file"),
    (["{tmp}", "--image_size=8"], "has no captions.jsonl, no .tar files and no dataset_info.json"),
    (["{tmp}/x.bin", "--image_size=8"], "is no folder, .zip, .txt or .jsonl file"),
    (["{tmp}/bad.zip", "--image_size=8"], "bad.zip cannot be read: File is not a zip file"),
    (["{tmp}/alone/alone.zip", "--image_size=8"], "alone.zip has no captions.jsonl in it or beside it"),
    (["{tmp}/bad.txt", "--image_size=8"], "bad.txt cannot be read: 'utf-8' codec"),
    (["{tmp}/packed", "--image_size=8"], "no .tar files and no dataset_info.json of tfds; 0.tgz is compressed: unpack"),
    (["{tmp}/tars", "--image_size=8"], "tars/0.tar cannot be read as an uncompressed tar file: "),
    (["{tmp}/tfds", "--image_size=8"], "cannot read the prepared data in"),
    (["{src}"], "give --image_size=N"),
    (["{src}", "--image_size=-1"], "--image_size=-1: at least 1"),
    (["{src}", "--image_size=8", "--shard_size=0"], "--shard_size=0: at least 1"),
    (["{src}", "--image_size=8", "--process=2/2"], "--process=2/2: I/N with I from 0 to N - 1"),
    (["{src}", "--image_size=8", "--process=x"], "--process=x: I/N is expected"),
    (["{src}", "--image_size=8", "--keep_images"], "--keep_images needs --vae"),
    (["{src}", "--image_size=8", "--dtype=bfloat16"], "unknown dtype 'bfloat16'; did you mean float16"),
    (["{src}", "--image_size=8", "--tokenizer=x"], "--text_encoder and --tokenizer need each other"),
    (["{src}", "--image_size=8", "--text_encoder_2=x"], "--text_encoder_2 needs --text_encoder"),
    (["{src}", "--image_size=8", "--vae={tmp}/x.bin"], "x.bin is damaged"),
    (["{src}", "--image_size=8", "--vae={tmp}/none"], "none: No such file or directory"),
    (["{src}", "--image_size=8", "--out={tmp}"], "holds other things; give a new folder"),
    (["{src}", "--image_size=8", "--out={tmp}/x.bin"], "x.bin is a file; the name of a folder"),
    (["{src}", "--image_size=8", "--config.seed=1"], "unknown argument '--config.seed=1'"),
])
def test_bad_arguments(many, tmp_path, refuse, arguments, words):  # noqa: F811
  for name, data in {"x.bin": b"1", "bad.zip": b"1", "bad.txt": b"\xff\xfe", "tars/0.tar": b"x" * 600,
                     "packed/0.tgz": b"", "tfds/dataset_info.json": b"{"}.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(data)
  (tmp_path / "alone").mkdir()
  making.write_zip(tmp_path / "alone" / "alone.zip", {})
  given = [a.format(tmp=tmp_path, src=many[0]) for a in arguments]
  assert words in refuse("prepare", *([] if "--out" in " ".join(given) else [f"--out={tmp_path / 'out'}"]), *given)
  assert not (tmp_path / "out").exists()


def test_networks_that_do_not_fit(many, pipeline_folder, tmp_path, refuse):  # noqa: F811
  files = {name: f"--{name}={pipeline_folder / name}.safetensors" for name in ("vae", "text_encoder", "text_encoder_2")}
  tokenizer = f"--tokenizer={pipeline_folder / 'tokenizer'}"
  swapped = {name: f"--{name}={pipeline_folder / other}.safetensors"
             for name, other in (("vae", "text_encoder"), ("text_encoder", "vae"), ("text_encoder_2", "text_encoder"))}

  def line(*arguments):
    return refuse("prepare", many[0], f"--out={tmp_path / 'out'}", *arguments)

  assert "is no autoencoder of colour images" in line(swapped["vae"])
  assert "--image_size=15 is no multiple of 2" in line(files["vae"], "--image_size=15")
  assert "holds AutoencoderKL, no text encoder" in line("--image_size=8", swapped["text_encoder"], tokenizer)
  assert "need the pipeline's folder" in line("--image_size=8", files["text_encoder"], files["text_encoder_2"],
                                              tokenizer)
  assert "has no projection" in line("--image_size=8", files["text_encoder"], swapped["text_encoder_2"],
                                     f"--tokenizer={pipeline_folder}")
  assert "has no tokenizer" in line("--image_size=8", files["text_encoder"], f"--tokenizer={tmp_path}")
  (tmp_path / "tokenizer.json").write_text("{}")
  assert "tokenizer" in line("--image_size=8", files["text_encoder"], f"--tokenizer={tmp_path}")
  assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not EMOJI.is_dir(), reason=f"no {EMOJI} (set DDIL_DATA_DIR)")
def test_real_emoji(tmp_path):
  """A slice of the real set: RGBA, with captions beside the archive."""
  with zipfile.ZipFile(EMOJI / "noto_png128.zip") as archive:
    names = archive.namelist()[::60]
    making.write_zip(tmp_path / "emoji.zip", {name: archive.read(name) for name in names})
  lines = [json.loads(line) for line in (EMOJI / "captions.jsonl").read_text().splitlines()]
  lines = [line for line in lines if line["file"] in names]
  (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert main(["prepare", str(tmp_path / "emoji.zip"), f"--out={tmp_path / 'out'}", "--image_size=32",
               "--shard_size=20"]) == 0
  data = load(tmp_path / "out")
  index = prepared.read_index(tmp_path / "out")
  assert sum(s.count for s in index.shards) == len(lines) > 40
  assert index.skipped == {"no caption": len(names) - len(lines)}
  assert set(data.captions) <= {line["caption"] for line in lines}
  assert (data.images[:, 0, 0] == 1).all(axis=-1).mean() > 0.5  # white around most of them
  assert pipeline.preflight(data)["shape"] == (32, 32, 3)
