#!/usr/bin/env bash
# Spark's discovery script: the GPUs that an executor may use, as {"name": "gpu", "addresses": ["0", "1"]}.
# spark-submit.sh sends it along with GPU jobs; YARN shows a container its own GPUs only.
set -euo pipefail
addresses=$(nvidia-smi --query-gpu=index --format=csv,noheader | sed 's/.*/"&"/' | paste -sd,)
echo "{\"name\": \"gpu\", \"addresses\": [$addresses]}"
