"""Goal: every command of both programs tells what it takes, and refuses a result file without a place before it works.

Method: the parsers are the real ones, and the names of commands are read from them.
"""

from collections.abc import Callable

import pytest

from cluster.__main__ import COMMANDS
from cluster.__main__ import main as cluster_main
from cost_service.__main__ import main as cost_main

Main = Callable[[list[str]], int]

NEEDED = {
    "calibrate": ["--output", "new"], "tenants": ["list"], "validate": ["--bench", "a", "--profile", "b"],
    "fit": ["--profile", "a"], "evaluate": ["--profile", "a"],
}  # fmt: skip
"""Arguments without which a command is none."""

WITHOUT_RESULTS = {"check", "state", "policy", "replay", "report", "bench-simulation"}
CONTRACT = {"serve", "status", "tenants", "simulate", "bench", "calibrate"}
"""Commands that scripts are promised `--json FILE` for."""


def helped(main: Main, *words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def subcommands(text: str) -> list[str]:
    """Names that a help lists under its commands."""
    return [line.split()[0] for line in text.splitlines() if line.startswith("    ") and line[4] != " "]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(cluster_main, command, capsys=capsys)
    assert text.startswith(f"usage: python -m cluster {command}")
    for name in subcommands(text):
        assert helped(cluster_main, command, name, capsys=capsys).startswith(
            f"usage: python -m cluster {command} {name}"
        )


def test_every_command_of_the_cost_service_helps(capsys: pytest.CaptureFixture[str]) -> None:
    names = subcommands(helped(cost_main, capsys=capsys))
    assert names == ["fit", "evaluate"]
    for name in names:
        assert helped(cost_main, name, capsys=capsys).startswith(f"usage: python -m cost_service {name}")


def test_the_commands_of_tenants_are_found_as_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(subcommands(helped(cluster_main, "tenants", capsys=capsys))) >= {"add", "list", "revoke"}


@pytest.mark.parametrize("command", [*sorted(set(COMMANDS) - WITHOUT_RESULTS), "fit", "evaluate"])
def test_a_result_file_without_a_folder_is_refused_before_any_work(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main: Main = cluster_main if command in COMMANDS else cost_main
    assert main([command, *NEEDED.get(command, []), "--json", "/nowhere/at/all.json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "Error: --json /nowhere/at/all.json must be a file in a folder that exists: "
        "make the folder or name another file.\n"
    )


def test_what_is_promised_a_result_file_has_one() -> None:
    assert not CONTRACT & WITHOUT_RESULTS


def test_no_option_is_taken_by_a_part_of_its_name() -> None:
    """A key that is given by `--ke` would stand in a result, where `--key` is left out."""
    with pytest.raises(SystemExit):
        cluster_main(["bench", "--serv", "http://host:1"])
