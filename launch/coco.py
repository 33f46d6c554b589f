"""The DDIL paper's evaluation of a run on COCO: FID, CLIP score, density and coverage, and LPIPS-diversity.

    python -m launch.coco --workdir=runs/sd15_lcm --data=data/coco

The data are those of `ddil prepare --keep_images` on coco_captions, the networks those of `ddil convert-extractor`
(docs/user_guide.md). Samples are of the captions of the validation images, one each, none twice; for the diversity ten of
each of 1,000. Writes coco.json in the run's folder.
"""

import argparse
import pathlib
import sys

from ddil_jax import config as config_lib
from ddil_jax import files, trained
from ddil_jax.data import prepared
from ddil_jax.errors import UsageError
from launch.sweep import exit_code

RESULT = "coco.json"


def parts(args) -> dict[str, dict[str, str]]:
  """{part: {config field: value}}: quality, and the diversity of samples of one prompt."""
  common = {"data.path": args.data, "eval.reference": "test", "eval.shift_samples": "0", "eval.sampler_steps": "()"}
  return {
      "quality": common | {"eval.num_samples": str(args.num_samples), "eval.metrics": "('fd', 'density', 'coverage')",
                           "eval.extractor": args.extractor, "eval.captions": args.captions, "eval.lpips": "",
                           "eval.samples_per_prompt": "1"},
      "diversity": common | {"eval.num_samples": str(args.prompts * args.samples_per_prompt),
                             "eval.metrics": "('saturation',)", "eval.captions": "", "eval.lpips": args.lpips,
                             "eval.samples_per_prompt": str(args.samples_per_prompt)}}


def check(args, own) -> None:
  """Raises UsageError for data of which the numbers would not be what they are called.

  Args:
    own: `data` of the run's config.
  """
  index = prepared.read_index(args.data)
  there = sum(len(shard.test) for shard in index.shards)
  for flag, wanted in (("num_samples", args.num_samples), ("prompts", args.prompts)):
    if wanted > there:
      raise UsageError(f"--{flag}={wanted}: {args.data} has {there} test examples, and each sample has a caption of its"
                       " own; if it was prepared before restval of coco_captions was held out, run the same"
                       " `ddil prepare` again")
  if own.name != "prepared":
    raise UsageError(f"{args.workdir} was trained on {own.name}, not on a set of `ddil prepare`")
  if not (pathlib.Path(own.path) / prepared.INDEX).is_file():
    print(f"{own.path}, on which the run was trained, is not here: whether {args.data} was prepared with the same"
          " networks cannot be checked")
    return
  ours = prepared.read_index(own.path)
  theirs, wanted = index.settings["files"], ours.settings["files"]
  for name in sorted(theirs.keys() | wanted.keys()):
    if theirs.get(name, {}).get("sha256") != wanted.get(name, {}).get("sha256"):
      right = f"with --{name}={wanted[name]['name']}" if name in wanted else f"without --{name}"
      raise UsageError(f"{args.data} was prepared with another {name} than {own.path}, on which the run was trained:"
                       f" prepare it {right}")
  if index.image_shape != ours.image_shape:
    raise UsageError(f"{args.data} has {list(index.image_shape)} an example, {own.path}, on which the run was trained,"
                     f" {list(ours.image_shape)}: prepare it with --image_size={ours.settings['image_size']}")


def evaluate(args) -> int:
  """Measures both parts and writes them together, {part: rows}."""
  workdir, found = pathlib.Path(args.workdir), {}
  check(args, trained.saved_config(workdir).data)
  configs = {}
  for part, fields in parts(args).items():
    configs[part] = trained.saved_config(workdir)
    for field, text in fields.items():
      config_lib.override(configs[part], field, text)
  for part, config in configs.items():
    found[part] = trained.measured(config, workdir)
    for row in found[part]:
      print(f"{part}, {row['steps']} steps, guidance scale {row['guidance_scale']:g}: "
            + ", ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items()), flush=True)
    files.write_json(workdir / RESULT, found)  # what took long is not lost with what comes after it
  print(f"wrote {workdir / RESULT}")
  return 0


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, 2 for wrong usage, 1 where it failed, 130 when interrupted."""
  args = argparse.ArgumentParser(prog="launch.coco", description=__doc__.splitlines()[0], allow_abbrev=False)
  args.add_argument("--workdir", required=True, help="the run")
  args.add_argument("--data", default="data/coco", help="of `ddil prepare`, with the run's own networks")
  args.add_argument("--extractor", default="inception:models/inception.safetensors")
  args.add_argument("--captions", default="clip:models/clip.safetensors")
  args.add_argument("--lpips", default="lpips-alex:models/lpips.safetensors")
  args.add_argument("--num_samples", type=int, default=30_000, help="of the quality (default: 30000)")
  args.add_argument("--prompts", type=int, default=1000, help="of the diversity (default: 1000)")
  args.add_argument("--samples_per_prompt", type=int, default=10, help="of the diversity (default: 10)")
  args = args.parse_args(argv)
  return exit_code(lambda: evaluate(args))


if __name__ == "__main__":
  sys.exit(main())
