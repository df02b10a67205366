"""The training process: `python -m mlmesh_training.trainer`. Nothing of the service imports what imports torch here."""
