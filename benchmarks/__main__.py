"""`python -m benchmarks [tiling] [cheap] [networks] [water --data DIR] [--megapixels 64] [--repeats 3] ...`"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks import predicting, tiling, water

ALL = {"tiling": tiling.main, "cheap": predicting.cheap, "networks": predicting.networks}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios to plain loops, in one run.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)}, water; all but water if none")
    parser.add_argument("--megapixels", type=int, default=64, help="size of the scene (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the median counts (default: 3)")
    parser.add_argument("--folder", help="keeps the scenes for the next run; a temporary one if not given")
    parser.add_argument("--data", type=Path, help="folder of the water mosaics, for `water`")
    parser.add_argument("--worker-memory", default="3g", help="of `networks` (default: 3g)")
    parser.add_argument("--engines", default="tensorflow,openvino", help="of `networks` (default: both)")
    given = parser.parse_args()
    unknown = set(given.names) - {*ALL, "water"}
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    with tempfile.TemporaryDirectory(prefix="sattile-benchmarks-") as temporary:
        folder = Path(given.folder or temporary)
        for name in given.names or ALL:
            if name == "water":
                water.main(folder / "water", given.data or parser.error("water needs --data DIR"))
            elif name == "networks":
                predicting.networks(
                    folder, given.megapixels, given.repeats,
                    worker_memory=given.worker_memory, engines=given.engines.split(","),
                )  # fmt: skip
            else:
                ALL[name](folder, given.megapixels, given.repeats)


if __name__ == "__main__":
    main()
