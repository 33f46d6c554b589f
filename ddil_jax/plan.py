"""What a training step needs on machines that are not here: memory, operations, collectives, time.

The real step of a config is compiled for a topology; nothing is run. TPU programs come from libtpu's compiler
without a TPU. For GPUs their program is compiled for as many virtual CPU devices: what is kept (parameters,
optimizers, averages, teacher, buffers) is the same, temporary memory and the collectives are what XLA's CPU compiler
makes of it: estimates.

The time is a roofline: the longest of operations / peak rate, bytes moved / memory bandwidth and collective bytes /
interconnect bandwidth, as if the three overlapped entirely. A real step takes longer.
"""

import functools
import hashlib
import importlib.metadata
import math
import os
import pathlib
import re
import threading
import time
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddil_jax import build as build_lib
from ddil_jax import files
from ddil_jax.errors import UsageError
from ddil_jax.registry import unknown
from ddil_jax.training import collectives, compiling, hlo, parallel
from ddil_jax.training.step import Layout, due_players, init_state, make_train_step

GIB = 2**30


class Chip(NamedTuple):
  """A chip as its data sheet has it.

  Attributes:
    memory: bytes.
    flops: operations/s in bfloat16, dense.
    bandwidth: of its memory, bytes/s.
    links: to other chips, bytes/s in and out together.
  """
  memory: float
  flops: float
  bandwidth: float
  links: float


CHIPS = {"v4": Chip(32 * GIB, 275e12, 1228e9, 300e9), "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9),
         "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9), "v6e": Chip(32 * GIB, 918e12, 1640e9, 448e9),
         "a100": Chip(80e9, 312e12, 2039e9, 600e9), "h100": Chip(80e9, 989e12, 3350e9, 900e9),
         "h200": Chip(141e9, 989e12, 4800e9, 900e9)}
_TPUS = ("v4", "v5e", "v5p", "v6e")
_SCALES = (4, 8, 16, 32, 64, 128, 256)
_FULL = 0.95  # of a chip's memory; the rest is the runtime's


class Program(NamedTuple):
  """A compiled step, per chip.

  Attributes:
    due: the players that learn in it.
    temporary, peak: bytes; peak is arguments, results that do not replace them, and temporary memory.
    flops, flops_most: operations of matrix products and convolutions, with the cheapest and with the dearest branch of
      what a step may do: one source or another, replay buffers refreshed or not.
    moved: bytes between chip and memory by the compiler's account, which counts loops once.
    collectives: {kind: bytes that a chip sends} of one step, with the dearest branch.
    sent_least: all of them with the cheapest.
    ideal: the least bytes that a chip has to send, see `training/collectives.py::ideal_bytes`.
    seconds: of compiling.
    refused: what the compiler said where it gave up for want of memory; `flops`, `moved` and `collectives` are not
      known then, and `temporary` is what it said, or 0.
  """
  due: tuple[str, ...]
  temporary: int
  peak: int
  flops: float
  flops_most: float
  moved: float
  collectives: dict[str, float]
  sent_least: float
  ideal: float
  seconds: float
  refused: str = ""


