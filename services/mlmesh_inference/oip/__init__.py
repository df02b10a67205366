"""The Open Inference Protocol: `requests` reads, `replies` writes, `infer` and `stream` run, `describe` tells."""
