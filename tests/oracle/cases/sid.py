"""Score identity distillation."""

NOT_COVERED = {r"(sid|sid_lsg|sida)_\d+_.*": "score identity distillation is not an objective of this version"}
