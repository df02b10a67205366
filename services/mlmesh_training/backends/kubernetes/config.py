"""Environment variables of training on a cluster, beside those of mlmesh_training.config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlmesh_runtime.config import ConfigError, Variable, split_address
from mlmesh_training.backends.kubernetes.backend import KubernetesLimits
from mlmesh_training.backends.kubernetes.objects import Placement

VARIABLES: tuple[Variable, ...] = (
    Variable(
        name="MLMESH_TRAINING_KUBERNETES_IMAGE",
        default="",
        meaning="Image of the pods of jobs, with mlmesh[training] in it; MLMESH_TRAINING_BACKEND=kubernetes needs it.",
    ),
    Variable(
        name="MLMESH_TRAINING_KUBERNETES_NAMESPACE",
        default="",
        meaning="Namespace of the TrainJobs; empty takes POD_NAMESPACE.",
    ),
    Variable(
        name="MLMESH_TRAINING_KUBERNETES_RUNTIME",
        default="torch-distributed",
        meaning="Kubeflow's ClusterTrainingRuntime of the TrainJobs, or with namespaced/NAME a TrainingRuntime.",
    ),
    Variable(
        name="MLMESH_TRAINING_KUBERNETES_SERVICE_ACCOUNT",
        default="trainer",
        meaning="Service account of the pods of jobs, their identity in the mesh.",
    ),
    Variable(
        name="MLMESH_TRAINING_KUBERNETES_QUEUE",
        default="",
        meaning="Kueue's LocalQueue that admits the TrainJobs; empty where Kueue does not.",
    ),
    Variable(
        name="MLMESH_TRAINING_KUBERNETES_TARGET",
        default="training.mlmesh.svc.cluster.local:9000",
        meaning="This service as the pods of jobs reach it, host:port.",
    ),
    Variable(
        name="MLMESH_TRAINING_KUBERNETES_PAUSE_S",
        default="60",
        meaning="Seconds between asking pods for a checkpoint and suspending the TrainJob whether it came or not.",
    ),
    Variable(
        name="MLMESH_TRAINING_KUBERNETES_SILENCE_S",
        default="1800",
        meaning="Running pods that report nothing for this many seconds hang: the TrainJob is deleted and tried again.",
    ),
    Variable(
        name="MLMESH_TRAINING_KUBERNETES_FILE_BYTES_MAX",
        default="17179869184",
        meaning="Largest checkpoint or model that a pod may bring, bytes.",
    ),
    Variable(
        name="MLMESH_TRAINING_KUBECONFIG",
        default="",
        meaning="kubeconfig for a training service outside the cluster; empty takes the pod's service account.",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesSettings:
    """Where pods run and what bounds them; the table above says what each means."""

    placement: Placement
    limits: KubernetesLimits
    file_bytes_max: int
    kubeconfig: str

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> KubernetesSettings:
        """Read and check. Raises ConfigError that names the first wrong variable."""
        text = {variable.name: environ.get(variable.name, "").strip() or variable.default for variable in VARIABLES}

        def of(name: str) -> str:
            return text[f"MLMESH_TRAINING_KUBERNETES_{name}"]

        def number(name: str) -> float:
            try:
                value = float(of(name))
            except ValueError:
                value = 0.0
            if not 0 < value < 2**53:
                raise ConfigError(f"MLMESH_TRAINING_KUBERNETES_{name}: expected a number above 0, got {of(name)!r}")
            return value

        namespace = of("NAMESPACE") or environ.get("POD_NAMESPACE", "").strip()
        if not namespace:
            raise ConfigError("MLMESH_TRAINING_KUBERNETES_NAMESPACE: not set, and POD_NAMESPACE neither")
        if not of("IMAGE"):
            raise ConfigError("MLMESH_TRAINING_KUBERNETES_IMAGE: not set; pods of jobs need an image")
        try:
            split_address(of("TARGET"))
        except ValueError as error:
            raise ConfigError(f"MLMESH_TRAINING_KUBERNETES_TARGET: {error}") from None
        return cls(
            placement=Placement(
                namespace=namespace,
                image=of("IMAGE"),
                runtime=of("RUNTIME"),
                service_account=of("SERVICE_ACCOUNT"),
                target=of("TARGET"),
                queue=of("QUEUE"),
            ),
            limits=KubernetesLimits(pause_s=number("PAUSE_S"), silence_s_max=number("SILENCE_S")),
            file_bytes_max=int(number("FILE_BYTES_MAX")),
            kubeconfig=text["MLMESH_TRAINING_KUBECONFIG"],
        )
