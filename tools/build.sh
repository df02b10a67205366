#!/usr/bin/env bash
# Gets the programs that some tests use: built with Go at pinned versions into .tools/bin, servers from the distribution.
# Quick when they are there already.
# With arguments, builds only those: tools/build.sh grpcurl
set -euo pipefail
cd "$(dirname "$0")/.."

GRPCURL=v1.9.3
KUSTOMIZE=v5.8.1
ISTIOCTL=$(awk '$1 == "istio.io/istio" { print $2 }' tools/go/go.mod)
CRDSERVER=$(awk '$1 == "k8s.io/apiextensions-apiserver" { print $2 }' tools/go/go.mod)
TRAINER_CRDS=v2.3.0
SPIRE=v1.13.3

bin=$PWD/.tools/bin
logs=$PWD/.tools/logs
mkdir -p "$bin" "$logs"

# Programs in Python, each in an environment of its own, which its versions would not share with ours: OpenStack Swift,
# a real S3 server; MLflow, to import from; the model-signing tool; the clients of KServe and MLServer.
ENVIRONMENTS="swift mlflow model-signing kserve mlserver"
environment() { # name
  local python stamp uv
  stamp=$PWD/.tools/$1/.$(sha256sum "tools/$1.txt" | cut -c 1-16)
  if [[ -e $stamp ]]; then
    echo "tools: $1 is there"
    return 0
  fi
  python=$(command -v .venv/bin/python || command -v python3)
  echo "tools: installing $1 into .tools/$1 (log in .tools/logs/$1.log)"
  # uv takes seconds where pip takes minutes.
  uv=$(command -v .venv/bin/uv || command -v uv || true)
  if ! { rm -rf ".tools/$1" && "$python" -m venv ".tools/$1" && if [[ -n $uv ]]; then
    "$uv" pip install --python ".tools/$1/bin/python" --requirement "tools/$1.txt"
  else
    ".tools/$1/bin/pip" install --disable-pip-version-check --requirement "tools/$1.txt"
  fi; } >"$logs/$1.log" 2>&1; then
    echo "tools: $1 could not be installed; its tests will skip. The log ends:" >&2
    tail -n 3 "$logs/$1.log" >&2
    return 1
  fi
  touch "$stamp"
}

failed=0
others=0
for name in "${@:-all}"; do
  [[ " $ENVIRONMENTS " == *" $name "* ]] || others=1
