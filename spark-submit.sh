#!/usr/bin/env bash
# Submit one of the jobs, here or to a cluster, and return its exit status:
#   ./spark-submit.sh local jobs/predict.py --model model --scenes scenes --out mosaics
#   ./spark-submit.sh yarn --num-executors 4 jobs/predict.py --model hdfs:///m --scenes hdfs:///s --out hdfs:///o
# First where to (local, local[N], yarn, yarn-client, k8s), then Spark's own options, the job, and the job's options
# (`.venv/bin/sattile predict --help` lists them). sattile/submit.py does the work.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$here/.venv/bin/python
[ -x "$python" ] || { echo "spark-submit.sh: run \`make env\` first" >&2; exit 2; }
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m sattile.submit "$@"
