#!/usr/bin/env bash
# Every accident that docs/accidents.md speaks of, kill -9 at twenty random points of each stage and at three of those
# on Ray (GRISTMILL_RAY_KILLS; none with GRISTMILL_RAY=) among them; a line for each with what was shown. Further
# arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh dev .venv-dev
found=$(mktemp -d)
trap 'rm -rf "$found"' EXIT
code=0
export GRISTMILL_KILLS=${GRISTMILL_KILLS:-20} GRISTMILL_RAY=${GRISTMILL_RAY-1}
python -m pytest -q -p no:cacheprovider --timeout 3600 -o junit_family=xunit1 --junitxml "$found/shown.xml" \
  tests/test_accidents.py tests/test_kill.py tests/test_corpus_bad_input.py "$@" > "$found/log" 2>&1 || code=$?
python - "$found/shown.xml" <<'END' || code=1
import sys
from xml.etree import ElementTree

for test in ElementTree.parse(sys.argv[1]).iter("testcase"):
    state = next((state for state in ("failure", "error", "skipped") if test.find(state) is not None), "ok")
    shown = "; ".join(each.get("value", "") for each in test.iter("property"))
    print(f"{state:8}{test.get('name', '').removeprefix('test_').replace('_', ' ')}{': ' * bool(shown)}{shown}")
END
[ "$code" -eq 0 ] || grep -E "^(FAILED|ERROR|E  )" "$found/log" || tail -n 30 "$found/log"
tail -n 1 "$found/log"
exit "$code"
