"""The product's store in Redis: one hash for each collection, one field for each document.

Data flow: a document -> a record (`cluster.document`) -> `HSET PREFIX:COLLECTION NAME RECORD`.

Rules:
- Made without a connection: a Redis that is away is a `ConnectionError` of the call that needs it, whatever else goes wrong
  an `OSError`, in one sentence. Calls end within a few times `redis_timeout_s`.
- One connection, one call at a time. After an error it is closed, and the next call begins with a handshake: Redis has then
  run or dropped all that was sent before, so that no late write of ours overtakes a newer one.
- A change is atomic between processes: `WATCH` and `MULTI`, tried again a bounded number of times. Nothing else is tried
  again here: whether a write whose answer was lost was done, only its owner can tell.
- The commands are few, so that an ACL can allow no more (docs/operate.md): none lists or deletes keys.
- Values are bounded before they are read. The password is read from its file for every connection, and travels nowhere.
"""

import json
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.retry import Retry

from cluster.config import StateArgs
from cluster.document import MAX_DOCUMENT_BYTES, DamageLog, from_record, to_record
from cluster.redis_address import RedisAddress, read_password

MAX_RECORD_BYTES = MAX_DOCUMENT_BYTES + 1024
MAX_DOCUMENTS = 200_000
"""Of one collection."""

READ_BYTES = 8 << 20
"""That are asked for at once, if there are several documents."""

ATTEMPTS = 100
"""To change a document that others change at the same time."""


