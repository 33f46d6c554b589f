"""Fields that every config has, with their defaults and meaning.

A config file is a function `get_config(arg)`: it takes these defaults, sets what its data set and
method need, and applies the comma-separated modifiers of `arg`, for instance
`configs/digits_pd.py:ddil,reflected` or `configs/digits_pd.py:smoke`.
"""

from ml_collections import ConfigDict

from ddil_jax.errors import UsageError
from ddil_jax.registry import unknown


def common() -> ConfigDict:
  """The defaults. Every field can be overridden: `--config.train.steps=1000`."""
  config = ConfigDict()
  config.seed = 0  # of parameters, noise and the order of the data

  config.data = ConfigDict(dict(
      name="digits",  # a name that `ddil list` shows
      data_dir="",  # where sets are prepared; "" is $DDIL_DATA, else data/
      manual_dir="",  # where the user's files lie
      path="",  # for data.name = folder
      image_size=0,  # 0 keeps the set's own
      fraction=1.0,  # of the training images, the same ones for every seed; evaluation sees all
      flip=False))
  config.process = ConfigDict(dict(name="cosine"))
  config.prediction = ConfigDict(dict(name="v"))
  config.grid = ConfigDict(dict(name="uniform"))

  config.model = ConfigDict(dict(
      file="",  # of `ddil convert`, or a config.json of diffusers or EDM: then the sizes below do not count
      channels=32, channel_mult=(1, 2, 2), num_res_blocks=2, attention_resolutions=(7, 8), num_heads=4, dropout=0.0,
      guidance_embedding=0,  # dimension of the embedding of the guidance scale; 0 is none
      end_time_embedding=0,  # of the time at which a jump ends, for methods that tell it; 0 is none
      lora=0,  # rank of a LoRA that the student trains over the frozen teacher; 0 trains all its parameters
      critic_lora=0,  # likewise of the critic, of methods that have one
      lora_alpha=0.0,  # the deltas are scaled by alpha / rank; 0 is the rank
      lora_targets="",  # which kernels, a regular expression searched in their paths: "attention"; "" is all
      dtype="float32",  # compute dtype; parameters are float32
      remat="none"))  # what a gradient computes anew to save memory: none | dots (keeps convolutions) | blocks
  config.teacher = ConfigDict(dict(
      path="",  # a run directory, a checkpoint, or a .safetensors file
      ema="0.999",  # which average of a run's student is the teacher; "raw" is none
      channels=0, channel_mult=(), num_res_blocks=0,  # where it differs from `model`; 0, () is the same
      guidance_embedding=0,  # of a teacher that reads the guidance scale: a student of guided distillation
      guidance_scale=1.0,  # u + g (c - u); 1 is the conditional model itself
      dtype="float32",  # in which the frozen parameters are kept; bfloat16 halves their memory
      folded_guidance_scale=0.0))  # what a distilled teacher has in it already (set by stages); 0 is none

  # Where training states come from (DDIL). A base method is forward = 1.
  config.states = ConfigDict(dict(
      forward=1.0, student=0.0, teacher=0.0, dagger=0.0, pairs=0.0,  # priors: a number or a schedule tuple
      selection="per_step",  # or per_example
      teacher_steps=16,  # of the teacher's rollout
      dagger_probability=0.5,  # with which the teacher acts at a step of the dagger source
      replay=True, refresh_every=50, capacity=1024,  # states per rollout source
      rollout_params="raw"))  # or the name of an EMA

  # Reflected diffusion: a projection of x0 estimates, at three places.
  config.reflect = ConfigDict(dict(
      kind="identity",  # clip | dynamic | fold
      lo=-1.0, hi=1.0,  # of the data: a number, or a tuple with one per channel; () is what a prepared set names
      percentile=0.995,
      teacher=True, target=True,  # the target is an EMA or a critic; progressive distillation has none
      sampler=False))

  config.optimizer = ConfigDict(dict(
      name="adam", learning_rate=3e-4, schedule="constant", warmup_steps=0, clip=1.0,
      start=0.0, end=0.0,  # of warm-up and decay, in units of the learning rate
      critic_learning_rate=0.0))  # 0: the same as the student's
  config.train = ConfigDict(dict(
      steps=10_000, batch_size=128,
      ema=(0.999,), ema_warmup=True,  # averages forget their start: decay min(0.999, (1 + n) / (10 + n)) at update n
      stages=(),  # num_steps of each stage of progressive distillation; () is a single run
      log_every=100, eval_every=0, checkpoint_every=1000,  # 0: only at the end
      keep=2, keep_best=0, max_bad_steps=10,
      parallel="single",  # mesh | pmap
      fsdp=1,  # devices of a mesh over which parameters, optimizer states and averages are split
      sharding=(".*=largest",),  # REGEX=AXIS for parameters by path, AXIS a number, largest or whole
      min_shard=16_384,  # smaller arrays stay whole, unless a rule names their axis
      microbatch=0,  # most examples that a device learns from at a time; 0 is its share of the batch
      watchdog_seconds=0.0,  # without a step for so long, compilations included, the process ends; 0 is never
      profile_steps=()))  # (first, last) of a trace in profile/
  config.eval = ConfigDict(dict(
      num_samples=2000, batch_size=500, ema="0.999",  # "raw": the student's own parameters
      sampler_steps=(),  # other step counts at which to evaluate too
      sampler_times=(),  # a sampling grid of one's own instead: decreasing, its last entry the clean end
      teacher_acts=(),  # sampling steps, from 0, that the teacher takes instead of the student
      time_shift=0.0,  # how far from a step's time the sampler looks for the one that fits x_t; 0 is none
      time_shift_cutoff=0.0,  # not at times up to this one
      cache="",  # features that some steps compute and others take: deep0, deep1, ... (DeepCache) or skips (the encoder)
      cache_steps="every:2",  # which steps compute them: every:N | around:N,CENTER,POWER | early:N,POWER | keys:RULE
      cache_batched=False,  # of skips: one call for the decoder of the steps that share them
      guidance_scales=(),  # of a teacher, or of a student that reads the scale; () is teacher.guidance_scale
      metrics=("fd", "kd", "precision", "recall", "density", "coverage", "class_accuracy", "saturation"),
      extractor="",  # "" is a small classifier trained on the set; or NAME:FILE of published weights, `ddil list`
      lpips="",  # lpips-alex:FILE or lpips-vgg:FILE adds LPIPS-diversity
      samples_per_prompt=1,  # more, one after the other, for the diversity of samples of one prompt
      captions="",  # clip:FILE adds, of samples of prompts, CLIP score and R-precision
      quantise=True,  # samples and reference to 8-bit levels before those two, as if they came from files
      bootstrap=0,  # half-samples for an interval of every metric, 100 for instance; 0 is none
      shift_samples=500,  # of the covariate-shift curves; 0 is none
      diagnose_every=0,  # steps between logs of the shift in training, and of DMD2's critic lag; 0 is never
      shift_kinds=("state",),  # features: in feature space too; labels: the error of the teacher's labels
      reference="train",  # the split that samples are compared with
      seed=0))  # of the noise of all samples, the same in every run
  return config


