"""Images with captions, or captions alone, as they lie around: folders, zip and tar files, sets of tfds.

A source is a stranger's: names in it may not lead out of it, sizes are bounded, and what cannot be used is listed with
its reason. Nothing is unpacked to disk.
"""

import json
import os
import pathlib
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ddil_jax.data import folder
from ddil_jax.errors import UsageError

CAPTIONS = "captions.jsonl"
_LARGEST_IMAGE, _LARGEST_TEXT = 256 * 2**20, 2**20  # bytes of a file
# Splits of tfds that are not trained on; coco_captions has most of COCO's validation images in "restval".
_HELD_OUT = ("test", "val", "validation", "restval")
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Example(NamedTuple):
  """A caption, and the file of its image.

  Attributes:
    key: what it is called in its source; the file's name, where it has one.
    caption: of the image.
    image: content of an image file, or None.
    split: "train" or "test" where the source says so, else "".
  """
  key: str
  caption: str
  image: bytes | None
  split: str = ""


class Source(NamedTuple):
  """Examples that can be read in any order.

  Attributes:
    kind: "folder", "zip", "webdataset", "tfds" or "prompts".
    name: of its file or folder.
    identities: one for each example; it changes when the example does, as far as can be told without reading the image.
    read: index -> Example; raises whatever damaged files raise.
    skipped: (name, reason) of what is there and is no example.
    has_images: whether the examples have images.
  """
  kind: str
  name: str
  identities: Sequence[str]
  read: Callable[[int], Example]
  skipped: tuple[tuple[str, str], ...] = ()
  has_images: bool = True


def open_source(path: str | os.PathLike) -> Source:
  """Opens captioned images.

  * A folder with `captions.jsonl`, whose lines are objects with `file` (in the folder) and `caption`.
  * A `.zip` of images with that file in it or beside it.
  * A folder of `.tar` files with `KEY.jpg` (or another image) and `KEY.txt`, or `KEY.json` with a `caption`; a key has
    no dot, as in webdataset.
  * A folder that tfds has prepared with the features `image` and `captions`, such as coco_captions: the first caption
    of each image; val, restval and test are the test split.
  * A `.txt` or `.jsonl` of prompts, one a line; the object's `caption` or `prompt`.

  Raises:
    UsageError: none of these, or it cannot be read.
  """
  path = pathlib.Path(path)
  try:
    if path.is_dir():
      if (path / CAPTIONS).is_file():
        return _open_folder(path)
      if (path / "dataset_info.json").is_file():
        return _open_tfds(path)
      packed = sorted(p.name for p in path.iterdir() if p.name.lower().endswith(_PACKED))
      if tars := sorted(path.glob("*.tar")):
        return _open_tars(path, tars, packed)
      raise UsageError(f"{path} has no {CAPTIONS}, no .tar files and no dataset_info.json of tfds"
                       + (f"; {packed[0]} is compressed: unpack it to .tar" if packed else ""))
    if not path.is_file():
      raise UsageError(f"no folder or file {path}")
    if path.suffix == ".zip":
      return _open_zip(path)
    if path.suffix in (".txt", ".jsonl"):
      return _open_prompts(path)
  except (OSError, UnicodeDecodeError, zipfile.BadZipFile) as e:
    raise UsageError(f"{path} cannot be read: {folder.reason(e)}") from e
  raise UsageError(f"{path} is no folder, .zip, .txt or .jsonl file")


# Captions in a file -------------------------------------------------------------------------


def _objects(path: pathlib.Path, text: str, fields: tuple[str, ...]) -> Iterator[tuple[str, dict | str]]:
  """(name of the line, the object or why it is none) of a .jsonl file; `fields` must be texts."""
  for i, line in enumerate(text.split("\n"), 1):
    if not line.strip():
      continue
    try:
      value = json.loads(line)
    except (ValueError, RecursionError):
      value = None
    if not isinstance(value, dict):
      value = "no JSON object"
    elif missing := [field for field in fields if not isinstance(value.get(field), str)]:
      value = f"no text '{missing[0]}'"
    yield f"{path.name}:{i}", value


