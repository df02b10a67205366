#!/usr/bin/env bash
# Builds the programs that some tests use, at pinned versions, into .tools/bin. Quick when they are there already.
# With arguments, builds only those: tools/build.sh grpcurl
set -euo pipefail
cd "$(dirname "$0")/.."

GRPCURL=v1.9.3
KUSTOMIZE=v5.8.1
ISTIOCTL=$(awk '$1 == "require" && $2 == "istio.io/istio" { print $3 }' tools/istioctl/go.mod)

bin=$PWD/.tools/bin
logs=$PWD/.tools/logs
mkdir -p "$bin" "$logs"

if ! command -v go >/dev/null; then
  echo "tools: Go is not installed, so grpcurl, kustomize and istioctl cannot be built; their tests will skip." >&2
  exit 1
fi

install_module() { # name, module@version
  GOBIN=$bin CGO_ENABLED=0 go install -trimpath -ldflags='-s -w' "$2"
}

build_grpcurl() { install_module grpcurl "github.com/fullstorydev/grpcurl/cmd/grpcurl@$GRPCURL"; }

build_kustomize() { install_module kustomize "sigs.k8s.io/kustomize/kustomize/v5@$KUSTOMIZE"; }

build_istioctl() {
  (cd tools/istioctl && CGO_ENABLED=0 go build -mod=readonly -trimpath \
    -ldflags="-s -w -X istio.io/istio/pkg/version.buildVersion=$ISTIOCTL" \
    -o "$bin/istioctl" istio.io/istio/istioctl/cmd/istioctl)
}

build() { # name, version
  local stamp=$bin/.$1-$2 started=$SECONDS
  if [[ -x $bin/$1 && -e $stamp ]]; then
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

failed=0
for name in "${@:-all}"; do
  case $name in
    all)
      build grpcurl "$GRPCURL" || failed=1
      build kustomize "$KUSTOMIZE" || failed=1
      build istioctl "$ISTIOCTL" || failed=1
      ;;
    grpcurl) build grpcurl "$GRPCURL" || failed=1 ;;
    kustomize) build kustomize "$KUSTOMIZE" || failed=1 ;;
    istioctl) build istioctl "$ISTIOCTL" || failed=1 ;;
    *)
      echo "tools: no such tool: $name (grpcurl, kustomize, istioctl)" >&2
      exit 2
      ;;
  esac
done
exit $failed
