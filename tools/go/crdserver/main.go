// Serves custom resources as a Kubernetes API server does: real schemas, defaults, validation, status and watch, and
// nothing else. Tests run it beside an etcd; it listens on loopback and lets everybody in.
package main

import (
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"k8s.io/apiextensions-apiserver/pkg/cmd/server/options"
	genericapiserver "k8s.io/apiserver/pkg/server"
)

// The generic server insists on a core API for what is switched off here.
const nowhere = `{"apiVersion": "v1", "kind": "Config", "current-context": "none",
"clusters": [{"name": "none", "cluster": {"server": "http://127.0.0.1:1"}}],
"contexts": [{"name": "none", "context": {"cluster": "none", "user": "none"}}], "users": [{"name": "none", "user": {}}]}`

func main() {
	etcd := flag.String("etcd", "", "URL of etcd")
	address := flag.String("listen", "127.0.0.1:0", "address to listen on, HTTPS with a certificate of its own")
	folder := flag.String("folder", "", "folder for the certificate")
	flag.Parse()
	if err := run(*etcd, *address, *folder); err != nil {
		fmt.Fprintln(os.Stderr, "crdserver:", err)
		os.Exit(1)
	}
}

func run(etcd, address, folder string) error {
	host, text, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	port, err := strconv.Atoi(text)
	if err != nil {
		return err
	}
	kubeconfig := filepath.Join(folder, "nowhere.json")
	if err := os.WriteFile(kubeconfig, []byte(nowhere), 0o600); err != nil {
		return err
	}
	o := options.NewCustomResourceDefinitionsServerOptions(os.Stdout, os.Stderr)
	o.RecommendedOptions.Etcd.StorageConfig.Transport.ServerList = []string{etcd}
	o.RecommendedOptions.SecureServing.BindAddress = net.ParseIP(host)
	o.RecommendedOptions.SecureServing.BindPort = port
	o.RecommendedOptions.SecureServing.ServerCert.CertDirectory = folder
	o.RecommendedOptions.CoreAPI.CoreAPIKubeconfigPath = kubeconfig
	o.RecommendedOptions.Authentication = nil
	o.RecommendedOptions.Authorization = nil
	o.RecommendedOptions.Admission = nil
	o.RecommendedOptions.Features.EnablePriorityAndFairness = false
	if err := o.Complete(); err != nil {
		return err
	}
	config, err := o.Config()
	if err != nil {
		return err
	}
	server, err := config.Complete().New(genericapiserver.NewEmptyDelegate())
	if err != nil {
		return err
	}
	return server.GenericAPIServer.PrepareRun().RunWithContext(genericapiserver.SetupSignalContext())
}
