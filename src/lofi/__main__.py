"""`python -m lofi VERB` is `lofi VERB`."""

from lofi.cli.main import run

if __name__ == "__main__":
    run()
