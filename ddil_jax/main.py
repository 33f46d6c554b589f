"""Command line: python -m ddil_jax <train | evaluate | sample | report | convert | ...> ... No logic here."""

import argparse
import os
import re
import sys
import time
import traceback

from ddil_jax.errors import RunError, UsageError
from ddil_jax.registry import unknown

EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 130
_WITHOUT_CONFIG = ("report", "convert-extractor", "convert", "export", "prepare", "list")
LEADER_WAITS = 3.0  # seconds for the other processes to say what they found: without process 0 they end

EPILOG = """\
examples:
  python -m ddil_jax train --config=configs/digits_teacher.py --workdir=runs/teacher
  python -m ddil_jax train --config=configs/digits_pd.py:ddil --workdir=runs/pd --config.teacher.path=runs/teacher
  python -m ddil_jax sample --workdir=runs/pd/stage_4 --out=samples.png
  python -m ddil_jax evaluate --shift --workdir=runs/pd/stage_4
  python -m ddil_jax report runs/teacher runs/pd --out=report.html
  python -m ddil_jax evaluate --images=samples/ --reference=digits/train --out=results.json

A second `train` in the same work directory continues the run. Any config field can be set with
--config.FIELD=VALUE. Exit codes: 0 done, 1 the run failed (run it again to continue), 2 wrong usage,
130 stopped by a signal (run it again to continue).
"""


class _Parser(argparse.ArgumentParser):
  """Mistakes are errors of ours, in one line, instead of a page of usage."""

  def error(self, message):
    choice = re.match(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message)
    if choice:
      message = unknown(choice[1].lower(), choice[2], re.findall(r"[\w-]+", choice[3]))
    raise UsageError(f"{message}; `{self.prog} --help` shows what there is")


def _folder(text: str) -> str:
  """Refuses "", which is the current folder to the system, and an unset variable to the user."""
  if not text:
    raise argparse.ArgumentTypeError("a folder is needed, and '' is none; the current one is .")
  return text


