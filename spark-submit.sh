#!/usr/bin/env bash
# Submit one of the jobs: ./spark-submit.sh local jobs/predict.py --model model --scenes scenes --out mosaics
# The master comes first; options after the job are the job's own (`.venv/bin/sattile predict --help` lists them).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

[ $# -ge 2 ] || usage
where=$1
job=$2
shift 2
[ -f "$job" ] || job=$here/$job
[ -f "$job" ] || { echo "spark-submit.sh: no such job: $job (there are: $(cd "$here/jobs" && echo *.py))" >&2; exit 2; }
python=$here/.venv/bin/python
[ -x "$python" ] || { echo "spark-submit.sh: run \`make env\` first" >&2; exit 2; }

case $where in
local | local\[*)
    [ "$where" = local ] && where='local[*]'
    ;;
*)
    echo "spark-submit.sh: $where: only local (or local[N]) so far; clusters come next" >&2
    exit 2
    ;;
esac

# Spark's own scripts look for `python3` on the path unless they are told where Spark and Python are.
SPARK_HOME=$("$python" -c 'import os, pyspark; print(os.path.dirname(pyspark.__file__))')
JAVA_HOME=$("$python" -c 'from sattile.engine import find_java; print(find_java())')
export SPARK_HOME JAVA_HOME PYSPARK_PYTHON=$python PYSPARK_DRIVER_PYTHON=$python SPARK_LOCAL_IP=127.0.0.1
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
exec "$SPARK_HOME/bin/spark-submit" --master "$where" --properties-file "$here/conf/spark/local.conf" "$job" "$@"
