#!/usr/bin/env bash
# Known vulnerabilities of what the development environment resolves to, by pip-audit: audit.sh [flags of pip-audit].
# Exit code 1: some were found. 2: not all packages could be looked up, which pip-audit itself counts as success.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh dev .venv-dev
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check pip-audit
# Local versions, such as torch 2.13.0+cpu, are in no list of advisories.
pip --disable-pip-version-check list --format=freeze --exclude-editable | sed 's/+[a-z0-9.]*$//' > "$work/requirements.txt"

summary='
import json, sys
found = json.load(open(sys.argv[1]))["dependencies"]
skipped = [each["name"] for each in found if "skip_reason" in each]
for each in found:
    for known in each.get("vulns", []):
        print(each["name"], each["version"], known["id"], *known["aliases"], "mended in", *known["fix_versions"] or ["no version"])
print(f"{len(found) - len(skipped)} of {len(found)} packages looked up; not:", *skipped or ["none"])
sys.exit(3 if len(skipped) == len(found) else 1 if any(each.get("vulns") for each in found) else 2 if skipped else 0)
'
for service in pypi osv; do
  "$work/venv/bin/pip-audit" --no-deps --disable-pip -r "$work/requirements.txt" -s "$service" --timeout 20 \
    --progress-spinner off --format json "$@" > "$work/found.json" 2> "$work/said" || true
  code=3
  [ -s "$work/found.json" ] && { code=0; python3 -c "$summary" "$work/found.json" > "$work/summary" || code=$?; }
  if [ "$code" != 3 ]; then
    cat "$work/summary"
    exit "$code"
  fi
  echo "audit: no advisories from $service: $(tail -n 1 "$work/said" | cut -c1-200)" >&2
  rm -f "$work/summary"
done
cat "$work/requirements.txt"
echo "audit: NOT AUDITED: neither pypi.org's nor osv.dev's advisories can be reached from here; above are the versions" >&2
exit 2
