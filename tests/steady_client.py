"""A client that keeps a number of chats under way until it is told to end; run as a program, by the standard library alone.

    python steady_client.py URL MODEL KEY CONCURRENCY MAX_TOKENS OUTPUT

It writes a line of JSON per finished request into OUTPUT: start and end (seconds since 1970), status (0: no answer), the
answer's completion tokens, and what was said instead of an answer. It ends at a line on its standard input, or its end, and
then waits for the requests under way.
"""

import json
import sys
import threading
import time
import urllib.error
import urllib.request

LIMIT_S = 300


def ask(url: str, model: str, key: str, max_tokens: int) -> dict[str, object]:
    """One request; what its line says."""
    body = {
        "model": model, "messages": [{"role": "user", "content": "Tell a story."}],
        "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0,
    }  # fmt: skip
    request = urllib.request.Request(
        url + "/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    line: dict[str, object] = {"start": time.time(), "status": 0, "tokens": 0, "said": ""}
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
            line |= {"status": answer.status, "tokens": json.load(answer)["usage"]["completion_tokens"]}
    except urllib.error.HTTPError as error:
        line |= {"status": error.code, "said": error.read()[:300].decode(errors="replace")}
    except (OSError, ValueError) as error:
        line |= {"said": f"{type(error).__name__}: {error}"}
    return line | {"end": time.time()}


def main(url: str, model: str, key: str, concurrency: str, max_tokens: str, output: str) -> None:
    stop = threading.Event()
    with open(output, "a", buffering=1) as file:
        lock = threading.Lock()

        def keep_asking() -> None:
            while not stop.is_set():
                line = json.dumps(ask(url, model, key, int(max_tokens)))
                with lock:
                    file.write(line + "\n")

        threads = [threading.Thread(target=keep_asking) for _ in range(int(concurrency))]
        for thread in threads:
            thread.start()
        sys.stdin.readline()
        stop.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
