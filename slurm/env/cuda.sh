#!/usr/bin/env bash
# A virtual environment for NVIDIA nodes on a folder that all of them see: bash slurm/env/cuda.sh /shared/venvs/moedist-cuda
# Run it where there is internet and Python 3.10 or newer, from the project's folder; then name it as `venv` of the kind.
set -euo pipefail
folder=${1:?give a folder that all nodes see}
python3 -m venv "$folder"
# the CUDA version of the nodes' driver or an older one: nvidia-smi shows it
"$folder/bin/pip" install torch --index-url "${MOEDIST_TORCH_INDEX:-https://download.pytorch.org/whl/cu126}"
# add [mpi] with the site's MPI module loaded, for world.transport=mpi
"$folder/bin/pip" install -e "$(dirname -- "${BASH_SOURCE[0]}")/../.."
"$folder/bin/python" -c 'import torch; print(torch.__version__, "built for CUDA", torch.version.cuda)'