class Plan(NamedTuple):
  """What `plan` found.

  Attributes:
    topology, chips, chip: where; `chip` is None for CPU devices.
    batch_size: over all chips.
    summary: how the batch is split.
    kept: {kind: bytes per chip} of what lives from step to step.
    programs: one for each set of players; none where nothing was compiled.
    shares: {due: share of the steps}.
    fsdp, teacher_dtype: over how many chips parameters are split; in which the teacher is kept.
  """
  topology: str
  chips: int
  chip: Chip | None
  batch_size: int
  summary: str
  kept: dict[str, int]
  programs: list[Program]
  shares: list[float]
  fsdp: int
  teacher_dtype: str

  @property
  def peak(self) -> int:
    """The largest of the programs; without one what is kept, of which it is more."""
    return max((program.peak for program in self.programs), default=sum(self.kept.values()))

  @property
  def fits(self) -> bool | None:
    """None where that is not known."""
    if self.chip is None or not self.programs and self.peak <= _FULL * self.chip.memory:
      return None
    return self.compiled and self.peak <= _FULL * self.chip.memory

  @property
  def compiled(self) -> bool:
    """Whether there is a program for every step, so that operations and collectives are known."""
    return bool(self.programs) and not any(program.refused for program in self.programs)

  def mean(self, what: str) -> float:
    """The mean of "flops", "moved" or "collective" bytes over the steps of a run."""
    value = (lambda p: sum(p.collectives.values())) if what == "collective" else (lambda p: getattr(p, what))
    return sum(share * value(p) for share, p in zip(self.shares, self.programs))

  def seconds(self, chips: int | None = None) -> dict[str, float]:
    """Roofline time of a mean step by cause, at as many chips with the same batch on each.

    A ring sends (n - 1) / n of what it reduces or gathers: the collective bytes are scaled by that.
    """
    ring = lambda n: (n - 1) / n  # noqa: E731
    scale = 1.0 if chips is None or self.chips == 1 else ring(chips) / ring(self.chips)
    return {"operations": self.mean("flops") / self.chip.flops, "memory": self.mean("moved") / self.chip.bandwidth,
            "collectives": self.mean("collective") * scale / self.chip.links}

  def utilisation(self, chips: int | None = None) -> float:
    """The highest possible share of the chip's peak rate."""
    return self.mean("flops") / self.chip.flops / max(self.seconds(chips).values())


def devices_of(topology: str) -> tuple[list, Chip | None]:
  """Devices to compile for, and the chip.

  Args:
    topology: "v5e:4x4" and the like, "h100:8", or "cpu:8".

  Raises:
    UsageError: unknown chips, no count, or libtpu is missing.
  """
  name, colon, size = topology.partition(":")
  if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size) or name not in (*CHIPS, "cpu"):
    raise UsageError(unknown("topology", topology, [f"{chip}:4x4" if chip in _TPUS else f"{chip}:8" for chip in
                                                    (*CHIPS, "cpu")]))
  count = math.prod(int(n) for n in size.split("x"))
  if name in _TPUS:
    return _tpus(topology), CHIPS[name]
  # Before anything asks for devices: later they cannot be had.
  try:
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:
    pass  # asked already; enough of them may be there
  devices = jax.devices("cpu")
  if count > len(devices):
    raise UsageError(f"topology {topology}: {len(devices)} virtual CPU devices are there; set"
                     f" XLA_FLAGS=--xla_force_host_platform_device_count={count}")
  return devices[:count], CHIPS.get(name)


def _tpus(topology):
  # What libtpu would ask of a TPU machine.
  for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", topology.replace(":", "-")),
                      ("TPU_WORKER_HOSTNAMES", "localhost")):
    os.environ.setdefault(name, value)
  try:
    import libtpu  # noqa: F401
  except ImportError:
    raise UsageError(f"topology {topology} needs the TPU compiler; `pip install libtpu` (no TPU is needed)") from None
  from jax.experimental import topologies
  try:
    return list(topologies.get_topology_desc(topology, platform="tpu").devices)
  except Exception as error:  # whatever the plugin raises for a shape that does not exist
    raise UsageError(f"topology {topology}: {' '.join(str(error).split())[:200]}") from None


