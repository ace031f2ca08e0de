"""Several steps in one application: a script as users submit their own.

spark-submit.sh yarn-client steps.py '[["index", {"arguments": ["hdfs:///in"], "out": "hdfs:///catalog"}], ...]'
"""

from __future__ import annotations

import json
import logging
import sys

import sattile
from sattile.errors import SattileError


def interpreter(_: object) -> str:
    """In a task: which Python this is."""
    return sys.prefix


def main() -> int:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sattile").setLevel(logging.INFO)
    spark = sattile.session(None)
    workers = spark.sparkContext.parallelize(range(4), 4).map(interpreter).distinct().collect()
    print(f"Spark {spark.version}, driver {sys.prefix}, workers {', '.join(workers)}", flush=True)
    try:
        for name, options in json.loads(sys.argv[1]):
            print(f"step {name}", flush=True)
            getattr(sattile, name)(spark, **options)
    except SattileError as error:
        print(f"steps: {error}", flush=True)
        return error.exit_status
    finally:
        spark.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