def parser() -> argparse.ArgumentParser:
  """The command line's grammar."""
  top = _Parser(prog="ddil", description="Diffusion distillation with imitation learning, in JAX.",
                epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

  def command(name, text, config=True, workdir=True):
    sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    if config:
      sub.add_argument("--config", metavar="FILE.py[:ARG]", help="config file and its argument; `ddil list` shows them")
      if workdir:
        sub.add_argument("--workdir", required=True, type=_folder, metavar="DIR",
                         help="everything of the run lies here")
      sub.add_argument("--data_dir", metavar="DIR", help="where data sets are prepared (default: $DDIL_DATA or data/)")
    return sub

  train = command("train", "train a run to its end, or continue it")
  train.add_argument("--profile_steps", metavar="FIRST,LAST", help="trace these steps into profile/ of the run;"
                     " the same as --config.train.profile_steps")
  train.add_argument("--compile_cache", default="", metavar="DIR|off", help="where compiled programs are kept (default:"
                     " $DDIL_COMPILE_CACHE, or ddil_jax/compiled in the user's cache folder)")
  _several_processes(train)
  evaluate = command("evaluate", "measure the newest checkpoint of a run again, and rewrite its results.json; or measure"
                     " images in files", workdir=False)
  evaluate.add_argument("--workdir", type=_folder, metavar="DIR", help="the run")
  evaluate.add_argument("--images", metavar="PATH", help="instead of a run: a folder of images of one size (sub-folders"
                        " are classes), an .npy file, or an .npz file with images and labels")
  evaluate.add_argument("--reference", metavar="PATH|SPLIT", help="what --images are compared with: images likewise, or"
                        " a split of a data set, as digits/train")
  evaluate.add_argument("--shift", action="store_true", help="of a run, measure the covariate shift only: write"
                        " shift.json, and figures in shift/")
  evaluate.add_argument("--out", metavar="FILE.json", help="of --images: where to write the result")
  _several_processes(evaluate)
  for flag, text in (("metrics", "names, separated by commas"), ("bootstrap", "half-samples for intervals"),
                     ("extractor", "of the features")):
    evaluate.add_argument(f"--{flag}", help=f"{text}; the same as --config.eval.{flag}")
  sample = command("sample", "draw images from the newest checkpoint of a run")
  sample.add_argument("--out", default="samples.png", metavar="FILE.png")
  sample.add_argument("--num_samples", type=int, help="default: 40; with --prompt of each prompt, default: 4")
  sample.add_argument("--steps", type=int, help="sampling steps (default: as trained)")
  sample.add_argument("--guidance_scale", type=float, metavar="G",
                      help="the same as --config.eval.guidance_scales=(G,)")
  sample.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="of a run that reads text; give it"
                      " several times for several rows")
  for flag, text in (("text_encoder", "FILE"), ("text_encoder_2", "FILE"), ("tokenizer", "FOLDER")):
    sample.add_argument(f"--{flag}", default="", metavar=text, help="with which the set was prepared; for --prompt")
  sample.add_argument("--folder", default="", metavar="DIR", help="write every sample to a file of its own too")
  sample.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
  serve = command("serve", "a page in the browser: student and teacher side by side (`pip install"
                  " ddil-jax[serve]`)")
  for flag, text in (("text_encoder", "FILE"), ("text_encoder_2", "FILE"), ("tokenizer", "FOLDER")):
    serve.add_argument(f"--{flag}", default="", metavar=text, help="with which the set was prepared, of a run that reads"
                       " text")
  serve.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine only)")
  serve.add_argument("--port", type=int, default=7860, help="(default: 7860)")
  report = command("report", "compare runs: tables and figures as one HTML file", config=False)
  report.add_argument("runs", nargs="+", metavar="RUN", help="a run, a directory of runs, or a sweep")
  report.add_argument("--out", default="report.html", metavar="FILE.html")
  report.add_argument("--metric", help="which metric the tables compare, by kind or full name (default: fd)")
  report.add_argument("--baseline", metavar="SETTING", help="what settings are compared with: a label as the tables"
                      " have it, or FIELD=VALUE (default: the variant base, or else the first setting)")
  report.add_argument("--table", metavar="FILE.md|.csv", help="write the comparison to this file too")
  report.add_argument("--figures", metavar="DIR", help="write every figure as SVG and PNG too")
  convert = command("convert-extractor", "convert published weights of an image network for config.eval.extractor",
                    config=False)
  convert.add_argument("--kind", required=True, help="inception, lpips-alex, lpips-vgg or clip")
  convert.add_argument("sources", nargs="+", metavar="SOURCE",
                       help="published files as they are; LPIPS: the backbone's, then the heads'; CLIP: its folder")
  convert.add_argument("--out", required=True, metavar="FILE.safetensors")
  take = command("convert", "convert the weights of a diffusers folder, or of an original file of Stable Diffusion, to"
                 " one file", config=False)
  take.add_argument("folder", metavar="FOLDER|FILE", help="of a model (config.json, safetensors) or of a pipeline; or"
                    " the name of one on the Hugging Face Hub; or an original checkpoint, one safetensors file")
  take.add_argument("--component", default="", help="of a pipeline: unet (default), vae, text_encoder, text_encoder_2")
  take.add_argument("--guidance_embedding", type=int, default=0, metavar="WIDTH", help="add LCM's embedding of the"
                    " guidance scale (256 there) to a UNet, without effect at first")
  take.add_argument("--out", required=True, metavar="FILE.safetensors")
  give = command("export", "write a converted or trained UNet as a folder that diffusers samples from", config=False)
  give.add_argument("file", metavar="RUN|FILE.safetensors", help="a run, which says itself how it is sampled; or a file"
                    " of `ddil convert` or a student in that format, for which the arguments below say it")
  give.add_argument("--out", required=True, metavar="FOLDER")
  give.add_argument("--sampler", default="lcm", help="lcm (students of LCM, CD, DMD2) or ddim (PD)")
  give.add_argument("--steps", type=int, default=4)
  give.add_argument("--timesteps", default="", metavar="T,T,...", help="of a grid of one's own, as 999,749,499,249")
  give.add_argument("--prediction", default="eps", help="what the network predicts: eps, v or x0")
  give.add_argument("--guidance_scale", type=float, default=1.0, help="that the student has in it, or reads")
  give.add_argument("--zero_terminal_snr", action="store_true", help="the schedule ends in pure noise")
  give.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="of the weights")
  give.add_argument("--merged", action="store_true", help="of a run that trained a LoRA: the whole network, instead of"
                    " pytorch_lora_weights.safetensors")
  give.add_argument("--pipeline", default="", metavar="FOLDER", help="of the teacher's pipeline: write a whole one,"
                    " with its text encoder, tokenizer and autoencoder")
  give.add_argument("--run", metavar="DIR", help="training run whose config and metrics the model card shows")
  prepare = command("prepare", "images with captions, or prompts, to latents and text embeddings that a run reads"
                    " (data.name=prepared)", config=False)
  prepare.add_argument("source", metavar="SOURCE", help="a folder or .zip with captions.jsonl, a folder of .tar files"
                       " (webdataset) or of tfds (coco_captions), or prompts in a .txt or .jsonl file")
  prepare.add_argument("--out", required=True, metavar="DIR", help="of the set; the same command continues it")
  for flag, text in (("vae", "autoencoder of `ddil convert --component=vae`; without it the pixels are stored"),
                     ("text_encoder", "of `ddil convert --component=text_encoder`"),
                     ("text_encoder_2", "SDXL's second one")):
    prepare.add_argument(f"--{flag}", default="", metavar="FILE", help=text)
  prepare.add_argument("--tokenizer", default="", metavar="FOLDER", help="of the tokenizer, or of the pipeline")
  prepare.add_argument("--image_size", type=int, default=0, metavar="N", help="pixels of each side: centre square,"
                       " resized (default: what the autoencoder was made for)")
  prepare.add_argument("--shard_size", type=int, default=1000, metavar="N", help="examples of a file (default: 1000)")
  prepare.add_argument("--process", default="0/1", metavar="I/N", help="make this share of the shards only")
  prepare.add_argument("--keep_images", action="store_true", help="store the pixels next to the latents: the reference"
                       " of an evaluation")
  prepare.add_argument("--dtype", default="float32", help="in which latents and text are stored: float32, or float16 at"
                       " half the size")
  prepare.add_argument("--dry_run", action="store_true", help="say what it would take, and write nothing")
  plan = command("plan", "compile a config's step for machines that are not here: memory, operations,"
                 " collectives, time", workdir=False)
  plan.add_argument("--topology", required=True, metavar="CHIP:SIZE", help="v5e:4x4, v5p:2x2x2 (TPUs: `pip install"
                    " libtpu`), h100:8, cpu:8")
  plan.add_argument("--batch", type=int, default=0, help="over all chips (default: the config's)")
  plan.add_argument("--largest", action="store_true", help="look for the largest batch that fits; several compilations")
  plan.add_argument("--kept", action="store_true", help="only what each chip keeps; compiles nothing, takes seconds")
  plan.add_argument("--out", metavar="FILE.json", help="write the numbers to this file too")
  command("list", "list configs, data sets and parts", config=False)
  return top


