"""`python -m cluster check`: what is wrong with manifests, before anything is started from them.

Rules:
- What a file is shows in its content: a Serve config (`applications`), a cluster file of `ray up` (`provider`), or objects
  of Kubernetes, of which a RayService is looked into.
- Nothing is started, asked or written; one sentence per file, with the mend.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from cluster.config import ServeFile, from_document
from cluster.kuberay_manifest import check_ray_service
from cluster.kubernetes_objects import check_object
from cluster.ray_up_manifest import check_ray_up
from cluster.redis_address import RedisAddress, addresses_of, refuse_if_exposed
from cluster.yaml_text import parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="Serve configs, files for ray up, RayServices"
    )
    parser.add_argument("--folder", type=Path, default=Path(), help="where `ray up` will run (default: here)")


def main(options: argparse.Namespace) -> int:
    """Check all files; 0, or 2 when one is refused."""
    refused = False
    for path in options.files:
        try:
            print(f"{path}: {check(path, options.folder)}.")
        except ValueError as error:
            print(f"Error: {path}: {error}", file=sys.stderr)
            refused = True
        except RuntimeError as error:  # `~name` of an unknown user
            print(f"Error: {path}: {error}.", file=sys.stderr)
            refused = True
    return 2 if refused else 0


def check(path: Path, folder: Path) -> str:
    """Hold a file to the rules of what it is; return what that is.

    Args:
        folder: Where `ray up` will run.

    Raises:
        ValueError: One sentence with the mend.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"the file cannot be read ({error.strerror}): correct its name or its permissions.") from None
    except ValueError:
        raise ValueError("the file is no text: compare it with those in manifests/.") from None
    documents = parse(text, "the file", "compare it with those in manifests/")
    found = [_check_document(each, folder) for each in documents]
    if not found:
        raise ValueError("the file is empty: give a manifest.")
    return ", ".join(found)


def _check_document(document: Any, folder: Path) -> str:
    if not isinstance(document, dict):
        raise ValueError("the file must hold settings: compare it with those in manifests/.")
    if "applications" in document:
        _check_redis(from_document(document, "the file"))
        return "a Serve config"
    if "provider" in document or "cluster_name" in document:
        check_ray_up(document, folder)
        return "a cluster for ray up"
    if document.get("kind") == "RayService":
        _check_redis(check_ray_service(document))
        return "a RayService"
    if "kind" in document and "apiVersion" in document:
        check_object(document)
        return f"a {document['kind']} (not looked into)"
    raise ValueError("the file is no manifest that is known here: it has no applications, provider or kind.")


def _check_redis(file: ServeFile) -> None:
    """The rule of settings, as far as it can be told from here: a name that only nodes know is theirs to check."""
    state = file.args.state
    if state.redis_url is None:
        return
    address, has_password = RedisAddress.parse(state.redis_url), state.redis_password_file is not None
    if not has_password or addresses_of(address.host):
        refuse_if_exposed(address, has_password=has_password)
