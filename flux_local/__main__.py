"""`python -m flux_local`."""

from flux_local.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
