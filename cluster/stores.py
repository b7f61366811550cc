"""The product's one store, as the settings say: Redis where `state.redis_url` is set, else a SQLite file."""

from pathlib import Path

from cluster.config import StateArgs
from cluster.redis_address import RedisAddress, read_password, refuse_if_exposed
from cluster.redis_store import RedisStore
from cluster.state import SqliteStore
from cost_service.store import Store

FILE = "state.sqlite"


def check_store(state: StateArgs) -> None:
    """Refuse what can be known to be wrong with the settings of the store before anything starts; connects to nothing.

    Raises:
        ValueError: One sentence with the setting and the mend.
    """
    if state.redis_url is None:
        return
    if state.redis_password_file is not None:
        read_password(Path(state.redis_password_file).expanduser())
    if state.redis_ca_file is not None and not Path(state.redis_ca_file).expanduser().is_file():
        raise ValueError(
            f"state.redis_ca_file: there is no file {state.redis_ca_file}: put the CA's certificate there."
        )
    refuse_if_exposed(RedisAddress.parse(state.redis_url), has_password=state.redis_password_file is not None)


def open_store(state: StateArgs) -> Store:
    """Return the store. A Redis that is away is an error of the calls that need it, not of this one.

    Raises:
        OSError: The folder of the file cannot be written.
    """
    return SqliteStore(state.path / FILE) if state.redis_url is None else RedisStore(state)
