"""Student and teacher side by side, from the same noise: how a page asks for images, and the page (`ddil serve`)."""

import base64
import functools
import math
import pathlib
import socket
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddil_jax import build as build_lib
from ddil_jax import config_checks
from ddil_jax import measure, prompting, samplers, trained
from ddil_jax.errors import UsageError
from ddil_jax.evaluation import grids, sampling
from ddil_jax.types import Params

MOST_STEPS, MOST_IMAGES = 100, 16
GUIDANCE = (1.0, 15.0)  # of a teacher, where no student has a range of its own
IN_TURN = "all in turn"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Request(NamedTuple):
  """What both sides draw: a prompt or a class, the seed of the noise, how many images, the guidance scale."""
  about: str = ""
  seed: int = 0
  num: int = 4
  guidance_scale: float = 1.0


class Side(NamedTuple):
  """A network that draws.

  Attributes:
    name: "student" or "teacher".
    params: of `sampler(...).sample`.
    sampler: (steps, guidance scale or None, see `samplers.of_student`) -> Sampler.
    steps, most_steps: at first, and at most.
    fixed_scale: the guidance scale where it cannot be chosen, as reported; else None.
    reads_scale: it is given the scale, and needs no second call without a condition.
  """
  name: str
  params: Params
  sampler: Callable[[int, float | None], samplers.Sampler]
  steps: int
  most_steps: int
  fixed_scale: float | None
  reads_scale: bool


