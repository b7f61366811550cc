"""Settings of the whole product: the `args` of a Serve config file (`import_path: cluster.app:build`).

Rules:
- One place: `serve deploy FILE` and `python -m cluster serve --config FILE` read the same file into these values.
- Frozen, units in names, unknown keys are errors. Every error is one sentence that names the field and the mend.
- Pure: no Ray, no vLLM, no file but the one that is asked for.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.redis_address import RedisAddress
from cluster.replica_settings import ReplicaArgs, Settings
from cluster.settings_errors import refuse_unknown, sentence
from cluster.yaml_text import parse
from cost_service.snapshot import read_fitted

IMPORT_PATH = "cluster.app:build"
INGRESS_NAME = "AdaptiveIngress"
DEFAULT_MODEL = "smollm2-135m-instruct"
HOME_VARIABLE = "ADAPTIVELLM_HOME"
SCHEDULERS = {
    "cpu": "replicas.vllm_scheduler.AdaptiveScheduler",
    "gpu": "replicas.vllm_scheduler.AdaptiveAsyncScheduler",
}
"""CPU engines schedule synchronously, GPU engines ahead of the running step."""

GPU_ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
"""Of engines with our connector: vLLM's second model runner calls it after a step may have overwritten a victim's blocks."""


class ModelArgs(Settings):
    """Which model is served, and under which name."""

    id: str = Field(default=DEFAULT_MODEL, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")
    """Name in the API's `model` field."""

    source: str = Field(default=DEFAULT_MODEL, min_length=1)
    """The default model's name, a folder in Hugging Face layout, or a hub id (`owner/name`)."""


class PreemptionArgs(Settings):
    """What happens to a request that must give way."""

    policy: Literal["stock", "recompute", "swap", "adaptive"] = "adaptive"
    """`stock`: vLLM's own scheduler and no connector."""

    host_pool_bytes: int = Field(default=1 << 30, ge=0)
    """Host memory for swapped-out KV blocks, per worker process; 0 turns swapping off."""

    max_tenant_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the host pool that one tenant's swapped-out requests may hold."""

    guard: bool = True
    """Whether wrong predictions or a loss of throughput make adaptive preemption give way to vLLM's own behaviour."""

    verify_checksums: bool = False
    """Whether a block is loaded only if its bytes in host memory are still those that were saved (CPU replicas only)."""

    costs_file: str | None = None
    """What `python -m cost_service fit` wrote for this model and hardware, to start with; None: what a datasheet says. It is
    read where the application is built."""

    decision_log_folder: str | None = None
    """Folder on the replica's host for a log of every decision on preemption; None: no log."""

    def connector_settings(self) -> dict[str, Any]:
        """What of these the engine's connector reads.

        Raises:
            ValueError: `costs_file` cannot be read, or holds no costs, or those of several models.
        """
        settings = self.model_dump(exclude={"policy", "costs_file"}) | {"preemption": self.policy}
        if self.costs_file is not None:
            settings["cost_snapshot"] = read_fitted(Path(self.costs_file).expanduser()).to_json()
        return settings


class FairnessArgs(Settings):
    """Who of those who wait is admitted next, and what tenants are compared by."""

    admission: Literal["fair", "first-come"] | None = None
    """`fair`: whose tenant was served least for its weight; `first-come`: vLLM's order. None: `fair`, and `first-come` with
    the preemption policy `stock`, which then is vLLM's own scheduler."""

    service: Literal["tokens", "seconds"] = "tokens"
    """What is equalised between tenants: tokens (a computed one of a prompt 1, a generated one 2), or predicted seconds of
    engine time, for which no bound is stated."""


class IngressArgs(Settings):
    """The HTTP side."""

    num_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.2, ge=0)
    max_replicas_per_node: int | None = Field(default=None, ge=1)
    """Ingresses on one node; None: any number. With 1 a lost node takes one at most; more than there are nodes wait."""

    max_surge_percent: int = Field(default=100, ge=0, le=100)
    """As of replicas; ingresses take little room, and without one requests wait for the next."""

    max_ongoing_requests: int = Field(default=4096, ge=1)
    max_body_bytes: int = Field(default=1 << 20, ge=1024)
    max_header_bytes: int = Field(default=16384, ge=1024)
    max_json_depth: int = Field(default=32, ge=4, le=256)


