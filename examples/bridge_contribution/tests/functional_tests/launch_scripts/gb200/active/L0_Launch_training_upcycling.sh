# CI_TIMEOUT=20
# Copyright (c) 2026, NVIDIA CORPORATION.  All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

#!/bin/bash
set -xeuo pipefail

REPO_ROOT=$(cd "$(dirname "$0")/../../../../.." && pwd)

export CUDA_VISIBLE_DEVICES="0,1"

uv run python -m torch.distributed.run --nproc_per_node=2 --nnodes=1 -m coverage run \
  --data-file="${REPO_ROOT}/.coverage" --source="${REPO_ROOT}" --parallel-mode \
  -m pytest -o log_cli=true -o log_cli_level=INFO -v -s -x -m "not pleasefixme" --tb=short -rA \
  tests/functional_tests/test_groups/training/test_upcycling.py -k test_upcycled_run_is_saved_and_resumed

coverage combine -q
