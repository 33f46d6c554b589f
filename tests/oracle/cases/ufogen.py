"""UFOGen."""

NOT_COVERED = {r"ufogen_.*": "UFOGen is not an objective of this version"}
