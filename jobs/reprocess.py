"""`sattile reprocess` for spark-submit: same options, same exit status."""

import sys

from sattile.cli import main

if __name__ == "__main__":
    sys.exit(main(["reprocess", *sys.argv[1:]]))