class StateArgs(Settings):
    """Where the product keeps what must survive a restart."""

    directory: str | None = None
    """For models, the first API key, and `state.sqlite`. None: `$ADAPTIVELLM_HOME`, else `~/.adaptivellm`."""

    redis_url: str | None = None
    """`redis://HOST:6379/0`, or `rediss://` for TLS: tenants, fairness and costs lie there, for all nodes of a cluster.
    None: in `state.sqlite`, on the head node."""

    redis_username: str | None = Field(default=None, min_length=1, max_length=128)
    """None: Redis's `default`."""

    redis_password_file: str | None = Field(default=None, min_length=1)
    """File of mode 0600 with the password, on every node."""

    redis_ca_file: str | None = Field(default=None, min_length=1)
    """Certificates that Redis's own is checked against; None: the system's."""

    redis_key_prefix: str = Field(default="adaptivellm:", pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,62}:$")
    """Before the name of every key; clusters that share a Redis have one each."""

    redis_timeout_s: float = Field(default=1.5, ge=0.05, le=30)
    """To connect, and for an answer. Up to 2 the product has caught up 5 s after Redis is back."""

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if self.redis_url is None:
            of_redis = ("redis_username", "redis_password_file", "redis_ca_file")
            if given := [name for name in of_redis if getattr(self, name) is not None]:
                raise ValueError(f"redis_url is missing beside {given[0]}: add it, or remove {given[0]}")
            return self
        try:
            address = RedisAddress.parse(self.redis_url)
        except ValueError as error:
            raise ValueError(f"redis_url {error}") from None
        if self.redis_username is not None and self.redis_password_file is None:
            raise ValueError("redis_password_file is missing beside redis_username: add it")
        if self.redis_ca_file is not None and not address.is_encrypted:
            raise ValueError("redis_ca_file is of no use without TLS: write rediss:// in redis_url, or remove it")
        if self.redis_key_prefix.upper().startswith("RAY"):
            raise ValueError("redis_key_prefix must not begin with RAY, as Ray's own keys do: choose another one")
        return self

    @property
    def path(self) -> Path:
        return Path(self.directory).expanduser() if self.directory else default_home()

    def resolved(self) -> "StateArgs":
        """The same with the directory as it is here and now, to be sent to other processes."""
        return self.model_copy(update={"directory": str(self.path)})


class AppArgs(Settings):
    """All settings of one application."""

    model: ModelArgs = ModelArgs()
    replicas: ReplicaArgs
    preemption: PreemptionArgs = PreemptionArgs()
    fairness: FairnessArgs = FairnessArgs()
    ingress: IngressArgs = IngressArgs()
    state: StateArgs = StateArgs()

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if self.preemption.policy == "stock" and self.fairness.service != "tokens":
            raise ValueError("fairness.service must be tokens with preemption.policy stock: leave it out")
        if self.replicas.autoscaling is not None and not self.uses_own_scheduler:
            raise ValueError(
                "replicas.autoscaling needs our scheduler, which tells what waits: use another preemption.policy than "
                "stock, or fairness.admission fair"
            )
        return self

    @property
    def uses_own_scheduler(self) -> bool:
        """Whether engines have our scheduler; else they have vLLM's own, which tells nothing."""
        return self.preemption.policy != "stock" or self.admission != "first-come"

    @property
    def admission(self) -> Literal["fair", "first-come"]:
        """The order of admission at start."""
        return self.fairness.admission or ("first-come" if self.preemption.policy == "stock" else "fair")

    def connector_settings(self) -> dict[str, Any]:
        """What the engine's connector and scheduler read (`replicas.config.SwapConfig`).

        Raises:
            ValueError: See `PreemptionArgs.connector_settings`.
        """
        return self.preemption.connector_settings() | {"admission": self.admission, "service": self.fairness.service}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], place: str = "") -> "AppArgs":
        """Build from plain values (YAML).

        Args:
            place: Where they stand, with a point at the end, as errors name it.

        Raises:
            ValueError: One sentence that names the first bad field and the mend.
        """
        try:
            return cls.model_validate(dict(mapping))
        except ValidationError as error:
            raise ValueError(sentence(error, cls, place)) from None


class DeploymentArgs(Settings):
    """An entry of `applications[0].deployments`: what Serve changes without replacing anything that runs."""

    name: str
    num_replicas: int = Field(ge=1, le=1000)


class ServeFile(Settings):
    """A Serve config file with one application of ours."""

    args: AppArgs
    """With the number of replicas that `deployments` gives, where it does."""

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=1, le=65535)
    route_prefix: str = "/"
    name: str = Field(default="adaptivellm", min_length=1)
    proxy_location: Literal["Disabled", "HeadOnly", "EveryNode"] = "EveryNode"

    @field_validator("route_prefix")
    @classmethod
    def _is_path(cls, prefix: str) -> str:
        if not prefix.startswith("/") or (prefix != "/" and prefix.endswith("/")) or {"{", "}"} & set(prefix):
            raise ValueError("it must begin with /, not end with one after a name, and have no braces")
        return prefix