def main(argv: list[str] | None = None) -> int:
  """Runs a command and returns the exit code."""
  try:
    args, rest = parser().parse_known_args(argv)
    return _run(args, overrides_of(rest, args.command))
  except UsageError as error:
    return _fail(EXIT_USAGE, error)
  except RunError as error:
    return _fail(EXIT_FAILED, f"run failed: {error}")
  except OSError as error:
    # No space, no permission: the run can be continued once that is mended.
    return _fail(EXIT_FAILED, f"run failed: {error.strerror or error}: {error.filename or ''}".rstrip(": "))
  except KeyboardInterrupt:
    return _fail(EXIT_STOPPED, "stopped; the same command continues from the last checkpoint")


def _fail(code: int, message) -> int:
  """Says why in one line, whatever the message holds."""
  print(f"ddil: {' '.join(str(message).split())}", file=sys.stderr)
  return code


def overrides_of(rest: list[str], command: str) -> dict[str, str]:
  overrides = {}
  words = iter(rest)
  for word in words:
    if not word.startswith("--config.") or command in _WITHOUT_CONFIG:
      raise UsageError(f"unknown argument '{word}'; `ddil {command} --help` shows what there is")
    field, equals, value = word.removeprefix("--config.").partition("=")
    value = value if equals else next(words, None)
    if value is None:
      raise UsageError(f"--config.{field} has no value; write --config.{field}=VALUE")
    overrides[field] = value
  return overrides


