"""The commands, one module a group: options in, one coroutine, a renderable or JSON out."""
