"""`python -m daemon` is `qwend`."""

from daemon.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