def plan(config: ConfigDict, topology: str, batch_size: int = 0, say=print, compiled: bool = True) -> Plan:
  """Compiles a config's training step for a topology.

  Args:
    config: its `train.parallel` is "mesh" where there is more than one chip.
    topology: see `devices_of`.
    batch_size: over all chips; 0 is the config's.
    say: told how long a compilation lasts.
    compiled: False is what chips keep alone, in seconds.

  Raises:
    UsageError: anything that does not fit.
  """
  devices, chip = devices_of(topology)
  config = config.copy_and_resolve_references().unlock()
  config.train.batch_size = batch_size or config.train.batch_size
  config.train.parallel = "mesh" if len(devices) > 1 else "single"
  built = build_lib.build(config)

  def make_step(layout):
    return make_train_step(built.objective, built.distribution, built.optimizers, built.ema_decays,
                           config.train.batch_size, config.states.rollout_params, layout)

  options = parallel.Options(config.train.fsdp, config.train.sharding, config.train.min_shard, config.train.microbatch)
  stands_in = chip is not None and devices[0].platform == "cpu"
  runner = parallel.make_runner(config.train.parallel, make_step, config.train.batch_size, devices, options,
                                platform="gpu" if stands_in else "")
  teacher = _as(jax.eval_shape(built.init_teacher, jax.random.key(0)), config.teacher.dtype) \
      if built.init_teacher else ()
  make_state = functools.partial(init_state, built.objective, built.distribution, built.optimizers, built.ema_decays)
  batch = _batch(built, config.train.batch_size)

  steps = np.lcm.reduce([player.period for player in built.objective.players])
  dues = [due_players(built.objective, step) for step in range(steps)]
  programs = []
  given = runner.lay(make_state, teacher, batch)
  for due in dict.fromkeys(dues) if compiled else ():
    ideal = collectives.ideal_bytes(make_step(Layout()), given, due, config.train.fsdp, len(devices),
                                    config.model.dtype)
    programs.append(_program(runner.lower(given, due), due, ideal, bytes_per_chip(given), topology, say))
  state = given["state"]
  kept = {"parameters": state.params, "optimizers": state.opt, "averages": state.ema, "teacher": given["frozen"],
          "buffers": state.dist, "batch": given["batch"]}
  return Plan(topology, len(devices), chip, config.train.batch_size, runner.summary,
              {kind: bytes_per_chip(tree) for kind, tree in kept.items()}, programs,
              [dues.count(program.due) / len(dues) for program in programs], config.train.fsdp, config.teacher.dtype)


def largest_batch(config: ConfigDict, topology: str, batch_size: int = 0, say=print) -> Plan | None:
  """The plan of the largest batch that fits, to 5 %, or None where one example a chip (or microbatch) does not.

  Raises:
    UsageError: as `plan`; and CPU devices, whose memory is not known.
  """
  if devices_of(topology)[1] is None:
    raise UsageError(f"topology {topology}: the largest batch needs chips whose memory is known: {', '.join(CHIPS)}")
  first = plan(config, topology, batch_size, say)
  found, limit = {first.batch_size: first}, _FULL * first.chip.memory

  def peak(size):
    if size not in found:
      found[size] = plan(config, topology, size, say)
    say(f"batch {size}: peak {_size(found[size].peak).strip()}, {'fits' if found[size].fits else 'does not fit'}")
    # A compiler that gave up may not have said how much was missing.
    return found[size].peak if found[size].compiled else max(found[size].peak, 2 * limit)

  unit = first.chips * max(1, config.train.microbatch)
  size = largest_fitting(peak, first.batch_size, unit, limit)
  return found[size] if size else None


def largest_fitting(peak, start: int, unit: int, limit: float, tries: int = 12) -> int:
  """The largest multiple of `unit` whose peak(size) is at most `limit`, to 5 %, or 0.

  The peak is nearly a line over the size, so the line through the last two sizes says which to try next; where
  nothing is too large (a microbatch keeps the peak where it is) the size at the last try is returned.
  """
  tried, fits, too_large = [], 0, None
  size = max(unit, start // unit * unit)
  for _ in range(tries):
    tried.append((size, peak(size)))
    if tried[-1][1] <= limit:
      fits = size
    else:
      too_large = size
    if too_large is not None and too_large - fits <= max(unit, fits // 20):
      break
    if len(tried) == 1:
      guess = 2 * size if fits else size // 2
    else:
      (a, peak_a), (b, peak_b) = tried[-2:]
      slope = (peak_b - peak_a) / (b - a)
      guess = b + (limit - peak_b) / slope if slope > 0 else 4 * b
    guess = int(min(guess, 4 * size)) // unit * unit
    guess = max(guess, fits + unit)
    size = guess if too_large is None else min(guess, too_large - unit)
  return fits


def _as(tree, dtype):
  return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, dtype), tree)


