"""Built-in steps of ensembles: what stands before and behind a model, so that it takes images and texts.

A step is an engine in numpy (`engines.base.Engine`): it has a signature, runs on threads of its own, and whatever runs
an engine runs it. `kinds.build_step` makes one by its name, "mlmesh.NAME" or "mlmesh.NAME:LABEL".
"""