def _captions(path: pathlib.Path, text: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
  """((file, caption) ..., skipped) of captions.jsonl; the files are names within the source."""
  good, skipped = [], []
  for where, line in _objects(path, text, ("file", "caption")):
    if isinstance(line, str):
      skipped.append((where, line))
    elif why := _refused(line["file"]):
      skipped.append((where, why))
    else:
      good.append((line["file"], line["caption"]))
  return good, skipped


def _refused(name: str) -> str:
  """Why the name of an image in a source is not followed; "" if it is."""
  parts = pathlib.PurePosixPath(name).parts
  if not parts or name.startswith("/") or ".." in parts or "\0" in name:
    return f"'{name[:80]}' points out of the source"
  if pathlib.PurePosixPath(name).suffix.lower() not in folder.SUFFIXES:
    return f"'{name[:80]}' is no image by its name"
  return ""


def _check_size(size: int, most: int) -> None:
  if size > most:
    raise ValueError(f"{size:,} bytes; {most:,} are the most allowed")


# Folder and zip -----------------------------------------------------------------------------


def _open_folder(root) -> Source:
  pairs, skipped = _captions(root / CAPTIONS, (root / CAPTIONS).read_text(encoding="utf-8-sig"))
  real = root.resolve()
  found, identities = [], []
  for file, caption in pairs:
    try:
      stat = (root / file).stat()
      outside = not (root / file).resolve().is_relative_to(real)
    except OSError as e:
      skipped.append((file, "no such file" if isinstance(e, FileNotFoundError) else e.strerror))
      continue
    if outside:
      skipped.append((file, "a link that points out of the source"))
    else:
      found.append((file, caption))
      identities.append(f"{file}\0{caption}\0{stat.st_size}\0{stat.st_mtime_ns}")
  there = sorted(str(p.relative_to(root)) for p in root.rglob("*")
                 if p.suffix.lower() in folder.SUFFIXES and p.is_file())
  skipped += _without_caption(there, pairs)

  def read(i):
    file, caption = found[i]
    _check_size((root / file).stat().st_size, _LARGEST_IMAGE)
    return Example(file, caption, (root / file).read_bytes())

  return Source("folder", real.name, identities, read, tuple(skipped))


def _open_zip(path) -> Source:
  archive = zipfile.ZipFile(path)
  infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
  beside = path.parent / CAPTIONS
  if CAPTIONS in infos:
    text = archive.read(CAPTIONS).decode("utf-8-sig")
  elif beside.is_file():
    text = beside.read_text(encoding="utf-8-sig")
  else:
    raise UsageError(f"{path} has no {CAPTIONS} in it or beside it")
  pairs, skipped = _captions(beside, text)
  found = [(file, caption) for file, caption in pairs if file in infos]
  skipped += [(file, "no such file") for file, _ in pairs if file not in infos]
  skipped += _without_caption(sorted(f for f in infos if pathlib.PurePosixPath(f).suffix.lower() in folder.SUFFIXES),
                              pairs)

  def read(i):
    file, caption = found[i]
    _check_size(infos[file].file_size, _LARGEST_IMAGE)
    return Example(file, caption, archive.read(file))  # at most the size that was checked

  identities = [f"{file}\0{caption}\0{infos[file].file_size}\0{infos[file].CRC}" for file, caption in found]
  return Source("zip", path.name, identities, read, tuple(skipped))


def _without_caption(files, pairs) -> list[tuple[str, str]]:
  captioned = {str(pathlib.PurePosixPath(file)) for file, _ in pairs}
  return [(file, "no caption") for file in files if file not in captioned]


# Tar files ----------------------------------------------------------------------------------


class _Member(NamedTuple):
  """Where a file lies in a tar file."""
  tar: pathlib.Path
  offset: int
  size: int

  def read(self, most: int) -> bytes:
    _check_size(self.size, most)
    with open(self.tar, "rb") as f:
      f.seek(self.offset)
      data = f.read(self.size)
    if len(data) != self.size:
      raise ValueError("cut short")
    return data


def _open_tars(root, tars, packed) -> Source:
  found: dict[str, dict[str, _Member]] = {}
  skipped = [(name, "a compressed tar file: unpack it to .tar") for name in packed]
  for path in tars:
    for member in _members(path):
      name = pathlib.PurePosixPath(member.name)
      stem, _, suffix = name.name.partition(".")
      suffix, where = f".{suffix.lower()}", f"{path.stem}/{name}"
      if member.isdir() or suffix not in (*folder.SUFFIXES, ".txt", ".json"):
        if not member.isdir() and name.suffix.lower() in folder.SUFFIXES:
          skipped.append((where, "a second dot in its name: a key ends at the first one"))
        continue
      if member.name.startswith("/") or ".." in name.parts:
        skipped.append((where, "points out of the source"))
      elif not member.isreg() or member.issparse():
        skipped.append((where, "no plain file"))
      else:
        kind = suffix if suffix in (".txt", ".json") else "image"
        parts = found.setdefault(f"{path.stem}/{name.parent / stem}", {})
        if kind in parts:
          skipped.append((where, "a second one of its key"))
        else:
          parts[kind] = _Member(path, member.offset_data, member.size)
  whole = {}
  for key, parts in found.items():
    if "image" in parts and len(parts) > 1:
      whole[key] = parts
    else:
      skipped.append((key, "no caption" if "image" in parts else "no image"))
  keys = list(whole)
  stats = {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in tars}

  def read(i):
    parts = whole[keys[i]]
    return Example(keys[i], _caption(parts), parts["image"].read(_LARGEST_IMAGE))

  identities = [f"{key}\0{whole[key]['image'].offset}\0{stats[whole[key]['image'].tar]}" for key in keys]
  return Source("webdataset", root.resolve().name, identities, read, tuple(skipped))


def _members(path: pathlib.Path) -> list[tarfile.TarInfo]:
  try:
    with tarfile.open(path, "r:") as tar:  # without compression: members are read where they lie
      return tar.getmembers()
  except tarfile.TarError as e:
    raise UsageError(f"{path} cannot be read as an uncompressed tar file: {folder.reason(e)}") from e


def _caption(parts: dict[str, _Member]) -> str:
  if ".txt" in parts:
    return parts[".txt"].read(_LARGEST_TEXT).decode()
  value = json.loads(parts[".json"].read(_LARGEST_TEXT))
  caption = value.get("caption") if isinstance(value, dict) else None
  if not isinstance(caption, str):
    raise ValueError("no text 'caption'")
  return caption


# Others -------------------------------------------------------------------------------------


def _open_tfds(root) -> Source:
  import tensorflow_datasets as tfds  # takes long
  try:
    builder = tfds.builder_from_directory(os.fspath(root))
    features = builder.info.features
    if not {"image", "captions"} <= set(features) or "text" not in features["captions"].feature:
      raise UsageError(f"{root} has the features {', '.join(features)}; image and captions with text, as coco_captions"
                       " has them, are expected")
    raw = {"image": tfds.decode.SkipDecoding()}  # images are decoded here, with the checks of all others
    sets = {split: builder.as_data_source(split=split, decoders=raw) for split in sorted(builder.info.splits)}
    places = [(split, i) for split, data in sets.items() for i in range(len(data))]
  except UsageError:
    raise
  except Exception as e:  # whatever array_record, protobuf and tfds raise on damaged files
    raise UsageError(f"cannot read the prepared data in {root}: {folder.reason(e)}") from e

  def read(i):
    split, at = places[i]
    example = sets[split][at]
    texts = [text.decode() if isinstance(text, bytes) else str(text) for text in example["captions"]["text"]]
    name = example.get("image/filename", b"")
    name = (name.decode() if isinstance(name, bytes) else str(name)) or f"{at:09d}"
    return Example(f"{split}/{name}", texts[0] if texts else "", example["image"], side(split))

  def side(split):
    return "test" if split in _HELD_OUT else "train"

  stat = (root / "dataset_info.json").stat()
  identities = [f"{split}/{i:09d}\0{stat.st_size}\0{stat.st_mtime_ns}\0{side(split)}" for split, i in places]
  return Source("tfds", f"{builder.name}/{builder.version}", identities, read)


def _open_prompts(path) -> Source:
  text, skipped, found = path.read_text(encoding="utf-8-sig"), [], []
  if path.suffix == ".txt":
    found = [(f"{path.name}:{i}", line.strip()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
  else:
    for where, line in _objects(path, text, ()):
      prompt = line if isinstance(line, str) else line.get("caption", line.get("prompt"))
      if isinstance(line, str) or not isinstance(prompt, str):
        skipped.append((where, line if isinstance(line, str) else "no text 'caption' or 'prompt'"))
      else:
        found.append((where, prompt))
  return Source("prompts", path.name, [f"{key}\0{prompt}" for key, prompt in found],
                lambda i: Example(*found[i], None), tuple(skipped), False)
