"""One engine and its memory decisions: swap or recompute, host block pool, vLLM scheduler, KV connector, server."""