done
for name in $ENVIRONMENTS; do
  if [[ $# -eq 0 || " $* " == *" $name "* ]]; then
    environment "$name" || failed=1
  fi
done
[[ $others -eq 1 ]] || exit $failed

if ! command -v go >/dev/null; then
  echo "tools: Go is not installed, so grpcurl, kustomize, istioctl, istiod-memory and crdserver cannot be built; their tests will skip." >&2
  exit 1
fi

install_module() { # name, module@version
  GOBIN=$bin CGO_ENABLED=0 go install -trimpath -ldflags='-s -w' "$2"
}

build_grpcurl() { install_module grpcurl "github.com/fullstorydev/grpcurl/cmd/grpcurl@$GRPCURL"; }

build_kustomize() { install_module kustomize "sigs.k8s.io/kustomize/kustomize/v5@$KUSTOMIZE"; }

build_istioctl() {
  (cd tools/go && CGO_ENABLED=0 go build -mod=readonly -trimpath \
    -ldflags="-s -w -X istio.io/istio/pkg/version.buildVersion=$ISTIOCTL" \
    -o "$bin/istioctl" istio.io/istio/istioctl/cmd/istioctl)
}

# Istio's own control plane, which the laptop mesh is compared with and can be driven by.
build_pilot-discovery() {
  (cd tools/go && CGO_ENABLED=0 go build -mod=readonly -trimpath \
    -ldflags="-s -w -X istio.io/istio/pkg/version.buildVersion=$ISTIOCTL" \
    -o "$bin/pilot-discovery" istio.io/istio/pilot/cmd/pilot-discovery)
}

# The same control plane in memory: with Kubernetes' resources and the Gateway API, and without a cluster.
build_istiod-memory() {
  (cd tools/go && CGO_ENABLED=0 go build -mod=readonly -trimpath -ldflags='-s -w' -o "$bin/istiod-memory" ./istiod-memory)
}

# Kubernetes' own server for custom resources: schemas, defaults, validation and watch as they are in a cluster.
build_crdserver() { (cd tools/go && CGO_ENABLED=0 go build -mod=readonly -trimpath -ldflags='-s -w' -o "$bin/crdserver" ./crdserver); }

# SPIRE, an issuer of identities by the SPIFFE Workload API. In a module of its own, with SPIRE's own sums: `go install`
# would ask for the list of all its versions. Its store needs cgo.
build_spire() {
  local folder source
  folder=$(mktemp -d)
  (cd "$folder" && go mod init spire-tools && go mod edit -require "github.com/spiffe/spire@$SPIRE" &&
    source=$(go mod download -json "github.com/spiffe/spire@$SPIRE" | awk -F '"' '$2 == "Dir" { print $4 }') &&
    install -m 644 "$source/go.sum" go.sum &&
    printf 'package tools\n\nimport (\n\t_ "%s"\n\t_ "%s"\n)\n' \
      github.com/spiffe/spire/cmd/spire-agent github.com/spiffe/spire/cmd/spire-server >tools.go &&
    go build -mod=mod -trimpath -ldflags='-s -w' -o "$bin/" \
      github.com/spiffe/spire/cmd/spire-agent github.com/spiffe/spire/cmd/spire-server)
  ln -sfn spire-server "$bin/spire"
}

# The schemas of Kubeflow Trainer, from its module.
build_trainer_crds() {
  local folder
  folder=$(cd "$(mktemp -d)" && go mod download -json "github.com/kubeflow/trainer/v2@$TRAINER_CRDS" |
    awk -F '"' '$2 == "Dir" { print $4 }')
  mkdir -p "$bin/../crds"
  install -m 644 "$folder"/manifests/base/crds/*.yaml "$bin/../crds/"
  ln -sfn ../crds "$bin/trainer_crds"
}

# The schemas of Istio's API and of the Gateway API, from their modules.
build_istio_crds() {
  local api file folder gateway
  api=$(cd tools/go && go list -m -f '{{.Dir}}' istio.io/api)
  gateway=$(cd tools/go && go list -m -f '{{.Dir}}' sigs.k8s.io/gateway-api)
  mkdir -p "$bin/../crds/istio" "$bin/../crds/gateway-api"
  install -m 644 "$api"/kubernetes/customresourcedefinitions.gen.yaml "$bin/../crds/istio/"
  install -m 644 "$gateway"/config/crd/experimental/*.yaml "$bin/../crds/gateway-api/"
  # MeshConfig has none: its protos, with those that they import.
  for folder in "$api" "$api/common-protos"; do
    (cd "$folder" && find mesh networking type google/api/field_behavior.proto -name '*.proto' 2>/dev/null || true) |
      while read -r file; do install -D -m 644 "$folder/$file" "$bin/../crds/mesh-config/$file"; done
  done
  ln -sfn ../crds/istio "$bin/istio_crds"
}

# Servers that the tests start, from the distribution: Debian and its kin, as root.
package() { # package, file that shows it is there
  if compgen -G "$2" >/dev/null; then
    echo "tools: $1 is there"
    return 0
  fi
  echo "tools: installing $1 (log in .tools/logs/$1.log)"
  if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$1"; } \
    >"$logs/$1.log" 2>&1; then
    echo "tools: $1 could not be installed; its tests will skip. The log ends:" >&2
    tail -n 3 "$logs/$1.log" >&2
    return 1
  fi
}

build() { # name, version
  local stamp=$bin/.$1-$2 started=$SECONDS
  if [[ -e $bin/$1 && -e $stamp ]]; then
    echo "tools: $1 $2 is there"
    return 0
  fi
  echo "tools: building $1 $2 (minutes the first time; log in .tools/logs/$1.log)"
  rm -f "$bin/.$1-"*
  if ! "build_$1" >"$logs/$1.log" 2>&1; then
    echo "tools: $1 could not be built; its tests will skip. The log ends:" >&2
    tail -n 5 "$logs/$1.log" >&2
    return 1
  fi
  touch "$stamp"
  echo "tools: built $1 in $((SECONDS - started)) s"
}

for name in "${@:-all}"; do
  case $name in
    all)
      build grpcurl "$GRPCURL" || failed=1
      build kustomize "$KUSTOMIZE" || failed=1
      build istioctl "$ISTIOCTL" || failed=1
      build pilot-discovery "$ISTIOCTL" || failed=1
      build istiod-memory "$ISTIOCTL-$(sha256sum tools/go/istiod-memory/main.go | cut -c 1-12)" || failed=1
      build crdserver "$CRDSERVER" || failed=1
      build trainer_crds "$TRAINER_CRDS" || failed=1
      build istio_crds "$ISTIOCTL-mesh" || failed=1
      package postgresql '/usr/lib/postgresql/*/bin/initdb' || failed=1
      package etcd-server '/usr/bin/etcd' || failed=1
      ;;
    grpcurl) build grpcurl "$GRPCURL" || failed=1 ;;
    kustomize) build kustomize "$KUSTOMIZE" || failed=1 ;;
    istioctl) build istioctl "$ISTIOCTL" || failed=1 ;;
    pilot-discovery) build pilot-discovery "$ISTIOCTL" || failed=1 ;;
    istiod-memory) build istiod-memory "$ISTIOCTL-$(sha256sum tools/go/istiod-memory/main.go | cut -c 1-12)" || failed=1 ;;
    crdserver) build crdserver "$CRDSERVER" || failed=1 ;;
    trainer_crds) build trainer_crds "$TRAINER_CRDS" || failed=1 ;;
    istio_crds) build istio_crds "$ISTIOCTL-mesh" || failed=1 ;;
    # Minutes, and 220 MiB: only when it is asked for.
    spire) build spire "$SPIRE" || failed=1 ;;
    postgresql) package postgresql '/usr/lib/postgresql/*/bin/initdb' || failed=1 ;;
    etcd) package etcd-server '/usr/bin/etcd' || failed=1 ;;
    swift | mlflow | model-signing | kserve | mlserver) ;;
    *)
      echo "tools: no such tool: $name (grpcurl, kustomize, istioctl, pilot-discovery, istiod-memory, crdserver, trainer_crds, istio_crds, spire, postgresql, etcd, swift, mlflow, model-signing, kserve, mlserver)" >&2
      exit 2
      ;;
  esac
done
exit $failed