def _batch(built, size):
  shape = jax.ShapeDtypeStruct
  cond = {name: shape((size, *v.shape[1:]), v.dtype) for name, v in built.parts.cond.items()}
  return {"image": shape((size, *built.parts.image_shape), jnp.float32), **cond, "lane": shape((size,), jnp.int32)}


def bytes_per_chip(tree) -> int:
  """What a chip keeps of a tree of ShapeDtypeStructs with shardings."""
  return sum(math.prod(v.sharding.shard_shape(v.shape)) * v.dtype.itemsize for v in jax.tree.leaves(tree))


def _program(lowered, due, ideal, arguments, topology, say) -> Program:
  """Compiled, or what the same compiler said of the same program before: JAX cannot read programs of absent TPUs."""
  if not jax.config.jax_compilation_cache_dir:
    return _compile(lowered, due, ideal, arguments, say)
  compiler = [f"{name} {distribution.version}" for name in ("jax", "jaxlib", "libtpu")
              for distribution in importlib.metadata.distributions(name=name)]
  flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
  # With what counts, and the names of what is kept: what an older version kept is another thing.
  counting = [pathlib.Path(module.__file__).read_text() for module in (hlo, collectives)]
  named = [lowered.as_text(), topology, *compiler, *flags, *counting, *Program._fields]
  key = hashlib.sha256("\n".join(named).encode()).hexdigest()
  path = pathlib.Path(jax.config.jax_compilation_cache_dir) / "plans" / f"{key}.json"
  if path.exists():
    known = Program(**files.read_json(path))
    say(f"the step of {', '.join(due)} was compiled before, in {known.seconds:.0f} s")
    return known._replace(due=due, ideal=ideal)
  found = _compile(lowered, due, ideal, arguments, say)
  files.write_json(path, found._asdict())
  return found


def _compile(lowered, due, ideal, arguments, say) -> Program:
  began, done = time.monotonic(), threading.Event()

  def alive():
    while not done.wait(15):
      say(f"compiling the step of {', '.join(due)}: {time.monotonic() - began:.0f} s")

  threading.Thread(target=alive, daemon=True).start()
  try:
    with warnings.catch_warnings():  # of a program of a TPU in JAX's cache, which only a TPU can read
      warnings.filterwarnings("ignore", message="Error reading persistent compilation cache entry")
      compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    words = " ".join(str(error).partition("See https")[0].split())
    if "RESOURCE_EXHAUSTED" not in words:
      raise
    temporary = said_bytes(words)
    seconds = round(time.monotonic() - began, 1)
    return Program(due, temporary, arguments + temporary, 0.0, 0.0, 0.0, {}, 0.0, ideal, seconds, words)
  finally:
    done.set()
  memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
  sent = collectives.collective_bytes(text)
  return Program(due, memory.temp_size_in_bytes, compiling.peak_bytes(compiled), *hlo.operations(text),
                 cost.get("bytes accessed", 0.0), {kind: value.most for kind, value in sent.items()},
                 sum(value.least for value in sent.values()), ideal, round(time.monotonic() - began, 1))


def said_bytes(words: str) -> int:
  """The temporary memory that a compiler's refusal names, in bytes; 0 if it names none."""
  found = re.search(r"temporaries \(([\d.]+)([KMGT]?)\)", words)
  return int(float(found[1]) * 2**(10 * " KMGT".index(found[2] or " "))) if found else 0


