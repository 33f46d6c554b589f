"""`ddil plan`: what a chip keeps is what really lies on a device, collectives are those of the arithmetic."""

import json
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax import config as config_lib
from ddil_jax import plan as plan_lib
from ddil_jax.main import main
from ddil_jax.training import collectives
from tests.running import refuse, shared  # noqa: F401 (fixtures)

pytestmark = pytest.mark.xdist_group("plan")
LCM = ("configs/digits_lcm.py:ddil,smoke",
       {"train.min_shard": "64", "train.batch_size": "16", "model.channel_mult": "(1,)"})


@pytest.fixture(scope="module", autouse=True)
def all_devices():
  """Before a plan asks for as many as it needs."""
  assert len(jax.devices()) == 8


@pytest.fixture(scope="module")
def plans(shared):  # noqa: F811
  """The same config with all parameters on each of 8 devices, and split over 4 of them."""
  return {fsdp: plan_lib.plan(config_lib.load(LCM[0], LCM[1] | {"train.fsdp": str(fsdp)}), "cpu:8", say=print)
          for fsdp in (1, 4)}


def test_what_a_chip_keeps(plans):
  whole, split = plans[1], plans[4]
  params = whole.kept["parameters"]
  assert whole.kept["teacher"] == params and whole.kept["averages"] == 2 * params  # one of the config, one target
  assert abs(whole.kept["optimizers"] - 2 * params) < 64  # Adam, and its count
  for kind in ("parameters", "averages", "teacher", "optimizers"):
    assert whole.kept[kind] / 4 <= split.kept[kind] < whole.kept[kind] / 3, kind  # small arrays stay whole
  for kind in ("buffers", "batch"):
    assert split.kept[kind] == whole.kept[kind]
  assert whole.kept["batch"] == 2 * (8 * 8 * 4 + 4 + 4)  # two examples of 8x8, a label, a lane
  for found in plans.values():
    program, = found.programs
    assert program.peak >= sum(found.kept.values()) and program.flops > 0 and found.shares == [1.0]
    assert program.flops_most > program.flops  # a step may refill the buffers by a rollout
    assert f"to {program.flops_most:.3g}, by what a step draws" in plan_lib.table(found)


def test_collectives_are_the_arithmetic(plans):
  """Replicated parameters: gradients are summed once. Split: student, target and teacher are gathered once each, and
  gradients summed to their place."""
  params = plans[1].kept["parameters"]
  reduced = plans[1].programs[0].collectives
  assert params * 2 * 7 / 8 <= reduced["all-reduce"] < 1.1 * params * 2 * 7 / 8 + 4096  # and the metrics
  gathered, scattered = (plans[4].programs[0].collectives[kind] for kind in ("all-gather", "reduce-scatter"))
  assert 3 * params * 3 / 4 * 0.9 < gathered < 3 * params * 3 / 4  # small arrays stay whole
  assert scattered == pytest.approx(gathered / 3)


def test_the_least_that_has_to_be_sent(plans):
  """A gradient summed once, or three networks gathered, one of them summed to its place: by the bytes kept."""
  params, split = plans[1].kept["parameters"], plans[4].kept["parameters"]
  assert plans[1].programs[0].ideal == params * 2 * 7 / 8
  for program in (plans[fsdp].programs[0] for fsdp in plans):
    assert 1 <= sum(program.collectives.values()) / program.ideal < 1.01
    assert 0 < program.sent_least <= sum(program.collectives.values())
  small = (4 * split - params) / 3  # what stays whole on each chip; the rest is split over 4
  gathers, sums = 3 * 3 / 4, 3 / 4 + 2 * 1 / 2 / 4  # student, target and teacher; not the config's average
  assert plans[4].programs[0].ideal == pytest.approx((gathers + sums) * (params - small) + small * 2 * 7 / 8)


