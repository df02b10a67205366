"""Training on a cluster: a Kubeflow Trainer TrainJob a job, whose pods report back over gRPC."""