def table(found: Plan) -> str:
  """A plan in words, for the terminal."""
  lines = [f"{found.topology}: {found.summary}", "", "kept on each chip"]
  lines += [f"  {kind:20}{_size(value)}" for kind, value in found.kept.items()]
  for program, share in zip(found.programs, found.shares):
    if program.refused:
      lines += ["", f"step of {', '.join(program.due)} ({share:.0%} of the steps): the compiler gave up after"
                f" {program.seconds:.0f} s", f"  {program.refused}"]
      continue
    lines += ["", f"step of {', '.join(program.due)} ({share:.0%} of the steps; compiled in {program.seconds:.0f} s)",
              f"  {'temporary':20}{_size(program.temporary)}", f"  {'peak':20}{_size(program.peak)}",
              f"  {'operations':20}{program.flops:9.3g}"
              + f" to {program.flops_most:.3g}, by what a step draws" * (program.flops_most > program.flops),
              f"  {'memory traffic':20}{_size(program.moved)}"]
    lines += [f"  {kind:20}{_size(value)}" for kind, value in program.collectives.items()]
    if program.ideal:
      sent = sum(program.collectives.values())
      lines += [f"  {'collectives':20}{_size(sent)}, {sent / program.ideal:.3g} times what has to be sent"
                + f" ({program.sent_least / program.ideal:.3g} in the cheapest step)" * (program.sent_least < sent)]
  if found.chip is None:
    return "\n".join(lines) + "\n"
  if not found.programs:
    left = _size(found.chip.memory - found.peak).strip()
    lines += ["", f"{_size(found.peak).strip()} of {_size(found.chip.memory).strip()} are kept: "
              + (f"it does NOT fit; {remedy(found)}" if found.fits is False else
                 f"{left} are left for what a step needs in between, which was not planned")]
    return "\n".join(lines) + "\n"
  lines += ["", f"peak {_size(found.peak).strip()} of {_size(found.chip.memory).strip()}: "
            + ("it fits" if found.fits else f"it does NOT fit; {remedy(found)}")]
  if not found.compiled:
    return "\n".join(lines) + "\n"
  seconds = found.seconds()
  most = max(seconds, key=seconds.get)
  lines += [f"roofline: {1e3 * seconds[most]:.3g} ms a step, bound by {most} ("
            + ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in seconds.items()) + ")"]
  if found.chips > 1:
    lines += ["at most this share of the peak rate, with the same batch on each chip: "
              + ", ".join(f"{n} chips {found.utilisation(n):.2%}" for n in _SCALES)]
  else:
    lines += [f"at most {found.utilisation():.2%} of the peak rate"]
  return "\n".join(lines) + "\n"


def _size(value) -> str:
  power = min(3, int(math.log2(value) // 10)) if value >= 1 else 0
  return f"{value / 2**(10 * power):9.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def remedy(found: Plan) -> str:
  """The change that takes most of what is too much."""
  networks = sum(found.kept[kind] for kind in ("parameters", "optimizers", "averages", "teacher"))
  temporary = max(found.programs, key=lambda p: p.peak).temporary if found.programs else 0
  most = max(networks, found.kept["buffers"], temporary)
  if most == networks or networks > _FULL * found.chip.memory:
    split = f"train.fsdp, up to {found.chips}" if found.fsdp < found.chips else "a larger topology and train.fsdp"
    return (f"parameters and what belongs to them are too much: split them over more chips by {split}"
            + "; teacher.dtype=bfloat16" * (found.teacher_dtype != "bfloat16"))
  if most == temporary:
    return "most is temporary: set train.microbatch lower, model.remat, or a smaller batch"
  return "most is replay: set states.capacity lower"


def as_json(found: Plan) -> dict:
  """A plan as JSON has it."""
  out = found._asdict() | {"chip": found.chip and found.chip._asdict(), "peak": found.peak, "fits": found.fits,
                           "programs": [program._asdict() for program in found.programs]}
  return out | ({"roofline_seconds": found.seconds()} if found.chip and found.compiled else {})
