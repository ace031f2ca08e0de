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
local) where='local[*,4]' ;; # 4 tries a task: else local Spark ends a job at the first dead worker
local\[*,*\]) ;;
local\[*\]) where=${where%\]},4] ;;
*)
    echo "spark-submit.sh: $where: only local (or local[N]) so far; clusters come next" >&2
    exit 2
    ;;
esac

# Spark's own scripts look for `python3` on the path unless they are told where Spark and Python are.
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
found=$("$python" -c 'from sattile import engine
print(engine.spark_home(), engine.find_java(), engine.LAUNCHER, engine.LOGGING, sep="\n")')
{ read -r SPARK_HOME; read -r SATTILE_JAVA_HOME; read -r JAVA_HOME; read -r logging; } <<<"$found"
export SPARK_HOME SATTILE_JAVA_HOME JAVA_HOME PYSPARK_PYTHON=$python PYSPARK_DRIVER_PYTHON=$python SPARK_LOCAL_IP=127.0.0.1
exec "$SPARK_HOME/bin/spark-submit" --master "$where" --properties-file "$here/conf/spark/local.conf" \
    --driver-java-options "$logging" "$job" "$@"
