"""`python -m benchmarks [tiling] [cheap] [networks] [reading] [shapes] [--megapixels 64] [--repeats 3] ...`, the
default, and `python -m benchmarks [peers --peers PYTHON] [growth --sizes 64,256] [water --data DIR]`, which need more
time or more.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks import growth, peers, predicting, reading, shapes, tiling, water

ALL = {
    "tiling": tiling.main, "cheap": predicting.cheap, "networks": predicting.networks, "reading": reading.main,
    "shapes": lambda _folder, _megapixels, repeats: shapes.main(repeats),
}  # fmt: skip
ASKED = ("peers", "growth", "water")
MEGAPIXELS, PEERS_MEGAPIXELS = 64, 16


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios to plain loops, in one run.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join([*ALL, *ASKED])}; {', '.join(ALL)} if none"
    )
    parser.add_argument("--megapixels", type=int, help=f"size of the scene ({MEGAPIXELS}; peers {PEERS_MEGAPIXELS})")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the median counts (default: 3)")
    parser.add_argument("--peers", type=Path, default=peers.PYTHON, metavar="PYTHON", help="that has the peers")
    parser.add_argument("--sizes", default=",".join(map(str, growth.SIZES)), help="megapixels of growth's scenes")
    parser.add_argument("--folder", help="keeps the scenes for the next run; a temporary one if not given")
    parser.add_argument("--data", type=Path, help="folder of the water mosaics, for `water`")
    parser.add_argument("--seeds", type=int, default=3, help="of `water` (default: 3)")
    parser.add_argument("--haze", type=float, default=0.0, help="of the trainings of `water` (default: 0)")
    parser.add_argument("--worker-memory", default="3g", help="of `networks` (default: 3g)")
    parser.add_argument(
        "--engines",
        default=",".join(predicting.ENGINES),
        help=f"of `networks` (default: {','.join(predicting.ENGINES)})",
    )
    parser.add_argument("--cores", type=int, default=2, help="of `networks` (default: 2)")
    parser.add_argument("--plain-scene", action="store_true", help="of `networks`: not compressed (default: DEFLATE)")
    given = parser.parse_args()
    unknown = set(given.names) - {*ALL, *ASKED}
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join([*ALL, *ASKED])}")
    sizes = [int(size) for size in given.sizes.split(",")]
    if len(set(sizes)) < 2:
        parser.error("--sizes: an exponent needs two sizes at least")
    with tempfile.TemporaryDirectory(prefix="sattile-benchmarks-") as temporary:
        folder = Path(given.folder or temporary)
        for name in given.names or ALL:
            if name == "water":
                data = given.data or parser.error("water needs --data DIR")
                water.main(folder / "water", data, given.seeds, haze=given.haze)
            elif name == "growth":
                growth.main(folder, sizes, given.repeats, keep=bool(given.folder))
            elif name == "peers":
                # Not resolved: a virtual environment's python is a link.
                peers.main(folder, given.megapixels or PEERS_MEGAPIXELS, given.repeats, given.peers.absolute())
            elif name == "networks":
                predicting.networks(
                    folder, given.megapixels or MEGAPIXELS, given.repeats,
                    worker_memory=given.worker_memory, engines=given.engines.split(","), cores=given.cores,
                    plain_scene=given.plain_scene,
                )  # fmt: skip
            else:
                ALL[name](folder, given.megapixels or MEGAPIXELS, given.repeats)


if __name__ == "__main__":
    main()
