"""Ways to run a model. `base` is the port; each other module is one library."""