class RedisStore:
    """Documents by collection and name, for all nodes of a cluster (`cost_service.store.Store`)."""

    is_shared = True

    def __init__(self, state: StateArgs) -> None:
        """Take the settings; nothing is connected, and no file is read."""
        assert state.redis_url is not None, "no address"
        self._state, self._address = state, RedisAddress.parse(state.redis_url)
        self._lock = threading.Lock()
        self._client: Any = None  # of types that say that every answer may be a coroutine
        self._damage = DamageLog(str(self._address))

    def __reduce__(self) -> tuple[type["RedisStore"], tuple[StateArgs]]:
        """Travel as settings, which hold no secret."""
        return (RedisStore, (self._state,))

    def load(self, collection: str) -> Mapping[str, Any]:
        """See `Store.load`.

        Raises:
            OSError: Redis does not answer, or does not let us read.
        """
        with self._connection() as client:
            texts = dict(self._read(client, collection))
        documents = ((name, self._parsed(f"{collection}/{name}", text)) for name, text in texts.items())
        return {name: document for name, found in documents for document in found}

    def names(self, collection: str) -> frozenset[str]:
        """See `Store.names`.

        Raises:
            OSError: Redis does not answer, or does not let us read.
        """
        with self._connection() as client:
            names = frozenset(name for name, _ in self._read(client, collection))
        for name in names:
            self._damage.whole(f"{collection}/{name}")
        return names

    def save(self, collection: str, name: str, document: Any) -> None:
        """See `Store.save`.

        Raises:
            OSError: Redis does not answer, is full, or does not let us write; the document may be stored all the same.
        """
        record = to_record(document)
        with self._connection() as client:
            client.hset(self._key(collection), name, record)

    def update(self, collection: str, name: str, change: Callable[[Any | None], Any]) -> Any:
        """See `Store.update`.

        Raises:
            OSError: As in `save`; or others change the collection all the time.
        """
        key = self._key(collection)
        with self._connection() as client:
            for attempt in range(ATTEMPTS):
                with client.pipeline() as pipeline:
                    pipeline.watch(key)
                    document = change(self._read_one(pipeline, collection, name))
                    record = to_record(document)
                    pipeline.multi()
                    pipeline.hset(key, name, record)
                    try:
                        pipeline.execute()
                    except redis.WatchError:
                        time.sleep(random.uniform(0.0, 0.001 * min(attempt + 1, 20)))
                        continue
                return document
        raise OSError(f"{collection} in {self._address} is changed by others all the time: try again.")

    def _read(self, client: Any, collection: str) -> Iterator[tuple[str, bytes]]:
        """Names and texts of the documents that are whole."""
        key = self._key(collection)
        fields = cast(list[bytes], client.hkeys(key))
        if len(fields) > MAX_DOCUMENTS:
            self._damage.damaged(collection, f"of its {len(fields)} documents only {MAX_DOCUMENTS} are read")
            fields = sorted(fields)[:MAX_DOCUMENTS]
        pipeline = client.pipeline(transaction=False)
        for field in fields:
            pipeline.hstrlen(key, field)
        batch: list[bytes] = []
        batch_bytes = 0
        for field, num_bytes in zip(fields, pipeline.execute(), strict=True):
            if num_bytes > MAX_RECORD_BYTES:
                self._too_long(collection, field, num_bytes)
                continue
            if batch and batch_bytes + num_bytes > READ_BYTES:
                yield from self._read_batch(client, collection, batch)
                batch, batch_bytes = [], 0
            batch.append(field)
            batch_bytes += num_bytes
        if batch:
            yield from self._read_batch(client, collection, batch)

    def _read_batch(self, client: Any, collection: str, fields: list[bytes]) -> Iterator[tuple[str, bytes]]:
        for field, record in zip(fields, client.hmget(self._key(collection), fields), strict=True):
            if record is not None and (text := self._whole(collection, field, record)) is not None:
                yield field.decode(), text

    def _read_one(self, pipeline: Any, collection: str, name: str) -> Any | None:
        key, field = self._key(collection), name.encode()
        num_bytes = pipeline.hstrlen(key, name)
        if num_bytes > MAX_RECORD_BYTES:
            self._too_long(collection, field, num_bytes)
            return None
        record = pipeline.hget(key, name)
        text = None if record is None else self._whole(collection, field, record)
        return next(iter(() if text is None else self._parsed(f"{collection}/{name}", text)), None)

    def _whole(self, collection: str, field: bytes, record: bytes) -> bytes | None:
        """The text in a record, or None, which is said."""
        place = f"{collection}/{field.decode(errors='backslashreplace')}"
        try:
            field.decode()
            return from_record(record)
        except UnicodeDecodeError:
            self._damage.damaged(place, "its name is no text")
        except ValueError as error:
            self._damage.damaged(place, str(error))
        return None

    def _parsed(self, place: str, text: bytes) -> tuple[Any, ...]:
        """The document in a text; none where it is no JSON, which is said."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):  # its checksum is right: whoever wrote it was no store of ours
            self._damage.damaged(place, "its document is no JSON")
            return ()
        self._damage.whole(place)
        return (document,)

    def _too_long(self, collection: str, field: bytes, num_bytes: int) -> None:
        place = f"{collection}/{field.decode(errors='backslashreplace')}"
        self._damage.damaged(place, f"its {num_bytes} bytes are more than {MAX_RECORD_BYTES}")

    def _key(self, collection: str) -> str:
        return self._state.redis_key_prefix + collection

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        with self._lock:
            try:
                if self._client is None:
                    self._client = self._connect()
                yield self._client
            except redis.RedisError as error:
                if self._client is not None:
                    self._client.connection_pool.disconnect()
                raise self._problem(error) from None

    def _connect(self) -> redis.Redis:
        state, address = self._state, self._address
        options: dict[str, Any] = {
            "host": address.host, "port": address.port, "db": address.database, "max_connections": 1,
            "socket_timeout": state.redis_timeout_s, "socket_connect_timeout": state.redis_timeout_s,
            # No kind of error is tried again, and none is taken for a change by others that `update` would try again.
            "retry": Retry(NoBackoff(), 0, supported_errors=()), "protocol": 2,
        }  # fmt: skip
        if state.redis_password_file is not None:
            options["credential_provider"] = _PasswordFile(state)
        if address.is_encrypted:
            options |= {
                "connection_class": redis.SSLConnection, "ssl_cert_reqs": "required", "ssl_check_hostname": True,
                "ssl_min_version": ssl.TLSVersion.TLSv1_2,
            }  # fmt: skip
            if state.redis_ca_file is not None:
                options["ssl_ca_certs"] = str(Path(state.redis_ca_file).expanduser())
        return redis.Redis(connection_pool=redis.ConnectionPool(**options))

    def _problem(self, error: redis.RedisError) -> OSError:
        if isinstance(error, _NoPasswordError):
            return OSError(str(error))
        kind = OSError
        if isinstance(error, redis.AuthenticationError):
            problem = "does not know us: correct state.redis_username, or what is in state.redis_password_file"
        elif isinstance(error, redis.exceptions.NoPermissionError):
            problem = "allows its user too little: compare its ACL with the one in docs/operate.md"
        elif isinstance(error, redis.exceptions.OutOfMemoryError):
            problem = "is full: raise its maxmemory, or remove what else lies there"
        elif isinstance(error, redis.ConnectionError | redis.TimeoutError):
            kind, problem = ConnectionError, "does not answer: start it, or correct state.redis_url"
        else:
            problem = "does not do what it is asked"
        return kind(f"The Redis at {self._address} {problem} ({' '.join(str(error).split())[:200]}).")


class _NoPasswordError(redis.AuthenticationError):
    """The password's file cannot be used, as the text says."""


class _PasswordFile(CredentialProvider):
    """Reads the password for every connection anew, so that it can be changed while we run."""

    def __init__(self, state: StateArgs) -> None:
        self._state = state

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        assert self._state.redis_password_file is not None, "no file"
        try:
            password = read_password(Path(self._state.redis_password_file).expanduser())
        except ValueError as error:
            raise _NoPasswordError(str(error)) from None
        return (password,) if self._state.redis_username is None else (self._state.redis_username, password)
