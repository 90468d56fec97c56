"""The command line: its commands, its flags and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from agent.cli import demo
from agent.cli.main import COMMANDS, main
from agent.config.settings import OPTIONS
from tests import manifest

GROUPS = {
    "run": {"data plane", "tables", "cluster", "agent", "conntrack"},
    "init": {"conntrack"},
    "render": {"data plane", "cluster"},
    "diff": {"data plane", "tables", "cluster"},
    "endpoints": {"data plane", "cluster"},
    "explain": {"data plane", "cluster"},
    "doctor": {"data plane", "cluster"},
    "services": {"data plane", "cluster"},
    "status": set(),
    "history": set(),
    "top": set(),
    "flows": {"data plane", "cluster"},
    "trace": set(),
    "cleanup": set(),
    "demo": set(),
}


def command(name: str) -> click.Command:
    found = main.get_command(click.Context(main), name)
    assert found
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_flags_of_its_groups_of_options(name: str) -> None:
    """Every declared option is a flag of the commands it concerns, and of no others."""
    flags = {flag for option in command(name).params for flag in option.opts}
    wanted = {d.flag for d in OPTIONS.values() if d.option.group in GROUPS[name]}
    assert flags & {d.flag for d in OPTIONS.values()} == wanted


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_default_that_is_not_empty(name: str) -> None:
    shown = " ".join(CliRunner().invoke(main, [name, "--help"]).output.split())
    for declared in OPTIONS.values():
        if declared.flag in shown and declared.type is not bool and declared.default_text:
            # click may break a line behind a hyphen
            text = declared.default_text.replace("`", "").replace("- ", "-")
            assert f"[default: {text}" in shown.replace("- ", "-"), declared.name


def test_an_unknown_command_is_a_usage_error() -> None:
    done = CliRunner().invoke(main, ["programme"])
    assert done.exit_code == 2
    assert "No such command 'programme'" in done.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--masquerade-bit=32"], "32 is not in the range 0<=x<=31"),
        (["--detect-local-mode=Magic"], "'Magic' is not one of"),
        (["--cluster-cidr=10.0.0.0"], "sliceproxy: --cluster-cidr: '10.0.0.0' is not a CIDR"),
        (["--nodeport-addresses=::1"], "sliceproxy: --nodeport-addresses: '::1' is not a CIDR"),
        (["--config=/nonexistent"], "sliceproxy: /nonexistent: cannot be read"),
    ],
    ids=str,
)
def test_a_bad_flag_is_exit_code_2_and_says_what_is_allowed(
    flags: list[str], message: str, tmp_path: Path
) -> None:
    done = CliRunner().invoke(main, ["render", f"--from={tmp_path}", *flags])
    assert (done.exit_code, message in done.output) == (2, True), done.output


def test_a_mode_is_accepted_in_any_case(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('{"kind": "List", "items": []}')
    done = CliRunner().invoke(
        main, ["render", f"--from={tmp_path}", "--detect-local-mode=nodecidr"]
    )
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("name", ["render", "diff"])
def test_a_manifest_that_cannot_be_read_is_exit_code_2_and_no_proposal(
    name: str, tmp_path: Path
) -> None:
    """Objects in an unreadable manifest look deleted; `run` would not delete them."""
    (tmp_path / "good.json").write_text(json.dumps(manifest.service_document()))
    (tmp_path / "half.yaml").write_text("kind: Service\nmetadata: {")
    done = CliRunner().invoke(main, [name, f"--from={tmp_path}"])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert f"cannot read all manifests ({tmp_path}/half.yaml)" in done.stderr


def test_the_demo_says_where_it_is_if_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "_CHECKOUT", tmp_path)
    done = CliRunner().invoke(main, ["demo"])
    assert done.exit_code == 2
    assert "run `make demo` in a checkout" in done.output


def test_the_shell_gets_completions() -> None:
    """As docs/commands.md has it: click's own script, and what it asks for."""
    program = [
        sys.executable,
        "-c",
        "from agent.cli.main import main; main(prog_name='sliceproxy')",
    ]
    script = subprocess.run(
        program,
        env={**os.environ, "_SLICEPROXY_COMPLETE": "bash_source"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "complete -o nosort -F _sliceproxy_completion sliceproxy" in script
    asked = subprocess.run(
        program,
        env={
            **os.environ,
            "_SLICEPROXY_COMPLETE": "bash_complete",
            "COMP_WORDS": "sliceproxy explain --fr",
            "COMP_CWORD": "2",
        },
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    assert asked.split() == ["plain,--from", "plain,--from-address"]


def test_a_misspelt_command_gets_a_suggestion() -> None:
    done = CliRunner().invoke(main, ["statsu"])
    assert (done.exit_code, "Did you mean status?" in done.output) == (2, True), done.output


def test_the_document_has_every_command() -> None:
    text = (Path(__file__).parents[2] / "docs/commands.md").read_text()
    assert not [name for name in COMMANDS if f"`{name}" not in text]
