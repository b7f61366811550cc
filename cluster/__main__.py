"""`python -m cluster COMMAND`: one entry for everything a user does. Commands import what they need when they run."""

import argparse
import importlib
import sys

from cost_service.result_file import check_json_file

COMMANDS = {
    "serve": ("cluster.serve", "start Ray on this machine and serve the model until Ctrl-C"),
    "check": ("cluster.check", "refuse manifests that would not start, or not as they are meant"),
    "status": ("cluster.status", "show the replicas of a running application"),
    "costs": ("cluster.costs", "show what the cost service has learned, and what it predicts"),
    "tenants": ("cluster.tenants", "add, list, weigh, limit and revoke tenants and their keys"),
    "state": ("cluster.backup", "back up and restore everything that is stored"),
    "policy": ("cluster.policy", "let running replicas follow another preemption policy"),
    "replay": ("cluster.replay", "let the policies decide again what a decision log holds"),
    "calibrate": ("cluster.calibrate", "measure what preemptions of a model cost on this machine"),
    "simulate": ("cluster.simulate", "compare preemption policies on many simulated replicas, from a trace"),
    "bench": ("cluster.bench", "compare preemption policies with real engines on this machine"),
    "validate": ("cluster.validate", "compare the simulator with what real engines were recorded to do"),
    "report": ("cluster.report", "write a page (HTML) of what bench or simulate found"),
    "bench-link": ("cluster.bench_link", "compare preemption policies over simulated links to host memory"),
    "bench-replicas": (
        "cluster.bench_replicas",
        "fairness across several real engines, with and without the cluster's counters",
    ),
    "bench-drift": ("cluster.bench_drift", "how soon costs are right again after the link to host memory has changed"),
    "bench-fairness-simulated": (
        "cluster.bench_fairness_simulated",
        "fairness across simulated replicas: gap, bound, shares",
    ),
    "bench-simulation": (
        "cluster.bench_simulation",
        "how many requests a second the simulator serves, and in how much memory",
    ),
    "bench-decision": (
        "cluster.bench_decision",
        "what one decision of an engine or router costs, in microseconds",
    ),
    "bench-fairness-rpc": ("cluster.bench_fairness_rpc", "how many exchanges a second the fairness actor takes"),
    "bench-fairness-actor": (
        "cluster.bench_fairness",
        "how many reports of replicas the fairness scheduler merges a second",
    ),
    "bench-http": ("cluster.bench_http", "compare this endpoint with plain vLLM's server over HTTP"),
}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m cluster", description="AdaptiveLLM")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        # No abbreviations: what is told of a command knows options by their names (`bench_command.command_line`).
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if arguments[:1] == [name]:  # the others' modules are not needed
            importlib.import_module(module).add_arguments(command)
    options = parser.parse_args(arguments)
    try:
        # Before any command begins: nothing is measured, and no key made, whose result could not be kept.
        check_json_file(getattr(options, "json", None))
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return int(importlib.import_module(COMMANDS[options.command][0]).main(options))


if __name__ == "__main__":
    sys.exit(main())
