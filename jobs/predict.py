"""`sattile predict` for spark-submit: same options, same exit status."""

import sys

from sattile.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
