"""python -m ddil_jax: the command line, see `main.py`."""

from ddil_jax.main import run

if __name__ == "__main__":
  run()
