#!/usr/bin/env bash
# A virtual environment for AMD nodes on a folder that all of them see: bash slurm/env/rocm.sh /shared/venvs/moedist-rocm
# Run it where there is internet and Python 3.10 or newer, from the project's folder; then name it as `venv` of the kind.
# The same version of torch as on the other kinds, in ROCm's build.
set -euo pipefail
folder=${1:?give a folder that all nodes see}
python3 -m venv "$folder"
# the ROCm version of the nodes or near it: cat /opt/rocm/.info/version
"$folder/bin/pip" install torch --index-url "${MOEDIST_TORCH_INDEX:-https://download.pytorch.org/whl/rocm6.4}"
"$folder/bin/pip" install -e "$(dirname -- "${BASH_SOURCE[0]}")/../.."
"$folder/bin/python" -c 'import torch; print(torch.__version__, "built for ROCm", torch.version.hip)'
