"""Captioned emoji: the small text-to-image set of the demo, read from an archive of PNG files and a list of captions.

    FOLDER/noto_png128.zip     RGBA images, by the names that the list gives
    FOLDER/captions.jsonl      a line an image: {"file": ..., "caption": ..., "keywords": [...]}
"""

import io
import json
import pathlib
import re
import zipfile
from typing import NamedTuple

import numpy as np

from ddil_jax.data import folder
from ddil_jax.data.dataset import fit
from ddil_jax.errors import UsageError

ARCHIVE, CAPTIONS = "noto_png128.zip", "captions.jsonl"
TEST_EVERY = 10
_SKIN_TONE = r"_1f3f[b-f]"  # in the name of a file, once for each person


class Emoji(NamedTuple):
  """Images with texts.

  Attributes:
    images: uint8 [N,S,S,3], on white.
    captions: of each image.
    keywords: of each image, any number.
    concepts: int [N], equal for those that differ in skin tones only: half of the images are such variants.
    is_test: bool [N], every tenth concept with all of its images.
  """
  images: np.ndarray
  captions: tuple[str, ...]
  keywords: tuple[tuple[str, ...], ...]
  concepts: np.ndarray
  is_test: np.ndarray

  def where(self, keep: np.ndarray) -> "Emoji":
    """Those with `keep`, bool [N]."""
    index = np.flatnonzero(keep)
    return Emoji(self.images[index], tuple(self.captions[i] for i in index), tuple(self.keywords[i] for i in index),
                 self.concepts[index], self.is_test[index])


def load(path, size: int = 32) -> Emoji:
  """Reads the captioned images in a folder, resized with antialiasing to `size` pixels a side.

  Raises:
    UsageError: a file is absent, damaged or says something else; fewer than 20 emoji.
  """
  path = pathlib.Path(path)
  rows = _rows(path / CAPTIONS)
  try:
    with zipfile.ZipFile(path / ARCHIVE) as archive:
      images = [_image(archive, row["file"], size) for row in rows]
  except (OSError, zipfile.BadZipFile) as e:
    raise UsageError(f"cannot read {path / ARCHIVE}: {e}") from e
  names, concepts = np.unique([re.sub(_SKIN_TONE, "", row["file"]) for row in rows], return_inverse=True)
  if len(names) < 2 * TEST_EVERY:
    raise UsageError(f"{path} has {len(names)} emoji; at least {2 * TEST_EVERY} are needed, since every"
                     f" {TEST_EVERY}th is held out")
  return Emoji(np.stack(images), tuple(row["caption"].strip() for row in rows),
               tuple(tuple(" ".join(word.split()) for word in row["keywords"]) for row in rows), concepts,
               concepts % TEST_EVERY == TEST_EVERY - 1)


def _rows(path: pathlib.Path) -> list[dict]:
  try:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
  except (OSError, ValueError) as e:
    raise UsageError(f"cannot read {path}: {e}") from e
  for i, row in enumerate(rows):
    if not (isinstance(row, dict) and isinstance(row.get("file"), str) and isinstance(row.get("caption"), str)
            and isinstance(row.get("keywords"), list) and all(isinstance(word, str) for word in row["keywords"])):
      raise UsageError(f'{path}: line {i + 1} is not {{"file": "...", "caption": "...", "keywords": ["...", ...]}}')
  return rows


def _image(archive: zipfile.ZipFile, name: str, size: int) -> np.ndarray:
  try:
    return np.asarray(fit(folder.open_image(io.BytesIO(archive.read(name)), 3), size))
  except Exception as e:  # decoders raise all sorts of things on damaged files
    raise UsageError(f"{archive.filename}: {name} cannot be read: {folder.reason(e)}") from e