PLACES = {
    "proxy_location": "", "host": "http_options.", "port": "http_options.", "route_prefix": "applications[0].",
    "name": "applications[0].",
}  # fmt: skip
"""Field of `ServeFile` to where it stands in the file."""


def default_home() -> Path:
    """Folder for models, keys and state: `$ADAPTIVELLM_HOME`, else `~/.adaptivellm`."""
    return Path(os.environ.get(HOME_VARIABLE) or "~/.adaptivellm").expanduser()


def load(path: Path) -> ServeFile:
    """Read a Serve config file.

    Raises:
        ValueError: The file is missing, not YAML, not one application of ours, or has a bad setting.
    """
    return from_document(_read(path), f"Config file {path}")


def from_document(document: Any, what: str, place: str = "") -> ServeFile:
    """Read what a Serve config holds, a file's or the one inside a RayService.

    Args:
        what: What it is, as errors name it.
        place: Where it stands, with a point at the end; "" where it is a file.

    Raises:
        ValueError: It is not one application of ours, or has a bad setting.
    """
    applications = document.get("applications") if isinstance(document, dict) else None
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ValueError(f"{what} must have exactly one entry under applications.")
    application = applications[0]
    inside = f"{place}applications[0]."
    if application.get("import_path") != IMPORT_PATH:
        raise ValueError(f"{inside}import_path must be {IMPORT_PATH}.")
    args, http = application.get("args") or {}, document.get("http_options") or {}
    for name, settings in ((f"{inside}args", args), (f"{place}http_options", http)):
        if not isinstance(settings, dict):
            raise ValueError(f"{name} must be a mapping of settings.")
    refuse_unknown(document, {"proxy_location", "http_options", "applications"}, place)
    refuse_unknown(http, {"host", "port"}, f"{place}http_options.")
    refuse_unknown(application, {"name", "route_prefix", "import_path", "args", "deployments"}, inside)
    made = _scaled(AppArgs.from_mapping(args, f"{inside}args."), application.get("deployments"), f"{inside}deployments")
    values = {**document, **http, **application}
    try:
        return ServeFile.model_validate({"args": made} | {key: values[key] for key in PLACES if key in values})
    except ValidationError as error:
        raise ValueError(sentence(error, ServeFile, place + PLACES[str(error.errors()[0]["loc"][0])])) from None


def _scaled(args: AppArgs, deployments: Any, place: str) -> AppArgs:
    """The settings with the number of replicas that `deployments` gives."""
    if not isinstance(deployments, list | None):
        raise ValueError(f"{place} must be a list of names with num_replicas.")
    replicas = f"AdaptiveLLMServer:{args.model.id.replace('/', '--').replace('.', '_')}"  # as Ray names it
    for index, deployment in enumerate(deployments or []):
        here = f"{place}[{index}]."
        try:
            given = DeploymentArgs.model_validate(deployment)
        except ValidationError as error:
            raise ValueError(sentence(error, DeploymentArgs, here)) from None
        if given.name == INGRESS_NAME:
            raise ValueError(
                f"{here}name is {INGRESS_NAME}, by whose number caps are shared: use args.ingress.num_replicas."
            )
        if given.name != replicas:
            raise ValueError(f"{here}name must be {replicas}: that is the deployment of replicas.")
        if index:
            raise ValueError(f"{here}name stands twice: remove one.")
        if args.replicas.autoscaling is not None:
            raise ValueError(f"{here}num_replicas has no meaning with args.replicas.autoscaling: remove one.")
        scaled = args.replicas.model_copy(update={"num_replicas": given.num_replicas})
        args = args.model_copy(update={"replicas": scaled})
    return args


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"Config file {path} does not exist: give --config the path of a Serve config file.")
    mend = "compare it with manifests/serve_local.yaml"
    try:
        documents = parse(path.read_text(), f"Config file {path}", mend)
    except OSError as error:
        raise ValueError(f"Config file {path} cannot be read ({error.strerror}): correct its permissions.") from None
    except UnicodeDecodeError:
        raise ValueError(f"Config file {path} is not valid YAML: {mend}.") from None
    if len(documents) > 1:
        raise ValueError(f"Config file {path} holds {len(documents)} documents: leave one.")
    return documents[0] if documents else None
