"""gRPC clients without a sidecar: the same resources, told to the client itself over xDS.

A client dials ``xds:///host:port`` and asks the control plane for the listener of that name. What it gets is what a
sidecar beside it would get, reduced to what gRPC knows. What gRPC does not know is refused for that client, rule by
rule: such calls fail with UNAVAILABLE and a text that names the resource and the field, rather than going where they
should not.

The server side is not offered: an xDS-enabled server of grpcio 1.84 and newer ends its process when a call is answered
with a status alone (an error of a handler, a method that is not there), so any caller could end it. Servers keep their
sidecar.
"""
