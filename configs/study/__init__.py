"""The study: each file is one part, a `sweep()` over the digits configs. `python -m launch.study PART` runs it."""