def test_kernels_are_gathered_as_networks_read_them():
  """In bfloat16 half of a kernel's bytes, all of a bias's; gradients are summed in float32."""
  class State(NamedTuple):
    params: dict
    ema: dict
    dist: tuple

  mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
  shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32, sharding=jax.sharding.NamedSharding(  # noqa: E731
      mesh, jax.sharding.PartitionSpec("fsdp")))
  state = State({"student": {"kernel": shape(8, 4), "bias": shape(4)}}, {}, ())

  def step(state, frozen, batch, key, due):
    loss = lambda p: jnp.sum(batch @ p["kernel"] + p["bias"][None])  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(state.params["student"])
    moved = jax.tree.map(lambda p, g: p - g, state.params["student"], gradient)
    return state._replace(params={"student": moved}), {"loss": value}

  given = {"state": state, "frozen": {}, "batch": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
  sums = (3 / 4 + 2 * 1 / 2 / 4) * (128 + 16)
  for dtype, kernel in (("float32", 128), ("bfloat16", 64)):
    found = collectives.ideal_bytes(step, given, ("student",), 4, 8, dtype)
    assert found == pytest.approx(3 / 4 * (kernel + 16) + sums)


def test_loops_count_as_often_as_they_run():
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
  whole, split = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), ("d",)))

  def step(x, weight):
    def body(x, _):
      # Different in every round, so that no compiler takes it out of the loop.
      return x + jax.lax.with_sharding_constraint(jnp.tanh(weight * x.mean()), whole).sum(), None
    return jax.lax.scan(body, x, None, length=5)[0]

  text = jax.jit(step, in_shardings=(split, split)).lower(
      jax.ShapeDtypeStruct((16,), jnp.float32), jax.ShapeDtypeStruct((8, 100), jnp.float32)).compile().as_text()
  found = {kind: sent.most for kind, sent in collectives.collective_bytes(text).items()}
  assert sum(found.values()) >= 5 * 2 * 7 / 8 * 4  # five sums of a scalar at least
  assert sum(found.values()) % 5 == pytest.approx(0, abs=1e-6)


HLO = """
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[64,2]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %h = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %r = (f32[100]{0}, f32[28]{0}) all-reduce(%p, %q), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  %b = ((f32[8]{0}, f32[2]{0}), (f32[32]{0}, f32[8]{0})) all-gather-start(%x, %y), replica_groups=[2,4]<=[8]
  %s = f32[16]{0} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%sum
  %m = f32[8]{0} collective-permute(%p), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %a = f32[100]{0} all-reduce(%p), replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}, to_apply=%sum
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_bytes_of_a_program_that_is_known():
  found = collectives.collective_bytes(HLO)
  assert {kind: sent.most for kind, sent in found.items()} == {
      "all-reduce": 2 * 7 / 8 * 512 + 2 * 3 / 4 * 400, "reduce-scatter": 7 / 8 * 8 * 64,
      "all-gather": 3 / 4 * 160 + 3 * 3 / 4 * (512 + 64), "collective-permute": 32}
  # Nothing of it lies in a branch; of two branches the cheaper and the dearer one count.
  assert all(sent.least == sent.most for sent in found.values())
  chosen = HLO.replace("while(%t), condition=%cond, body=%body",
                       "conditional(%c, %t, %t), branch_computations={%body, %sum}")
  assert collectives.collective_bytes(chosen)["all-gather"] == (3 / 4 * 160, 3 / 4 * (160 + 512 + 64))


def test_a_gather_that_runs_beside_other_operations_counts_once():
  """As XLA for TPUs writes it: a fusion that starts it, fusions with a copy of it, and one in which it ends."""
  gather = ('  %g = bf16[64,2]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0},'
            ' frontend_attributes={chain_id="0"}\n')
  fusions = {"start": gather + '  ROOT %c = (bf16[64,2]) custom-call(%g), custom_call_target="AsyncCollectiveStart"\n',
             "beside": gather + "  ROOT %t = (bf16[64,2]) tuple(%g)\n",
             "done": gather + '  ROOT %c = bf16[64,2] custom-call(%g), custom_call_target="AsyncCollectiveDone"\n'}
  text = "".join(f"%{name} (x: bf16[16,2]) -> bf16[64,2] {{\n{lines}}}\n\n" for name, lines in fusions.items())
  text += "ENTRY %main (x: bf16[16,2]) -> bf16[64,2] {\n" + "".join(
      f"  %{name}.1 = bf16[64,2] fusion(%x), kind=kLoop, calls=%{name}\n" for name in fusions) + "}\n"
  assert collectives.collective_bytes(text) == {"all-gather": (3 / 4 * 256, 3 / 4 * 256)}


def test_a_sum_of_which_a_slice_is_kept_counts_as_a_scatter():
  """As XLA for TPUs writes it, padded; a sum in another computation stays one."""
  text = """
%all-reduce-scatter.3 (input: f32[60,2]) -> f32[16,2] {
  %pad = f32[64,2] pad(%input, %zero), padding=0_4x0_0
  %all-reduce.1 = f32[64,2]{1,0:T(8,128)} all-reduce(%pad), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
  ROOT %d = f32[16,2] dynamic-slice(%all-reduce.1, %i, %j), dynamic_slice_sizes={16,2}
}

