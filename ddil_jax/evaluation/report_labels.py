"""What the settings of given runs are called: their variant, and the config fields in which they differ.

Rows of one label and unlike seeds are seeds of one setting.
"""

import collections
import json
from typing import Any, NamedTuple

VARIANTS = ("base", "+ddil", "+reflected", "+ddil+reflected")
# Of no bearing on what a network learns: places, bookkeeping, what is measured.
_APART = ("seed", "teacher.path", "data.data_dir", "data.manual_dir", "train.log_every", "train.checkpoint_every",
          "train.eval_every", "train.keep", "train.keep_best", "train.max_bad_steps", "eval.num_samples",
          "eval.batch_size", "eval.sampler_steps", "eval.teacher_acts", "eval.time_shift", "eval.time_shift_cutoff",
          "eval.cache", "eval.cache_steps", "eval.cache_batched", "eval.guidance_scales", "eval.metrics",
          "eval.bootstrap", "eval.extractor", "eval.lpips", "eval.captions", "eval.samples_per_prompt", "eval.quantise",
          "eval.reference", "eval.shift_samples")
PRIORS = ("states.forward", "states.student", "states.teacher", "states.dagger")
# What a variant's name says already, as long as the runs of that variant agree.
IN_VARIANT = (*PRIORS, "reflect.kind")
# What else a table calls so.
_TAKEN = ("steps", "seed", "guidance_scale", "samples", "seconds", "name", "path")


def flatten(config: dict, prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": 1}} -> {"a.b": 1}; an empty dict is a value."""
  flat = {}
  for name, value in config.items():
    flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
  return flat


class Setting(NamedTuple):
  """What rows of several seeds have in common.

  Attributes:
    variant: base, +ddil, ...; "" of a teacher.
    values: {field: value} of the fields in which it differs from comparable settings.
    names: {field: "refresh_every=50"} of those that its label names.
    unnamed: the same of fields in which it is like more than half of the settings of its method.
  """
  variant: str
  values: dict[str, Any] = {}
  names: dict[str, str] = {}
  unnamed: dict[str, str] = {}

  @property
  def label(self) -> str:
    return self.without("")

  def without(self, field: str) -> str:
    """The label of all but one field."""
    return ", ".join([self.variant] * bool(self.variant) + [text for f, text in self.names.items() if f != field])

  @property
  def order(self) -> tuple:
    """Sorts settings: by variant, then numbers by size, the rest as text."""
    number = lambda v: isinstance(v, int | float) and not isinstance(v, bool)  # noqa: E731
    values = tuple((f, (0, v, "") if number(v) else (1, 0, text(v))) for f, v in self.values.items())
    place = VARIANTS.index(self.variant) if self.variant in VARIANTS else len(VARIANTS)
    return place, self.variant, values, self.label


def with_settings(rows: list) -> list:
  """The rows with their `setting`.

  Rows are comparable if they agree in objective, steps and guidance scale. A row without a config is called
  by its variant alone.
  """
  configs = {id(row.config): _effective(row.config) for row in rows}  # one config may have many rows
  varying, usual = _varying(rows, configs), _usual(rows, configs)
  short = short_names([row.config for row in rows])
  out = []
  for row in rows:
    fields = sorted(varying.get(row.objective, set()) | varying.get((row.objective, row.variant), set()))
    values = {field: configs[id(row.config)][field] for field in fields if field in configs[id(row.config)]}
    names = {field: f"{short[field]}={text(value)}" for field, value in values.items()
             if not (field in PRIORS and value == 0)}  # a source that is not there
    unnamed = {f: name for f, name in names.items() if usual.get((row.objective, f)) == json.dumps(values[f])}
    names = {f: name for f, name in names.items() if f not in unnamed}
    out.append(row._replace(setting=Setting(row.variant, values, names, unnamed)))
  return out


def _usual(rows, configs) -> dict[tuple[str, str], str]:
  """{(objective, field): the value, as JSON, that more than half of the settings have}, where there is one.

  A label need not name it, unless it is a yes or no, a prior, or absent from some (older) config.
  """
  settings = {}
  for row in rows:
    alike = json.dumps({f: v for f, v in configs[id(row.config)].items() if f not in _APART}, sort_keys=True)
    if row.config:
      settings.setdefault(row.objective, {})[alike] = row.config, configs[id(row.config)]
  usual = {}
  for objective, of in settings.items():
    for field in {f for whole, _ in of.values() for f in whole} - {*_APART, *IN_VARIANT}:
      counts = collections.Counter(json.dumps(config[field]) for _, config in of.values() if field in config)
      value, n = counts.most_common(1)[0] if counts else ("true", 0)
      if 2 * n > counts.total() and value not in ("true", "false") and all(field in whole for whole, _ in of.values()):
        usual[objective, field] = value
  return usual


def _effective(config: dict) -> dict:
  """A config without fields that change nothing: of rollouts where there are none, of a projection where none acts."""
  idle = []
  if not any(config.get(prior) for prior in PRIORS[1:]):
    idle.append("states.")
  if config.get("reflect.kind") == "identity":
    idle.append("reflect.")
  return {field: value for field, value in config.items() if field in IN_VARIANT or not field.startswith(tuple(idle))}


def _varying(rows, configs) -> dict:
  """The fields that differ within comparable rows: by objective, and by (objective, variant)."""
  groups = {}
  for row in rows:
    if row.config:
      for owner in (row.objective, (row.objective, row.variant)):
        groups.setdefault((owner, row.group), {})[id(row.config)] = row.config, configs[id(row.config)]
  varying = {}
  for (owner, _), of in groups.items():
    names = IN_VARIANT if isinstance(owner, tuple) else {f for whole, _ in of.values() for f in whole} - {
        *_APART, *IN_VARIANT}
    # A field that changes nothing there differs from no other; one that an older config lacks does.
    seen = lambda name: {json.dumps(whole.get(name)) for whole, effective in of.values()  # noqa: E731
                         if name in effective or name not in whole}
    varying.setdefault(owner, set()).update(name for name in names if len(seen(name)) > 1)
  return varying


def short_names(configs: list[dict]) -> dict[str, str]:
  """{field: its last part, or as many parts as tell it from every other field}."""
  fields = set().union(*configs)
  ends = {}
  for field in fields:
    parts = field.split(".")
    for n in range(1, len(parts) + 1):
      ends.setdefault(".".join(parts[-n:]), set()).add(field)
  return {field: next((end for n in range(1, field.count(".") + 2)
                       if len(ends[end := ".".join(field.split(".")[-n:])]) == 1 and end not in _TAKEN), field)
          for field in fields}


def text(value) -> str:
  """A config value, short: 0.25, (8, 4), linear(1, 0, 1)."""
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, float):
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
  if isinstance(value, list | tuple):
    kind = value[0] if value and isinstance(value[0], str) else ""
    return f"{kind}({', '.join(map(text, value[bool(kind):]))})"
  return str(value)