def _run(args, overrides) -> int:
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  # Imported here, so that --help and usage errors answer at once.
  if args.command == "list":
    return _list()
  if args.command == "report":
    from ddil_jax.evaluation import report
    print(report.report(args.runs, args.out, args.baseline, args.metric, args.figures, args.table))
    return 0
  if args.command == "convert-extractor":
    from ddil_jax.interop import extractors
    extractors.convert(args.kind, args.sources, args.out)
    print(f"wrote {args.out}")
    return 0
  if args.command == "convert":
    from ddil_jax.interop import diffusers
    print(diffusers.convert(args.folder, args.out, args.component, args.guidance_embedding))
    print(f"wrote {args.out}")
    return 0
  if args.command == "export":
    return _export(args)
  if args.command == "prepare":
    return _prepare(args)

  from ddil_jax import config as config_lib
  from ddil_jax import trained
  from ddil_jax.training import compiling
  compiling.keep_programs(getattr(args, "compile_cache", ""))
  if args.command == "plan":
    return _plan(args, overrides)
  if args.command == "evaluate":
    overrides |= _shorthands(args)
    if args.images:
      return _evaluate_files(args, overrides)
    if not args.shift:
      _join(args)
  if args.command == "train":
    return _train(args, overrides)
  if args.command == "sample" and args.guidance_scale is not None:
    overrides["eval.guidance_scales"] = f"({args.guidance_scale},)"
  if args.config:
    config = config_lib.load(args.config, overrides)
  else:
    config = trained.saved_config(args.workdir)
    for field, text in overrides.items():
      config_lib.override(config, field, text)
  if args.data_dir:
    config_lib.override(config, "data.data_dir", args.data_dir)
  if args.command == "sample":
    num = (4 if args.prompt else 40) if args.num_samples is None else args.num_samples
    written = trained.sample(config, args.workdir, num, args.seed, args.out, args.steps, args.prompt,
                             (args.text_encoder, args.text_encoder_2), args.tokenizer, args.folder)
    print(f"wrote {written}")
  elif args.command == "serve":
    from ddil_jax import serve
    serve.serve(config, args.workdir, (args.text_encoder, args.text_encoder_2), args.tokenizer, args.host, args.port,
                lambda line: print(line, flush=True))
  elif args.shift:
    from ddil_jax.evaluation import shift_figures
    print(shift_figures.table(trained.evaluate_shift(config, args.workdir)))
  else:
    from ddil_jax.evaluation import report
    from ddil_jax.training import processes
    rows = trained.evaluate(config, args.workdir)
    if processes.is_first():
      print(report.terminal_table(rows))
  return 0


def _several_processes(sub) -> None:
  several = sub.add_argument_group("several processes", "each runs this command, on its own devices")
  several.add_argument("--cluster", default="auto", metavar="HOW", help="how they find each other: slurm, kubernetes,"
                       " tpu, none, or auto: what is there (default)")
  several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
  several.add_argument("--num_processes", type=int, metavar="N", help="of all")
  several.add_argument("--process_id", type=int, metavar="I", help="of this one, from 0")


def _join(args) -> None:
  """Connects this process with the others that the arguments, or the place, tell of."""
  from ddil_jax.training import processes
  cluster = processes.find(args.cluster, args.coordinator, args.num_processes, args.process_id)
  if cluster:
    processes.start(cluster)


def _train(args, overrides) -> int:
  from ddil_jax import config as config_lib
  from ddil_jax import runs
  from ddil_jax.training import processes
  from ddil_jax.training.loop import Stopped
  if not args.config:
    raise UsageError("train needs --config=FILE.py[:ARG]; `ddil list` shows the configs")
  if args.profile_steps:
    overrides["train.profile_steps"] = f"({args.profile_steps},)"
  _join(args)
  if args.data_dir:
    overrides["data.data_dir"] = args.data_dir
  try:
    rows = runs.train(processes.together(lambda: config_lib.load(args.config, overrides)), args.workdir)
  except Stopped as stopped:
    return _fail(EXIT_STOPPED, stopped)
  if processes.is_first():
    from ddil_jax.evaluation import report
    print(report.terminal_table(rows))
  return 0


def _export(args) -> int:
  from ddil_jax.interop import diffusers, release
  if os.path.isdir(args.file):
    from ddil_jax import trained
    print(f"wrote {trained.export(args.file, args.out, args.dtype, args.merged, args.pipeline)}")
    return 0
  try:
    times = tuple(int(word) for word in args.timesteps.split(",") if word)
  except ValueError:
    raise UsageError(f"--timesteps={args.timesteps}: whole numbers are expected, such as 999,749,499,249") from None
  sampling = release.Sampling(args.sampler, args.steps, args.prediction, times, args.guidance_scale,
                              args.zero_terminal_snr)
  run = release.run_of(args.run) if args.run else None
  release.scheduler_config(sampling)  # before the weights, which take long
  loaded = diffusers.load(args.file)
  release.write(args.out, loaded.params, loaded.about, sampling, run, args.dtype, pipeline=args.pipeline)
  print(f"wrote {args.out}")
  return 0


def _prepare(args) -> int:
  from ddil_jax import prepare
  from ddil_jax.training import compiling
  compiling.keep_programs("")
  share = re.fullmatch(r"(\d+)/(\d+)", args.process)
  if not share:
    raise UsageError(f"--process={args.process}: I/N is expected, such as 0/4")
  options = prepare.Options(**{name: getattr(args, name) for name in prepare.Options._fields})
  prepare.prepare(args.source, args.out, options, tuple(map(int, share.groups())), args.dry_run,
                  lambda line: print(line, flush=True))
  return 0