ENTRY %main (x: f32[60,2]) -> f32[16,2] {
  %f = f32[16,2] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %s = f32[16,2] all-reduce(%f), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%sum
}
"""
  assert collectives.collective_bytes(text) == {
      "reduce-scatter": (3 / 4 * 512, 3 / 4 * 512), "all-reduce": (2 / 2 * 128, 2 / 2 * 128)}


def test_what_fits_and_what_would(plans):
  found = plans[4]._replace(topology="v5e:2x4", chip=plan_lib.CHIPS["v5e"])
  assert found.fits and "it fits" in plan_lib.table(found)
  seconds = found.seconds()
  assert found.utilisation() == pytest.approx(seconds["operations"] / max(seconds.values()))
  assert found.seconds(256)["collectives"] == pytest.approx(seconds["collectives"] * (255 / 256) / (7 / 8))
  networks = sum(found.kept[kind] for kind in ("parameters", "optimizers", "averages", "teacher"))
  small = found._replace(chip=found.chip._replace(memory=1.1 * networks))
  assert not small.fits and "does NOT fit; most is temporary: set train.microbatch" in plan_lib.table(small)
  smaller = small._replace(chip=found.chip._replace(memory=0.9 * networks))
  for other in (smaller, small._replace(programs=[small.programs[0]._replace(temporary=0)])):
    assert "by train.fsdp, up to 8; teacher.dtype=bfloat16" in plan_lib.remedy(other)
    split = plan_lib.remedy(other._replace(fsdp=8, teacher_dtype="bfloat16"))
    assert split.endswith("a larger topology and train.fsdp")
  assert "most is replay" in plan_lib.remedy(small._replace(kept=small.kept | {"buffers": 10**9}))


def test_what_is_kept_alone(plans, tmp_path, refuse, capsys):  # noqa: F811
  """The same without a compilation; what does not fit then does not fit at all."""
  found = plan_lib.plan(config_lib.load(LCM[0], LCM[1] | {"train.fsdp": "4"}), "cpu:8", compiled=False)
  assert found.kept == plans[4].kept and not found.programs and found.fits is None
  chip = plan_lib.CHIPS["v5e"]
  kept = sum(found.kept.values())
  large, small = (found._replace(chip=chip._replace(memory=share * kept)) for share in (2, 1))
  assert large.fits is None and "are left for what a step needs in between" in plan_lib.table(large)
  assert small.fits is False and "does NOT fit; " in plan_lib.table(small)
  assert "roofline_seconds" not in plan_lib.as_json(large)
  command = ("plan", f"--config={LCM[0]}", "--topology=cpu:8", "--kept", f"--out={tmp_path}/plan.json")
  capsys.readouterr()
  assert main(list(command)) == 0
  assert "kept on each chip" in capsys.readouterr().out
  assert json.loads((tmp_path / "plan.json").read_text())["programs"] == []
  assert "leave one out" in refuse(*command, "--largest")


def test_what_was_compiled_is_kept(shared, tmp_path, monkeypatch):  # noqa: F811
  """The same program for the same topology is not compiled again; another one is."""
  before, said, compiled, compile_ = jax.config.jax_compilation_cache_dir, [], [], plan_lib._compile
  monkeypatch.setattr(plan_lib, "_compile", lambda *arguments: compiled.append(1) or compile_(*arguments))
  config = config_lib.load("configs/digits_teacher.py:smoke", {"model.channel_mult": "(1,)"})
  jax.config.update("jax_compilation_cache_dir", str(tmp_path))
  try:
    first, again = (plan_lib.plan(config, "cpu:1", size, said.append) for size in (4, 4))
    assert first == again and len(compiled) == 1
    assert said[-1] == f"the step of student was compiled before, in {first.programs[0].seconds:.0f} s"
    other = plan_lib.plan(config, "cpu:1", 8, said.append)
    assert len(compiled) == 2 and other.peak > first.peak
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_program_that_the_compiler_refuses(monkeypatch, shared):  # noqa: F811
  """TPU compilers give up where memory is short: the plan says so, and what is known all the same."""
  words = ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO"
           " temporaries (24.09G) exceeds available HBM (15.75G). HLO module: jit_step.\nSee https://openxla.org")

  def refuse_to(*_, **__):
    raise jax.errors.JaxRuntimeError(words)

  with monkeypatch.context() as patch:
    patch.setattr(jax.stages.Lowered, "compile", refuse_to)
    found = plan_lib.plan(config_lib.load(*LCM), "h100:8")
  program, = found.programs
  assert found.fits is False and program.temporary == int(24.09 * 2**30)
  assert 0 <= program.peak - program.temporary - sum(found.kept.values()) < 256  # the step's number and key
  said = plan_lib.table(found)
  assert "the compiler gave up" in said and "temporaries (24.09G) exceeds" in said and "does NOT fit" in said
  assert "roofline" not in said and "roofline_seconds" not in plan_lib.as_json(found)
  assert json.loads(json.dumps(plan_lib.as_json(found)))["programs"][0]["refused"] in " ".join(words.split())
  assert [plan_lib.said_bytes(f"temporaries ({size})") for size in ("3.5M", "7", "1T")] == [3670016, 7, 2**40]
  assert plan_lib.said_bytes("no number") == 0
  # It may not say how much was missing: no batch of those fits.
  silent = found._replace(programs=[program._replace(temporary=0, peak=1000)])
  monkeypatch.setattr(plan_lib, "plan", lambda config, topology, size, say: silent._replace(batch_size=size or 16))
  assert plan_lib.largest_batch(config_lib.load(*LCM), "h100:8") is None


@pytest.mark.parametrize("start", [8, 200, 100_000])
@pytest.mark.parametrize("per_example, fixed", [(7, 100), (0.5, 900), (130, 0)])
def test_the_largest_batch(start, per_example, fixed):
  """Of peaks that are nearly a line: one that fits, and 5 % more does not."""
  tried = []

  def peak(size):
    tried.append(size)
    return fixed + per_example * size + 13 * (size % 3)

  found = plan_lib.largest_fitting(peak, start, 8, 1100.0)
  assert found % 8 == 0 and peak(found) <= 1100 or found == 0
  assert peak(found + max(8, found // 20 + 8)) > 1100
  assert len(tried) < 12


def test_no_largest_batch():
  assert plan_lib.largest_fitting(lambda size: 2000, 64, 8, 1000) == 0
  sizes = []
  found = plan_lib.largest_fitting(lambda size: sizes.append(size) or 10, 64, 8, 1000, tries=4)
  assert found == 64 * 2 * 16 == sizes[-1]


@pytest.mark.slow
def test_the_largest_batch_of_a_real_step(monkeypatch, capsys):
  """A chip with room for about 100 examples."""
  config = config_lib.load("configs/digits_teacher.py:smoke", {"model.channel_mult": "(1,)"})
  peaks = {size: plan_lib.plan(config, "h100:2", size).peak for size in (96, 128)}
  monkeypatch.setitem(plan_lib.CHIPS, "h100", plan_lib.CHIPS["h100"]._replace(memory=peaks[96] / plan_lib._FULL + 1))
  found = plan_lib.largest_batch(config, "h100:2")
  assert found.fits and 96 <= found.batch_size < 128
  assert f"batch {found.batch_size}: peak" in capsys.readouterr().out


def test_command(tmp_path, capsys, refuse):  # noqa: F811
  arguments = ["plan", "--config=configs/digits_teacher.py:smoke", "--topology=h100:2", f"--out={tmp_path}/plan.json"]
  assert main([*arguments, "--batch=16"]) == 0
  said, wrote = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
  assert "batch 16 = 2 device(s) x 1 pass(es) x 8" in said and "it fits" in said and "256 chips" in said
  assert wrote["fits"] is True and wrote["chips"] == 2 and wrote["kept"]["teacher"] == 0
  assert math.isfinite(wrote["roofline_seconds"]["operations"])
  line = refuse("plan", "--config=configs/digits_teacher.py:smoke", "--topology=cpu:2", "--batch=4", "--largest")
  assert "topology cpu:2: the largest batch needs chips whose memory is known" in line
  for topology in ("v5e", "h100:", "h100:0", "z80:8", "cpu:8x", "cpu:99"):
    line = refuse("plan", "--config=configs/digits_pd.py:smoke", f"--topology={topology}")
    assert topology in line
  assert "multiple of the 8 devices" in refuse("plan", "--config=configs/digits_pd.py:smoke,ddil", "--topology=cpu:8",
                                               "--batch=12")
  assert "--batch=-1" in refuse("plan", "--config=configs/digits_pd.py:smoke", "--topology=cpu:8", "--batch=-1")
