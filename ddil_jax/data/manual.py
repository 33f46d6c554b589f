"""Files that the user has to bring: where they are looked for, and whether they are the published ones."""

import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from ddil_jax.data.builder import ImageBuilder
from ddil_jax.errors import UsageError


class Published(NamedTuple):
  """Size in bytes and SHA-256 of a file as its authors publish it."""
  size: int
  sha256: str


class ManualBuilder(ImageBuilder, skip_registration=True):
  """A builder that reads files of the user.

  Args of the constructor:
    folders: where to look for the files (see `places`).
    checksums: {file: Published}; None takes the published ones, {} checks none.

  Attributes:
    FILES: {file: Published}, all of them needed.
  """
  FILES: dict[str, Published]

  def __init__(self, *, folders: Sequence[str | os.PathLike] = (),
               checksums: dict[str, Published] | None = None, **kwargs):
    self._folders = [pathlib.Path(f) for f in folders]
    self._checksums = self.FILES if checksums is None else checksums
    super().__init__(**kwargs)

  def given_files(self) -> dict[str, pathlib.Path]:
    """{file: its path}, found and verified; raises UsageError if one is missing or another than published."""
    paths = find(self.name, tuple(self.FILES), self._folders, self.HOMEPAGE)
    for file, published in self._checksums.items():
      verify(self.name, paths[file], published)
    return paths


def places(name: str, data_dir: str | os.PathLike,
           manual_dir: str | os.PathLike | None) -> list[pathlib.Path]:
  """The folders that may hold the files of a set, in the order in which they are tried.

  A folder named after the set comes before a shared one: mnist and fashion_mnist use the same file names.
  """
  if manual_dir is not None:
    return [pathlib.Path(manual_dir) / name, pathlib.Path(manual_dir)]
  root = pathlib.Path(data_dir)
  manual = root / "downloads" / "manual"
  return [manual / name, manual, root / name, root]


def find(name: str, files: tuple[str, ...], folders: list[pathlib.Path],
         source: str) -> dict[str, pathlib.Path]:
  """The paths of `files`, all from the first folder that has them all.

  Raises:
    UsageError: none has; names the missing files, the folders, and the place to get them from.
  """
  missing = {folder: [f for f in files if not (folder / f).is_file()] for folder in folders}
  nearest = min(folders, key=lambda folder: len(missing[folder]))  # the first of the best
  if missing[nearest]:
    raise UsageError(
        f"{name}: missing {', '.join(missing[nearest])}; looked in {', '.join(map(str, folders))}; "
        f"nothing is downloaded: get what is missing from {source} into {folders[0]}, or name its folder as "
        "manual_dir (--config.data.manual_dir=DIR)")
  return {f: nearest / f for f in files}


def verify(name: str, path: pathlib.Path, published: Published) -> None:
  """Raises UsageError if the file is not the published one."""
  size = path.stat().st_size
  if size != published.size:
    raise UsageError(f"{name}: {path} has {size} bytes, the published file {published.size}: it is another "
                     "file or incomplete; get it anew")
  with open(path, "rb") as f:
    found = hashlib.file_digest(f, "sha256").hexdigest()
  if found != published.sha256:
    raise UsageError(f"{name}: {path} has SHA-256 {found}, the published file {published.sha256}: it is "
                     "another file or damaged; get it anew")