# What the paper compares: arguments of every student's config.
VARIANTS = ("", "ddil", "reflected", "ddil,reflected")
DDIL = dict(forward=0.5, student=0.25, teacher=0.25)


def smoke(config: ConfigDict) -> ConfigDict:
  """Two steps on fake data with tiny networks: does everything fit together?"""
  config.data.name, config.data.image_size = "fake", 8
  config.model.update(channels=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_heads=1)
  config.train.update(steps=2, batch_size=8, log_every=1, checkpoint_every=1, eval_every=0)
  config.train.stages = config.train.stages[-2:]
  config.states.update(capacity=64, refresh_every=1, teacher_steps=4)
  config.eval.update(num_samples=32, batch_size=16, shift_samples=32)
  return config


def ddil(config: ConfigDict) -> ConfigDict:
  """DDIL's mixture at the default priors."""
  config.states.update(DDIL)
  return config


def lora(config: ConfigDict) -> ConfigDict:
  """The student trains a LoRA of rank 4 over the frozen teacher."""
  config.model.lora = 4
  return config


def reflected(config: ConfigDict) -> ConfigDict:
  """Static clipping at the data's bounds, on teacher and target."""
  config.reflect.kind = "clip"
  return config


def trajectory(config: ConfigDict, **objective) -> ConfigDict:
  """What methods that learn from the teacher at a state share on digits: how long and how fast, what is sampled."""
  config.objective = ConfigDict(objective)
  config.optimizer.update(name="adam", learning_rate=5e-4)
  config.train.update(steps=300, batch_size=64, log_every=50, ema=(0.99,))
  config.eval.update(ema="0.99", sampler_steps=(2, 1))
  return config


def generator(config: ConfigDict, **objective) -> ConfigDict:
  """What methods that train a generator against a critic share on digits: its own states, and how long."""
  config.objective = ConfigDict(objective)
  config.states.update(forward=0.0, student=1.0)
  # A critic that learns faster than the student follows it better in a run this short.
  config.optimizer.update(name="adam", learning_rate=4e-4, critic_learning_rate=1e-3, schedule="linear")
  config.train.update(steps=1000, batch_size=64, log_every=50, ema=(0.99,))
  config.eval.ema = "0.99"
  return config


def half_forward(config: ConfigDict) -> ConfigDict:
  """DDIL of a generator: half forward data, half states of the student's own sampler."""
  config.states.update(forward=0.5, student=0.5, teacher=0.0)
  return config


MODIFIERS = {"smoke": smoke, "ddil": ddil, "reflected": reflected}


def apply(config: ConfigDict, arg: str | None, own: dict | None = None) -> ConfigDict:
  """Applies the modifiers of a config argument, `smoke` last.

  Args:
    own: further modifiers of the config file.

  Raises:
    UsageError: an unknown modifier.
  """
  known = MODIFIERS | (own or {})
  wanted = [name for name in (arg or "").split(",") if name]
  for name in wanted:
    if name not in known:
      raise UsageError(unknown("config argument", name, known))
  for name in sorted(wanted, key=lambda n: n == "smoke"):
    known[name](config)
  return config
