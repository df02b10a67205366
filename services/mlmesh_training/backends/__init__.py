"""Where a job's training runs. `base` is the port; each other module is one kind of place."""
