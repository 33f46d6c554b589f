"""What the page of `ddil serve` draws, and the page itself where NiceGUI is installed."""

import asyncio
import math
import socket
import sys

import jax
import numpy as np
import pytest

from ddil_jax import config as config_lib
from ddil_jax import serve, trained
from ddil_jax.errors import UsageError
from tests.running import refuse, shared  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def drawing(shared):  # noqa: F811
  """A student of LCM that reads the guidance scale, as it starts, on made-up images of 10 classes."""
  config = config_lib.load("configs/digits_lcm.py:guided,smoke", {})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trained, "params_of", lambda config, built, workdir: (
        built.objective.init(jax.random.key(0), trained.load_teacher(config, built))["student"], {}))
    return serve.Drawing(config, "run")


def test_both_sides_have_the_same_noise(drawing):
  """Networks that know nothing hand the noise on."""
  student, teacher = drawing.sides
  assert (student.name, student.steps, student.most_steps, teacher.name) == ("student", 4, 16, "teacher")
  a, b, other = (drawing.draw(side, 1, serve.Request(seed=seed, num=2)).images.ravel()
                 for side, seed in ((student, 0), (teacher, 0), (teacher, 1)))
  assert np.corrcoef(a, b)[0, 1] > 0.9 and abs(np.corrcoef(a, other)[0, 1]) < 0.3


def test_a_program_is_compiled_once(drawing):
  student, teacher = drawing.sides
  for side, calls in ((student, 2), (teacher, 4)):
    first, again, other, stronger = (drawing.draw(side, 2, serve.Request("3", seed, 2, scale))
                                     for seed, scale in ((5, 2.0), (5, 2.0), (6, 2.0), (5, 4.0)))
    np.testing.assert_array_equal(first.images, again.images)
    assert np.any(first.images != other.images)
    assert first.compile_seconds > 0 and again.seconds > 0 and first.network_evaluations == calls
    assert again.compile_seconds == other.compile_seconds == stronger.compile_seconds == 0
  assert first.picture(100).shape == (6 * 8, 6 * 8 * 2 + 1, 1)


def test_bad_requests_are_refused_in_a_line(drawing):
  student, _ = drawing.sides
  for wanted, steps, line in (
      (serve.Request(seed=None), 1, "the seed: a whole number from 0 to 4294967295 is needed, not None"),
      (serve.Request(num=17), 1, "images: a whole number from 1 to 16"),
      (serve.Request(), 17, "the student's steps: a whole number from 1 to 16"),
      (serve.Request(seed=math.nan), 1, "the seed"),
      (serve.Request("ten"), 1, "no class 'ten'; there are: all in turn, 0, 1"),
      (serve.Request(guidance_scale=0.5), 1, "the guidance scale has to be a number from 1 to 5, not 0.5"),
      (serve.Request(guidance_scale=None), 1, "the guidance scale has")):
    with pytest.raises(UsageError, match=line):
      drawing.draw(student, steps, wanted)


def test_a_scale_that_is_folded_in_is_fixed():
  config = config_lib.load("configs/digits_pd.py:guided,smoke", {"objective.num_steps": "2"})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trained, "params_of", lambda config, built, workdir: ({}, {}))
    found = serve.Drawing(config, "run")
  student, teacher = found.sides
  assert student.fixed_scale == 3 and teacher.fixed_scale is None and found.guidance == (1, 15, 3)
  assert student.most_steps == 2


def test_a_run_that_is_not_there(refuse, tmp_path):  # noqa: F811
  assert "no run directory" in refuse("serve", f"--workdir={tmp_path / 'run'}")


def test_what_is_missing_is_found_before_the_networks_are_read(tmp_path):
  config = config_lib.load("configs/digits_lcm.py:smoke", {})
  with socket.create_server(("127.0.0.1", 0)) as other:
    port = other.getsockname()[1]
    pytest.importorskip("nicegui", reason="the extra `serve` is not installed")
    with pytest.raises(UsageError, match=f"cannot listen at --host=127.0.0.1 --port={port}: .*in use"):
      serve.serve(config, tmp_path, port=port)


def test_without_nicegui(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "nicegui", None)
  with pytest.raises(UsageError, match="pip install 'ddil-jax"):
    serve.serve(config_lib.load("configs/digits_lcm.py:smoke", {}), tmp_path)


def test_the_page(drawing):
  """Drawn by a click, mistakes shown, and nothing from elsewhere."""
  pytest.importorskip("nicegui", reason="the extra `serve` is not installed")
  from nicegui.testing.user_simulation import user_simulation

  async def visit():
    async with user_simulation(serve.page(drawing, "lcm: run")) as user:
      await user.open("/")
      html = (await user.http_client.get("/")).text
      assert "http://" not in html.replace("http://www.w3.org", "") and "https://" not in html
      await user.should_see("Guidance scale 3 of student and teacher")
      user.find("Draw").click()
      await user.should_see("4 images in", retries=600)
      await user.should_see("8 network evaluations each", retries=600)
      user.find("Seed").clear().type("-1")
      user.find("Draw").click()
      await user.should_see("the seed: a whole number")

  asyncio.run(visit())
