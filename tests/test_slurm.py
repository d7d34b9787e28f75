"""The scripts for SLURM, every task really run, by stand-ins for sbatch and srun that do as those do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SBATCH = """#!/usr/bin/env bash
# Runs the tasks of a job at once, and the job only if those before it ended well.
set -u
id=$(($(cat "$JOBS/last" 2>/dev/null || echo 0) + 1)); echo $id > "$JOBS/last"; tasks=() output=/dev/stderr
for word in "$@"; do case $word in
  --array=1-*) tasks=($(seq "${word#--array=1-}"));;
  --output=*) output=${word#--output=};;
  --dependency=afterok:*) [ -e "$JOBS/${word##*:}.ok" ] || { echo "$id;tiny"; exit 0; };;
esac; done
script=${!#} failed=0
export SLURM_JOB_ID=$id SLURM_CPUS_PER_TASK=1
if [ ${#tasks[@]} -eq 0 ]; then bash "$script" > "${output/\\%x-\\%j/$id}" 2>&1 || failed=1
else
  pids=()
  for task in "${tasks[@]}"; do
    SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_COUNT=${#tasks[@]} \\
      bash "$script" > "${output/\\%x-\\%a-\\%A/$id-$task}" 2>&1 & pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
fi
[ $failed -eq 1 ] || touch "$JOBS/$id.ok"
echo "$id;tiny"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Environment of a cluster that has nothing but stand-ins."""
    tools, jobs = tmp_path / "tools", tmp_path / "jobs"
    jobs.mkdir()
    tools.mkdir()
    commands = {
        "sbatch": SBATCH,
        "srun": '#!/usr/bin/env bash\nexec "$@"\n',
        "scontrol": '#!/usr/bin/env bash\necho "$@" >> "$JOBS/scontrol"\n',
        "gristmill": f'#!/usr/bin/env bash\nexec {sys.executable} -m pipeline "$@"\n',
    }
    for name, text in commands.items():
        (tools / name).write_text(text, encoding="utf-8")
        (tools / name).chmod(0o755)
    (tmp_path / "environment").write_text(f"export PATH={tools}:$PATH\n", encoding="utf-8")
    own = {"ENVIRONMENT": str(tmp_path / "environment"), "JOBS": str(jobs), "WHERE": "--partition=any", "PARTS": "2"}
    return {**os.environ, **own, "PATH": f"{tools}:{os.environ['PATH']}"}


def submit(cluster: dict[str, str], recipe: Path, *stages: str) -> list[str]:
    """What run.sh says of its jobs."""
    command = ["bash", str(ROOT / "scripts/slurm/run.sh"), *stages]
    env = {**cluster, "RECIPE": str(recipe)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_arrays_of_parts_and_what_puts_them_together_make_the_whole_run(
    cluster: dict[str, str], recipe_file: Path
) -> None:
    said = submit(cluster, recipe_file)
    assert [line.rpartition(" ")[2] for line in said] == [str(number) for number in range(1, 8)]
    run = Path(json.loads(recipe_file.read_text(encoding="utf-8"))["run_folder"])
    logs = {path.name: path.read_text(encoding="utf-8") for path in (run / "slurm").iterdir()}
    assert sorted(logs) == [
        "1-1.log",
        "1-2.log",
        "2.log",
        "3.log",
        "4-1.log",
        "4-2.log",
        "5.log",
        "6-1.log",
        "6-2.log",
        "7.log",
    ]
    done = {
        name: json.loads((run / name / "result.json").read_text()) for name in ("rate", "train", "score", "filter")
    }
    assert (done["rate"]["n_asked"], done["rate"]["n_reused"], done["rate"]["n_sampled"]) == (0, 50, 50), logs
    assert (done["score"]["n_shards"], done["score"]["n_shards_reused"]) == (3, 3)
    assert done["filter"]["n_kept"] == 18


def test_what_follows_a_task_that_failed_is_not_started(cluster: dict[str, str], recipe_file: Path) -> None:
    values = json.loads(recipe_file.read_text(encoding="utf-8"))
    shutil.rmtree(values["teacher"]["model"] + "-gone", ignore_errors=True)
    values["teacher"]["model"] += "-gone"
    recipe_file.write_text(json.dumps(values), encoding="utf-8")
    submit(cluster, recipe_file, "rate")
    run = Path(values["run_folder"])
    assert "-gone" in (run / "slurm" / "1-1.log").read_text(encoding="utf-8")
    assert not (run / "slurm" / "2.log").exists()
    assert not (run / "rate" / "result.json").exists()


def test_a_task_whose_time_is_up_is_queued_again(cluster: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "tools" / "gristmill").write_text("#!/usr/bin/env bash\nkill -TERM $$\n", encoding="utf-8")
    env = {**cluster, "environment": cluster["ENVIRONMENT"], "recipe": "x", "SLURM_JOB_ID": "17"}
    done = subprocess.run(["bash", "scripts/slurm/score.sh"], env=env, cwd=ROOT, check=False, capture_output=True)
    assert done.returncode == 143
    assert (tmp_path / "jobs" / "scontrol").read_text(encoding="utf-8") == "requeue 17\n"