def _shorthands(args) -> dict[str, str]:
  """--metrics=fd,kd and the like as overrides; UsageError for arguments that do not go together."""
  if bool(args.workdir) == bool(args.images):
    raise UsageError("evaluate needs either --workdir=DIR, a run, or --images=PATH with --reference=PATH|SPLIT")
  for name, needs in (("reference", "images"), ("out", "images"), ("shift", "workdir"), ("images", "reference")):
    if getattr(args, name) and not getattr(args, needs):
      raise UsageError(f"--{name} needs --{needs}; `ddil evaluate --help` shows what there is")
  given = {f"eval.{name}": getattr(args, name) for name in ("metrics", "bootstrap", "extractor") if getattr(args, name)}
  if args.metrics:
    given["eval.metrics"] = repr(tuple(filter(None, map(str.strip, args.metrics.split(",")))))
  return given


def _evaluate_files(args, overrides) -> int:
  from ddil_jax import config as config_lib
  from ddil_jax import trained
  if args.data_dir:
    overrides["data.data_dir"] = args.data_dir
  config = config_lib.load(args.config, overrides) if args.config else config_lib.defaults(overrides)
  own_data = bool(args.config) or "data.name" in overrides
  result = trained.evaluate_files(config, args.images, args.reference, args.out, "eval.metrics" in overrides, own_data)
  print(f"{result['num']:,} images against {result['num_reference']:,}; {result['seconds']:.0f} s,"
        f" {result['peak_memory_mib']:,} MiB at most")
  for name, value in result["metrics"].items():
    bounds = result["intervals"].get(name)
    print(f"{name:60} {value:12.6g}" + (f"  [{bounds['low']:.6g}, {bounds['high']:.6g}]" if bounds else ""))
  return 0


def _plan(args, overrides) -> int:
  from ddil_jax import config as config_lib
  from ddil_jax import files
  from ddil_jax import plan as plan_lib
  if not args.config:
    raise UsageError("plan needs --config=FILE.py[:ARG]; `ddil list` shows the configs")
  if args.batch < 0:
    raise UsageError(f"--batch={args.batch} is negative; give the number of examples over all chips")
  if args.kept and args.largest:
    raise UsageError("--kept compiles nothing, and what --largest asks only a compiler can tell; leave one out")
  config = config_lib.load(args.config, overrides | ({"data.data_dir": args.data_dir} if args.data_dir else {}))
  if args.largest:
    found = plan_lib.largest_batch(config, args.topology, args.batch)
    if found is None:
      raise RunError(f"not even one example a chip fits on {args.topology}; the plan without --largest says what would"
                     " change that")
    print(f"\nlargest batch that fits: {found.batch_size}\n")
  else:
    found = plan_lib.plan(config, args.topology, args.batch, compiled=not args.kept)
  if args.out:
    files.write_json(args.out, plan_lib.as_json(found))
  print(plan_lib.table(found))
  return 0


def _list() -> int:
  from ddil_jax import build, registry
  from ddil_jax import config as config_lib
  from ddil_jax.data import pipeline
  from ddil_jax.diffusion import distance, grids, prediction, solvers, transforms, weighting
  from ddil_jax.evaluation.results import METRICS
  from ddil_jax.interop.extractors import NAMES
  from ddil_jax.states.base import SOURCES
  from ddil_jax.training.optim import OPTIMIZERS
  groups = {"configs": config_lib.available(), "data sets": pipeline.names(), "objectives": registry.names("objectives"),
            "state sources": SOURCES, "processes": build.PROCESSES, "predictions": sorted(prediction.PREDICTIONS),
            "time grids": sorted(grids.GRIDS), "solvers": sorted(solvers.SOLVERS),
            "transforms": sorted(transforms.PROJECTIONS), "weightings": sorted(weighting.WEIGHTINGS),
            "distances": sorted(distance.DISTANCES), "optimizers": sorted(OPTIMIZERS), "metrics": METRICS,
            "extractors": sorted(NAMES)}
  for what, entries in groups.items():
    print(f"{what}: {', '.join(entries)}")
  return 0


def run() -> None:
  """The console script."""
  code = EXIT_FAILED
  try:
    code = main()
  finally:
    if code in (EXIT_FAILED, EXIT_USAGE):
      _leave(code)
  sys.exit(code)


def _leave(code: int) -> None:
  """Ends one of several processes that failed at once: JAX would wait for the others, and they for this one."""
  jax = sys.modules.get("jax")
  if jax is None or not jax.distributed.is_initialized():
    return
  if sys.exc_info()[0] is not None:
    traceback.print_exc()
  sys.stdout.flush()
  sys.stderr.flush()
  if jax.process_index() == 0:
    time.sleep(LEADER_WAITS)
  os._exit(code)
