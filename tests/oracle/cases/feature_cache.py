"""Schedules of feature caches."""

NOT_COVERED = {r"feature_cache_schedules": "caches of features are not in this version"}
