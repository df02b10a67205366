"""Findings of the analysis, with the codes, names and severities of `istioctl analyze`.

https://istio.io/latest/docs/reference/config/analysis/
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.problems import At

Level = Literal["Error", "Warning", "Info"]
LEVELS: tuple[Level, ...] = ("Info", "Warning", "Error")
"""The mildest first."""

ON_THE_LAPTOP = "MLM0001"
"""Our own code: Istio takes it, and the laptop mesh refuses it by name."""

CODES: dict[str, tuple[str, Level]] = {
    "IST0002": ("Deprecated", "Warning"),
    "IST0101": ("ReferencedResourceNotFound", "Error"),
    "IST0102": ("NamespaceNotInjected", "Info"),
    "IST0106": ("SchemaValidationError", "Error"),
    "IST0107": ("MisplacedAnnotation", "Warning"),
    "IST0108": ("UnknownAnnotation", "Warning"),
    "IST0109": ("ConflictingMeshGatewayVirtualServiceHosts", "Error"),
    "IST0110": ("ConflictingSidecarWorkloadSelectors", "Error"),
    "IST0111": ("MultipleSidecarsWithoutWorkloadSelectors", "Error"),
    "IST0112": ("VirtualServiceDestinationPortSelectorRequired", "Error"),
    "IST0116": ("DeploymentAssociatedToMultipleServices", "Warning"),
    "IST0118": ("PortNameIsNotUnderNamingConvention", "Info"),
    "IST0123": ("NamespaceMultipleInjectionLabels", "Warning"),
    "IST0125": ("InvalidAnnotation", "Warning"),
    "IST0127": ("NoMatchingWorkloadsFound", "Warning"),
    "IST0128": ("NoServerCertificateVerificationDestinationLevel", "Warning"),
    "IST0129": ("NoServerCertificateVerificationPortLevel", "Warning"),
    "IST0130": ("VirtualServiceUnreachableRule", "Warning"),
    "IST0131": ("VirtualServiceIneffectiveMatch", "Info"),
    "IST0132": ("VirtualServiceHostNotFoundInGateway", "Warning"),
    "IST0133": ("SchemaWarning", "Warning"),
    "IST0134": ("ServiceEntryAddressesRequired", "Warning"),
    "IST0135": ("DeprecatedAnnotation", "Info"),
    "IST0137": ("DeploymentConflictingPorts", "Warning"),
    "IST0138": ("GatewayDuplicateCertificate", "Warning"),
    "IST0140": ("IngressRouteRulesNotAffected", "Warning"),
    "IST0144": ("InvalidApplicationUID", "Warning"),
    "IST0145": ("ConflictingGateways", "Error"),
    "IST0149": ("JwtClaimBasedRoutingWithoutRequestAuthN", "Error"),
    "IST0150": ("ExternalNameServiceTypeInvalidPortName", "Warning"),
    "IST0151": ("EnvoyFilterUsesRelativeOperation", "Warning"),
    "IST0152": ("EnvoyFilterUsesReplaceOperationIncorrectly", "Error"),
    "IST0153": ("EnvoyFilterUsesAddOperationIncorrectly", "Error"),
    "IST0154": ("EnvoyFilterUsesRemoveOperationIncorrectly", "Error"),
    "IST0155": ("EnvoyFilterUsesRelativeOperationWithProxyVersion", "Warning"),
    "IST0157": ("InvalidTelemetryProvider", "Warning"),
    "IST0159": ("ConflictingTelemetryWorkloadSelectors", "Error"),
    "IST0160": ("MultipleTelemetriesWithoutWorkloadSelectors", "Error"),
    "IST0162": ("GatewayPortNotDefinedOnService", "Warning"),
    "IST0165": ("ReferencedInternalGateway", "Warning"),
    "IST0166": ("IneffectiveSelector", "Warning"),
    "IST0171": ("NegativeConditionStatus", "Warning"),
    "IST0173": ("DestinationRuleSubsetNotSelectPods", "Error"),
    "IST0174": ("UnknownDestinationRuleHost", "Warning"),
    "IST0177": ("ConflictingServiceEntryProtocol", "Warning"),
    ON_THE_LAPTOP: ("NotOnTheLaptop", "Info"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One finding about a resource. ``offline``: `istioctl analyze --use-kube=false` has it, too."""

    code: str
    meta: Meta
    at: At
    text: str
    offline: bool = False

    @property
    def name(self) -> str:
        """Istio's name of the finding."""
        return CODES[self.code][0]

    @property
    def level(self) -> Level:
        """Severity."""
        return CODES[self.code][1]

    @property
    def origin(self) -> str:
        """The resource, as istioctl names it: "Kind namespace/name"."""
        kind = self.meta.kind.removeprefix("Kubernetes")
        return f"{kind} {self.meta.namespace}/{self.meta.name}" if self.meta.namespace else f"{kind} {self.meta.name}"

    @property
    def warning(self) -> str:
        """What is told by the way, as other problems are: to a person who did not ask for an analysis."""
        where = f"{self.at.source}:{self.at.line}" if self.at.line else self.at.source
        return f"{where}: {self.origin}: {self.text} [{self.code}]"

    def __str__(self) -> str:
        where = f"{self.at.source}:{self.at.line}" if self.at.line else self.at.source
        return f"{self.level} [{self.code}] ({self.origin}) {where}: {self.text}"