class Drawn(NamedTuple):
  """What a side drew.

  Attributes:
    images: float32 [N,H,W,C] in [-1, 1].
    seconds: to draw them all.
    compile_seconds: before that; 0 where the program was there already.
    network_evaluations: per image.
    notes: what the user has to know of the request.
  """
  images: np.ndarray
  seconds: float
  compile_seconds: float
  network_evaluations: float
  notes: tuple[str, ...]

  def picture(self, width: int = 384) -> np.ndarray:
    """uint8 [height, width, C]: the images in a square, enlarged in whole pixels up to about `width`."""
    columns = math.ceil(math.sqrt(len(self.images)))
    return grids.image_grid(self.images, columns, scale=max(1, width // (columns * self.images.shape[2])))


class Drawing:
  """The networks of a run, ready to draw. Image i of a seed is that of `ddil sample` with this seed, on every side.

  Args of the constructor:
    config, workdir: of the run, as for `trained.sample`.
    encoders, tokenizer: see `prompting.encoder`; needed by a run that reads text.

  Attributes:
    sides: the student and its teacher; one of them where the other does not exist.
    reads_text: requests are about a prompt.
    classes: what else requests can be about; () where there is nothing to choose.
    guidance: (least, most, at first) of the guidance scale; None where no side leaves a choice.

  Raises:
    UsageError: no such run, or text encoders and a tokenizer that are missing or not the run's.
  """

  def __init__(self, config: ConfigDict, workdir: str | pathlib.Path, encoders: Sequence[str] = (),
               tokenizer: str = ""):
    built = build_lib.build(config)
    self._data = built.dataset
    params, _ = trained.params_of(config, built, workdir)
    self.reads_text = "text" in self._data.cond
    self._encode = prompting.encoder(config, encoders, tokenizer) if self.reads_text else None
    classes = self._data.num_classes
    self.classes = (IN_TURN, *map(str, range(classes))) if classes > 1 and not self.reads_text else ()
    self.sides = _sides(config, built, params, conditional=self.reads_text or classes > 1)
    own = tuple(map(float, config.objective.get("guidance_range", ()))) or GUIDANCE
    free = any(side.fixed_scale is None for side in self.sides)
    self.guidance = (*own, float(np.clip(config.teacher.guidance_scale, *own))) if free else None
    self._program = functools.lru_cache(maxsize=64)(self._program)  # those that a session at the page uses
    self._one_at_a_time = threading.Lock()

  def draw(self, side: Side, steps: int, wanted: Request) -> Drawn:
    """Draws on one side; two sides have the same noise and condition for the same request.

    Raises:
      UsageError: a request that cannot be met, or values that are not finite.
    """
    steps = _whole(f"the {side.name}'s steps", steps, 1, side.most_steps)
    seed, num = _whole("the seed", wanted.seed, 0, 2**32 - 1), _whole("images", wanted.num, 1, MOST_IMAGES)
    scale, notes = self._scale(wanted.guidance_scale), []
    with self._one_at_a_time:
      cond = self._condition(wanted.about, num, notes)
      guided = side.fixed_scale is None and not side.reads_scale and scale != 1
      if guided or side.reads_scale:
        cond["guidance_scale"] = np.full(num, scale, np.float32)
      program = self._program(side.name, steps, num, guided)
      images = sampling.sample_images(program, num, config_checks.pixel_shape(self._data), seed, cond, num)
      if not np.isfinite(images).all():
        raise UsageError(f"the {side.name}'s images hold values that are not finite")
      return Drawn(images, program.seconds, program.compile_seconds, program.network_evaluations, tuple(notes))

  def _scale(self, scale) -> float:
    if self.guidance is None:
      return 1.0
    least, most, _ = self.guidance
    if not isinstance(scale, int | float) or not least <= scale <= most:
      raise UsageError(f"the guidance scale has to be a number from {least:g} to {most:g}, not {scale}")
    return float(scale)

  def _condition(self, about: str, num: int, notes: list[str]) -> dict[str, np.ndarray]:
    if self._encode:
      return prompting.conditions(self._data, self._encode, [str(about or "")], num, notes.append)
    cond = measure.conditions(self._data, num)
    if about in ("", IN_TURN):
      return cond
    if about not in self.classes:
      raise UsageError(f"there is no class '{about}'; there are: {', '.join(self.classes) or 'none'}")
    return {**cond, "label": np.full(num, int(about), np.int32)}

  def _program(self, name: str, steps: int, num: int, guided: bool) -> "_Program":
    """A program for each number of steps and images; `guided`, with a second call without the condition."""
    del num  # a program has one
    side = next(side for side in self.sides if side.name == name)
    sampler = side.sampler(steps, None if guided or side.reads_scale else 1.0)
    return _Program(measure.draw_with(sampler, side.params, decoder=self._data.decoder), sampler.network_evaluations)


class _Program:
  """A `measure.draw_with` that says how long it took, without compilation."""

  def __init__(self, draw: functools.partial, network_evaluations: int):
    self._draw, self._compiled, self.network_evaluations = draw, None, network_evaluations
    self.seconds = self.compile_seconds = 0.0

  def __call__(self, keys, cond) -> np.ndarray:
    start = time.perf_counter()
    if first := self._compiled is None:
      self._compiled = self._draw.func.lower(*self._draw.args, keys, cond).compile()
    ready = time.perf_counter()
    images = np.asarray(self._compiled(*self._draw.args, keys, cond))
    self.compile_seconds, self.seconds = (ready - start) * first, time.perf_counter() - ready
    return images


def _whole(what: str, value, least: int, most: int) -> int:
  if not isinstance(value, int | float) or value != value // 1 or not least <= value <= most:
    raise UsageError(f"{what}: a whole number from {least} to {most} is needed, not {value}")
  return int(value)


def _sides(config: ConfigDict, built: build_lib.Built, params: Params, conditional: bool) -> tuple[Side, ...]:
  objective, scale = built.objective, config.teacher.guidance_scale
  shown = config.teacher.folded_guidance_scale or scale
  is_teacher, reads = objective.name == "denoising", samplers.reads_guidance(config)

  def of(name, params, make, steps, most, free, reads_scale):
    """A network without a choice has the configured scale at every request."""
    sampler = (lambda n, g: make(config, built, n, g)) if free else lambda n, g: make(config, built, n, scale)
    return Side(name, params, sampler, min(steps, most), most, None if free else shown, reads_scale)

  most = MOST_STEPS if is_teacher else min(len(objective.grid) - 1, MOST_STEPS)
  sides = [of("teacher" if is_teacher else "student", params, samplers.of_student, len(objective.sampler_grid) - 1,
              most, conditional if is_teacher else reads, reads)]
  if objective.teacher is not None:
    reads = reads and bool(config.teacher.get("guidance_embedding", 0))
    free = reads or (conditional and not config.teacher.folded_guidance_scale)
    teacher = jax.tree.map(jnp.asarray, trained.load_teacher(config, built))
    sides.append(of("teacher", teacher, samplers.of_teacher, config.states.teacher_steps, MOST_STEPS, free, reads))
  return tuple(sides)


# The page ----------------------------------------------------------------------------------


def page(drawing: Drawing, title: str) -> Callable[[], None]:
  """What NiceGUI calls for each visitor: lays out the controls, and the pictures under their captions."""
  from nicegui import run, ui

  def show():
    ui.page_title(title)
    with ui.column().classes("w-full max-w-4xl mx-auto gap-2"):
      ui.label(title).classes("text-xl")
      about = None
      if drawing.reads_text:
        about = ui.input("Prompt", value="").classes("w-full").on("keydown.enter", lambda: draw())
      with ui.row().classes("w-full items-center gap-6"):
        if drawing.classes:
          about = ui.select(list(drawing.classes), value=IN_TURN, label="Class").classes("w-32")
        seed = ui.number("Seed", value=0, min=0, step=1, format="%d").classes("w-32")
        num = ui.number("Images", value=4, min=1, max=MOST_IMAGES, step=1, format="%d").classes("w-24")
        scale = _guidance(ui, drawing)
        button = ui.button("Draw", on_click=lambda: draw()).classes("ml-auto")
      notes = ui.label().classes("text-negative").props("role=alert")
      with ui.row().classes("w-full no-wrap gap-6"):
        panels = [_panel(ui, side) for side in drawing.sides]

    async def draw():
      wanted = Request(about.value if about else "", seed.value, num.value, scale.value if scale else 1.0)
      found = []
      button.disable()
      notes.set_text("")
      try:
        for side, (steps, image, caption) in zip(drawing.sides, panels, strict=True):
          caption.set_text("drawing ...")
          image.set_source("")
          drawn = await run.io_bound(drawing.draw, side, steps.value, wanted)
          image.set_source(_data_url(drawn.picture()))
          caption.set_text(_caption(drawn))
          found += drawn.notes
        notes.set_text("; ".join(dict.fromkeys(found)))
      except (UsageError, RuntimeError) as error:  # the latter are JAX's, of memory for instance
        caption.set_text("")
        notes.set_text(str(error).partition("\n")[0])
      finally:
        button.enable()

  return show


def _guidance(ui, drawing: Drawing):
  """A slider for the sides that have a choice, and a line for those that have none."""
  scale = None
  with ui.column().classes("gap-0 w-64"):
    if drawing.guidance:
      least, most, value = drawing.guidance
      shown = ui.label().classes("text-sm")
      scale = ui.slider(min=least, max=most, step=0.1, value=value)
      names = " and ".join(side.name for side in drawing.sides if side.fixed_scale is None)
      shown.bind_text_from(scale, "value", lambda g: f"Guidance scale {g:g} of {names}")
    for side in drawing.sides:
      if side.fixed_scale is not None:
        ui.label(f"Guidance scale of the {side.name}: {side.fixed_scale:g}, fixed").classes("text-sm text-grey-7")
  return scale


def _panel(ui, side: Side):
  """(steps, image, caption) of a side."""
  with ui.column().classes("w-1/2 gap-1"):
    shown = ui.label().classes("font-bold")
    steps = ui.slider(min=1, max=side.most_steps, step=1, value=side.steps)
    shown.bind_text_from(steps, "value", lambda n: f"{side.name.capitalize()}, {n} step{'s' * (n != 1)}")
    image = ui.image().classes("w-full").style("image-rendering: pixelated").props(f'alt="images of the {side.name}"')
    return steps, image, ui.label().classes("text-sm")


def _caption(drawn: Drawn) -> str:
  num, calls = len(drawn.images), round(drawn.network_evaluations, 2)
  compiled = f"; {drawn.compile_seconds:.1f} s to compile before" if drawn.compile_seconds else ""
  return (f"{num} image{'s' * (num != 1)} in {drawn.seconds:.2g} s, {calls:g} network evaluation{'s' * (calls != 1)}"
          f" each{compiled}")


def _data_url(picture: np.ndarray) -> str:
  """A picture in the page itself: no file is written or served."""
  return "data:image/png;base64," + base64.b64encode(grids.png_bytes(picture)).decode()


def serve(config: ConfigDict, workdir: str | pathlib.Path, encoders: Sequence[str] = (), tokenizer: str = "",
          host: str = "127.0.0.1", port: int = 7860, say: Callable[[str], None] = print) -> None:
  """Shows the page of a run at http://HOST:PORT until the process is interrupted.

  Args:
    config, workdir, encoders, tokenizer: see `Drawing`.
    host: of another than this machine's own names the user is warned.
    port: 0 takes a free one.

  Raises:
    UsageError: NiceGUI is not installed, nothing can listen there, or as `Drawing` raises it.
  """
  # What takes no time first; the networks take long.
  try:
    import fastapi
    import nicegui
    import uvicorn
    from starlette.middleware.trustedhost import TrustedHostMiddleware
  except ImportError:
    raise UsageError("`ddil serve` needs NiceGUI: pip install 'ddil-jax[serve]'") from None
  try:
    listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
  except (OSError, OverflowError) as error:
    raise UsageError(f"cannot listen at --host={host} --port={port}: {error}") from None
  with listening:
    app = fastapi.FastAPI(openapi_url=None)
    if host in LOOPBACK:  # another site whose name was made to point here is not answered
      app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    else:
      say(f"warning: --host={host} lets others on the network use this page; it asks for no password")
    root = page(Drawing(config, workdir, encoders, tokenizer), f"{config.objective.name}: {workdir}")
    nicegui.ui.run_with(app, root=root, show_welcome_message=False)
    say(f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]} (Ctrl-C ends it)")
    warnings.filterwarnings("ignore", module="nicegui")  # it looks at every object, and torch's old names complain
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
