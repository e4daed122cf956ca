"""An interpreter that only tells how it was called, for jobs whose work is not what is tested."""

import json
from pathlib import Path

SCRIPT = """#!/bin/bash
# called as: PYTHON -P -m titans_pretrain.cli VERB ARGUMENT...
words=("${@:4}")
stage=${words[0]}
[ "$stage" = data ] && stage=${words[1]}
me=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
say() { printf '{"event": "%s", "stage": "%s", "job": "%s", "secret": "%s"}\\n' \\
  "$1" "$stage" "$me" "${WANDB_API_KEY:+set}" >>"$(dirname "$0")/told.jsonl"; }
say begin
printf '%s\\n' "${words[@]}" >"$(dirname "$0")/words-$me"
sleep "$(cat "$(dirname "$0")/seconds" 2>/dev/null || echo 0)"
say end
! grep -qx "$stage" "$(dirname "$0")/failing" 2>/dev/null
"""


class Interpreter:
    """The script and what it was told."""

    def __init__(self, place: Path) -> None:
        place.mkdir()
        self.place, self.path = place, place / "python"
        self.path.write_text(SCRIPT)
        self.path.chmod(0o755)

    def takes(self, seconds: float) -> None:
        (self.place / "seconds").write_text(str(seconds))

    def fails_at(self, *stages: str) -> None:
        (self.place / "failing").write_text("".join(f"{stage}\n" for stage in stages))

    def rows(self) -> list[dict[str, str]]:
        path = self.place / "told.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def events(self) -> list[tuple[str, str]]:
        return [(row["event"], row["stage"]) for row in self.rows()]

    def words(self, job: str) -> list[str]:
        return (self.place / f"words-{job}").read_text().splitlines()
