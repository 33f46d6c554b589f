"""The text-to-image demo: captioned emoji, from the images to students of two and four steps.

    python -m launch.demo_t2i --emoji=DIR --workdir=runs/emoji

It goes the way of Stable Diffusion at small size: an autoencoder and CLIP are trained, `ddil prepare` makes latents
and text embeddings, a UNet2DConditionModel becomes the teacher, LCM and DMD2 distil it with and without DDIL. It can
be stopped and continued at any time.
"""

import argparse
import os
import pathlib
import sys
import textwrap
import time

from ddil_jax.sweep import Trial
from launch.demo import gather
from launch.sweep import at_least_one, exit_code, run_all

STUDENTS = (("lcm", "emoji_lcm"), ("dmd2", "emoji_dmd2"))
VARIANTS = ("", "ddil")
SHOWN = 8  # prompts in the picture


def trials(workdir: pathlib.Path, seeds: int = 1, smoke: bool = False) -> list[Trial]:
  """The teacher's run and the students'; with `smoke` two steps each."""
  models, data = workdir / "models", workdir / "data"
  clip = f"clip:{models / 'clip.safetensors'}"
  common = {"data.path": str(data), "eval.extractor": clip, "eval.captions": "" if smoke else clip}
  if smoke:
    common |= {"train.steps": "2", "train.batch_size": "8", "eval.num_samples": "8", "eval.batch_size": "8",
               "eval.shift_samples": "0", "eval.metrics": "('fd',)", "eval.sampler_steps": "()"}
  teacher = Trial("teacher", "configs/emoji_teacher.py", common | ({"objective.sampler_steps": "2"} if smoke else {}))
  out = [teacher]
  for seed in range(seeds):
    for name, config in STUDENTS:
      for variant in VARIANTS:
        fields = common | {"teacher.path": str(workdir / "teacher"), "seed": str(seed)}
        if smoke:
          fields |= {"states.teacher_steps": "4"}
        out.append(Trial(f"{name}-{variant or 'base'}-seed{seed}", f"configs/{config}.py" + f":{variant}" * bool(variant),
                         fields))
  return out


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, 2 for wrong usage, 1 where a run failed, 130 when interrupted."""
  args = argparse.ArgumentParser(prog="launch.demo_t2i", description=__doc__.splitlines()[0], allow_abbrev=False)
  args.add_argument("--emoji", required=True, metavar="DIR", help="folder with noto_png128.zip and captions.jsonl")
  args.add_argument("--workdir", default="runs/emoji", help="everything of the demo lies here")
  args.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
  args.add_argument("--seeds", type=int, default=1, help="training seeds of every student (default: 1)")
  args.add_argument("--smoke", action="store_true", help="a few steps of everything")
  args = args.parse_args(argv)
  return exit_code(lambda: demo(args))


def demo(args) -> int:
  """Does what is not done yet, then reports; returns the exit code."""
  from ddil_jax import prepare
  from launch import emoji_models
  at_least_one(seeds=args.seeds, workers=args.workers)
  workdir, began = pathlib.Path(args.workdir), time.monotonic()
  models = workdir / "models"
  print("DDIL on captioned emoji: an autoencoder, CLIP, a teacher, then its students; stop it with Ctrl-C at any time,"
        " the same command continues", flush=True)
  emoji_models.train(args.emoji, models, args.smoke)
  prepare.prepare(str(pathlib.Path(args.emoji) / "noto_png128.zip"), str(workdir / "data"), prepare.Options(
      vae=str(models / "vae.safetensors"), text_encoder=str(models / "text_encoder.safetensors"),
      tokenizer=str(models / "tokenizer"), image_size=32, keep_images=True), say=lambda line: print(line, flush=True))

  teacher, *students = trials(workdir, args.seeds, args.smoke)
  failed = run_all([teacher], workdir, 1, retry=True, small=True)
  if not failed:
    failed = run_all(students, workdir, args.workers, retry=True, small=True)
  if gather([teacher, *students], workdir, overview):
    print(f"report: {workdir / 'report.html'}   picture: {workdir / 'overview.png'}   "
          f"({time.monotonic() - began:.0f} s in this sitting)")
  for name, error in failed.items():
    print(f"FAILED {name}: {error} (see {workdir / name / 'log.txt'}; the same command continues)", file=sys.stderr)
  return 1 if failed else 0


def overview(rows: list[dict], workdir: pathlib.Path) -> None:
  """One picture, overview.png: what teacher and students make of the same prompts from the same noise."""
  from matplotlib.figure import Figure
  from PIL import Image

  from ddil_jax import measure
  from ddil_jax.data import pipeline
  captions = measure.prompts(pipeline.load("prepared", path=str(workdir / "data")), SHOWN)
  names = {"lcm": "LCM", "dmd2": "DMD2", "teacher": "teacher"}
  most = max(row["guidance_scale"] for row in rows)
  wanted = [row for row in rows if row["guidance_scale"] == most and row["seed"] == 0]
  order = sorted(wanted, key=lambda r: (r["objective"] != "teacher", -r["steps"], r["objective"]))
  height, left = 0.62, 0.24
  figure = Figure(figsize=(height * SHOWN / (1 - left), height * (len(order) + 1)), dpi=150)
  for i, caption in enumerate(captions):
    words = textwrap.fill(caption, 11, break_long_words=False)
    figure.text(left + (i + 0.5) * (1 - left) / SHOWN, 1 - 0.5 / (len(order) + 1), words, ha="center", va="center",
                fontsize=5.5)
  for i, row in enumerate(order, start=1):
    picture = Image.open(workdir / row["samples"])
    side = (picture.width + 1) // 10  # ten in a row, a pixel between them
    axes = figure.add_axes((left, 1 - (i + 1) / (len(order) + 1), 1 - left, 0.95 / (len(order) + 1)))
    axes.imshow(picture.crop((0, 0, SHOWN * side - 1, side - 1)))
    axes.axis("off")
    figure.text(0.01, 1 - (i + 0.55) / (len(order) + 1), va="center", fontsize=7,
                s=f"{names[row['objective']]} {row['variant'].replace('base', '')} {row['steps']} steps")
  figure.savefig(workdir / "overview.png")


if __name__ == "__main__":
  sys.exit(main())
