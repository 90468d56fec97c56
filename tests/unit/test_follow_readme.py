"""tools/follow-readme: which commands of a document it runs, and what it calls wrong.

CI runs the tool itself, on bare Debians.
"""

from __future__ import annotations

import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]
follow = runpy.run_path(str(ROOT / "tools" / "follow-readme"))["follow"]

README = """
```console machine
$ true && echo several \\
  lines
```

```console cluster
$ kubectl delete namespace kube-system
```

1. In a list:

   ```console exit=3
   $ echo one; echo two
   one
   ...
   $ echo right; exit 3
   right
   ```

```yaml
$ not: a command
```
"""


class Shell(SimpleNamespace):
    """Runs commands here, and remembers them."""

    def run(self, command: str) -> tuple[int, str]:
        self.seen.append(command)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout


def followed(tmp_path: Path, text: str) -> tuple[list[str], list[str]]:
    """The commands, and what was wrong."""
    (tmp_path / "README.md").write_text(text)
    shell = Shell(seen=[])
    wrong = follow(shell, tmp_path / "README.md")
    return shell.seen, wrong


def test_all_commands_but_those_of_a_cluster_are_run_in_order(tmp_path: Path) -> None:
    seen, wrong = followed(tmp_path, README)
    assert seen == [
        "true && echo several \\\n  lines",
        "echo one; echo two",
        "echo right; exit 3",
    ]
    assert wrong == []


def test_another_output_and_another_exit_code_are_wrong(tmp_path: Path) -> None:
    _, wrong = followed(tmp_path, README.replace("   one\n", "   two\n").replace("exit=3", ""))
    assert wrong == [
        "README.md:13: other output: echo one; echo two",
        "README.md:13: ended with 3: echo right; exit 3",
    ]
