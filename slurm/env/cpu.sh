#!/usr/bin/env bash
# A virtual environment for nodes without accelerators: bash slurm/env/cpu.sh /shared/venvs/moedist-cpu
set -euo pipefail
folder=${1:?give a folder that all nodes see}
python3 -m venv "$folder"
"$folder/bin/pip" install torch --index-url "${MOEDIST_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
"$folder/bin/pip" install -e "$(dirname -- "${BASH_SOURCE[0]}")/../.."
"$folder/bin/python" -c 'import torch; print(torch.__version__)'
