"""Writers on several machines, or in several containers, whose process ids may be the same."""

import os

from ddil_jax import files


def test_two_write_the_same_file_at_once(tmp_path):
  """Each writes a file of its own, and the one that is done last stays, whole."""
  path = tmp_path / "x"
  with files.whole(path) as first:
    first.write(b"first")
    with files.whole(path) as second:
      second.write(b"the second one")
    assert path.read_bytes() == b"the second one"
  assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["x"]
