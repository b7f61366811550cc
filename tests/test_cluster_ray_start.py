"""Goal: a misspelt option of `ray start` is found before any machine is.

Method: our table against Ray's own command; commands of a shell with one fault.
"""

import pytest

from cluster.ray_start import OPTIONS, check_start_command, check_start_options


def test_the_options_are_those_of_rays_own_command() -> None:
    from ray.scripts.scripts import start  # loads Ray

    names = {name for option in start.params for name in (*option.opts, *option.secondary_opts)}
    assert {name.removeprefix("--") for name in names if name.startswith("--")} == OPTIONS


@pytest.mark.parametrize(
    "command",
    [
        "ray stop; ulimit -n 65536; ~/x/.venv/bin/ray start --head --port=6379 --resources='{\"a\": 1}'",
        "ray start --address=$RAY_HEAD_IP:6379 --redis-password=$(cat ~/.redis) && other --prot 1",
        "ray stop --force",
        "echo ray start is next; serve start --prot",
    ],
)
def test_what_is_right_or_not_of_ray_start_passes(command: str) -> None:
    check_start_command("here", command)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("ray start --head --prot=6379", r"^here: --prot is no option of `ray start`: did you mean port\?$"),
        ("x && ray start --num-cpu 4", r"--num-cpu is no option of `ray start`: did you mean num-cpus\?"),
        ("ray start --num_cpus=4", r"--num_cpus is no option of `ray start`: did you mean num-cpus\?"),
        ("ray start --qqq", r"--qqq is no option of `ray start`: remove it or correct its name\.$"),
    ],
)
def test_an_unknown_option_is_named_with_what_is_probably_meant(command: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_start_command("here", command)


def test_parameters_that_are_handed_on_are_held_to_the_same_names() -> None:
    check_start_options("rayStartParams.", {"num-cpus": "0", "block": "true"})
    with pytest.raises(ValueError, match=r"^rayStartParams\.num-cpu is no option"):
        check_start_options("rayStartParams.", {"num-cpu": "0"})
