"""Other inference servers, measured beside ours in the same minutes with the same load: see run.py."""
