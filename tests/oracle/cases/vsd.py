"""SwiftBrush."""

NOT_COVERED = {r"swiftbrush_.*": "VSD is not an objective of this version"}
