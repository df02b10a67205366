// Istio's control plane in memory: reads Kubernetes and Istio resources as YAML from files, and prints what it makes of
// them as JSON: the Envoy configuration of each proxy, the resources derived from the Gateway API, and statuses; what
// the schemas of the custom resources refuse, with their rules in CEL, is told and left out.
// Tests compare the laptop mesh with it. It asks no cluster, and nothing listens.
package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/yaml"

	"istio.io/istio/pilot/pkg/config/kube/crd"
	"istio.io/istio/pilot/pkg/config/kube/gateway"
	"istio.io/istio/pilot/pkg/model"
	"istio.io/istio/pilot/pkg/status"
	"istio.io/istio/pilot/test/xds"
	"istio.io/istio/pkg/config"
	"istio.io/istio/pkg/config/analysis/analyzers"
	"istio.io/istio/pkg/config/analysis/local"
	crdvalidation "istio.io/istio/pkg/config/crd"
	"istio.io/istio/pkg/config/mesh"
	"istio.io/istio/pkg/config/schema/gvk"
	"istio.io/istio/pkg/config/schema/gvr"
	"istio.io/istio/pkg/kube"
	"istio.io/istio/pkg/kube/kclient/clienttest"
	"istio.io/istio/pkg/log"
	"istio.io/istio/pkg/test"
	"istio.io/istio/pkg/util/sets"
)

// A proxy to print: what Envoy would tell of itself.
type proxySpec struct {
	ID             string            `json:"id"`
	Type           string            `json:"type"`
	Namespace      string            `json:"namespace"`
	ServiceAccount string            `json:"serviceAccount"`
	Address        string            `json:"address"`
	Labels         map[string]string `json:"labels"`
	Interception   string            `json:"interception"`
}

type output struct {
	Proxies  map[string]map[string][]json.RawMessage `json:"proxies"`
	Derived  map[string][]any                        `json:"derived"`
	Statuses map[string]any                          `json:"statuses"`
	Refused  map[string]string                       `json:"refused"`
	Messages []message                               `json:"messages"`
}

// What an analyzer says of a resource.
type message struct {
	Analyzer string `json:"analyzer"`
	Code     string `json:"code"`
	Level    string `json:"level"`
	Origin   string `json:"origin"`
	Text     string `json:"text"`
}

// What was read: objects of Kubernetes and the Gateway API, and resources of Istio.
type input struct {
	objects []runtime.Object
	istio   []string
	texts   []string
	refused map[string]string
}

// Kinds that Istio takes only when their definitions say which version they are.
var versioned = []schema.GroupVersionResource{
	gvr.GatewayClass, gvr.KubernetesGateway, gvr.HTTPRoute, gvr.GRPCRoute, gvr.TCPRoute, gvr.TLSRoute, gvr.ReferenceGrant,
	gvr.BackendTLSPolicy, gvr.ListenerSet,
}

// Statuses that the controller would write to the API server.
type statusStore struct {
	model.ConfigStore
	lock  sync.Mutex
	found map[string]any
}

func (s *statusStore) Get(kind config.GroupVersionKind, name, namespace string) *config.Config {
	return &config.Config{Meta: config.Meta{GroupVersionKind: kind, Name: name, Namespace: namespace}}
}

func (s *statusStore) UpdateStatus(c config.Config) (string, error) {
	s.lock.Lock()
	defer s.lock.Unlock()
	s.found[c.GroupVersionKind.Kind+" "+c.Namespace+"/"+c.Name] = c.Status
	return "", nil
}

func main() {
	proxies := flag.String("proxies", "", "JSON file: list of proxies to print")
	meshFile := flag.String("mesh", "", "file with MeshConfig")
	crdFiles := flag.String("crds", "", "folders with CustomResourceDefinitions, separated by commas: resources are defaulted and checked")
	to := flag.String("o", "", "file for the result; Istio's packages say things on standard output")
	analyze := flag.Bool("analyze", false, "only tell what istioctl analyze would, were all of it in a cluster")
	checkOnly := flag.Bool("check", false, "only check resources against their schemas")
	flag.Parse()
	opts := log.DefaultOptions()
	opts.SetDefaultOutputLevel(log.OverrideScopeName, log.NoneLevel)
	if err := log.Configure(opts); err != nil {
		fail(err)
	}
	var result *output
	var failure error
	err := test.Wrap(func(t test.Failer) {
		var validator *crdvalidation.Validator
		if *crdFiles != "" {
			if validator, failure = validatorOf(strings.Split(*crdFiles, ",")); failure != nil {
				return
			}
		}
		var in *input
		if in, failure = read(validator, flag.Args(), *checkOnly); failure != nil {
			return
		}
		if *checkOnly {
			result = &output{Refused: in.refused}
			return
		}
		if *analyze {
			if result, failure = analysisOf(in, *meshFile); result != nil {
				result.Refused = in.refused
			}
			return
		}
		result, failure = run(t, in, *proxies, *meshFile)
	})
	for _, e := range []error{err, failure} {
		if e != nil {
			fail(e)
		}
	}
	text, err := json.MarshalIndent(result, "", " ")
	if err == nil {
		err = os.WriteFile(*to, text, 0o600)
	}
	if err != nil {
		fail(err)
	}
}

func validatorOf(folders []string) (*crdvalidation.Validator, error) {
	var files []string
	for _, folder := range folders {
		for _, pattern := range []string{"gateway.networking.k8s.io_*s.yaml", "customresourcedefinitions.gen.yaml"} {
			found, err := filepath.Glob(filepath.Join(folder, pattern))
			if err != nil {
				return nil, err
			}
			files = append(files, found...)
		}
	}
	validator, err := crdvalidation.NewValidatorFromFilesWithOptions(files, crdvalidation.WithoutCRDValidation())
	if err != nil {
		return nil, err
	}
	validator.SkipMissing = true
	return validator, nil
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "istiod-memory:", err)
	os.Exit(1)
}

func run(t test.Failer, in *input, proxiesFile, meshFile string) (*output, error) {
	options := xds.FakeOptions{DisableSecretAuthorization: true, KubernetesObjects: in.objects}
	if meshFile != "" {
		text, err := os.ReadFile(meshFile)
		if err != nil {
			return nil, err
		}
		if options.MeshConfig, err = mesh.ApplyMeshConfigDefaults(string(text)); err != nil {
			return nil, err
		}
	}
	configs, _, err := crd.ParseInputs(strings.Join(in.istio, "\n---\n"))
	if err != nil {
		return nil, err
	}
	options.Configs = configs
	server := xds.NewFakeDiscoveryServer(t, options)
	for _, resource := range versioned {
		clienttest.MakeCRDWithAnnotations(t, server.KubeClient(), resource,
			map[string]string{"gateway.networking.k8s.io/bundle-version": "v1.6.0"})
	}
	result, err := report(server, proxiesFile)
	if result != nil {
		result.Refused = in.refused
	}
	return result, err
}

func analysisOf(in *input, meshFile string) (*output, error) {
	analyzer := local.NewIstiodAnalyzer(analyzers.AllCombined(), "", "istio-system", nil)
	if meshFile != "" {
		if err := analyzer.AddFileKubeMeshConfig(meshFile); err != nil {
			return nil, err
		}
	}
	source := local.ReaderSource{Name: "cluster.yaml", Reader: strings.NewReader(strings.Join(in.texts, "\n---\n"))}
	if err := analyzer.AddTestReaderKubeSource([]local.ReaderSource{source}); err != nil {
		return nil, err
	}
	stop := make(chan struct{})
	defer close(stop)
	found, err := analyzer.Analyze(stop)
	if err != nil {
		return nil, err
	}
	result := &output{Messages: []message{}}
	for name, messages := range found.MappedMessages {
		for _, one := range messages {
			origin := ""
			if one.Resource != nil {
				origin = one.Resource.Origin.FriendlyName()
			}
			result.Messages = append(result.Messages, message{
				Analyzer: name, Code: one.Type.Code(), Level: one.Type.Level().String(), Origin: origin, Text: one.String(),
			})
		}
	}
	return result, nil
}

func read(validator *crdvalidation.Validator, files []string, checkOnly bool) (*input, error) {
	in := &input{refused: map[string]string{}}
	order := time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		for _, part := range bytes.Split(append([]byte("\n"), text...), []byte("\n---")) {
			order = order.Add(time.Second)
			object, err := prepare(part, order)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", file, err)
			}
			if object == nil {
				continue
			}
			if validator != nil {
				if err := validator.ValidateCustomResource(object); err != nil {
					in.refused[object.GetKind()+" "+object.GetNamespace()+"/"+object.GetName()] = err.Error()
					continue
				}
			}
			if checkOnly {
				continue
			}
			if err := in.add(object); err != nil {
				return nil, fmt.Errorf("%s: %w", file, err)
			}
		}
	}
	return in, nil
}

func (in *input) add(object *unstructured.Unstructured) error {
	text, err := yaml.Marshal(object.Object)
	if err != nil {
		return err
	}
	in.texts = append(in.texts, string(text))
	isIstio := strings.HasSuffix(object.GroupVersionKind().Group, ".istio.io")
	if isIstio {
		in.istio = append(in.istio, string(text))
	}
	// A ServiceEntry can be the parent of a route, so the Gateway API's controller reads it too.
	typed, _, err := kube.IstioCodec.UniversalDeserializer().Decode(text, nil, nil)
	if err == nil {
		in.objects = append(in.objects, typed)
	} else if !isIstio {
		return err
	}
	return nil
}

// prepare gives a document an age by its place.
func prepare(part []byte, order time.Time) (*unstructured.Unstructured, error) {
	text, err := yaml.YAMLToJSON(part)
	if err != nil || string(text) == "null" {
		return nil, err
	}
	// Whole numbers stay whole, as rules in CEL need them.
	result := &unstructured.Unstructured{}
	if err := result.UnmarshalJSON(text); err != nil {
		return nil, err
	}
	if created := result.GetCreationTimestamp(); created.IsZero() {
		result.SetCreationTimestamp(metav1.NewTime(order))
	}
	return result, nil
}

func report(server *xds.FakeDiscoveryServer, proxiesFile string) (*output, error) {
	store := &statusStore{found: map[string]any{}}
	controller, _ := server.Discovery.Env.GatewayAPIController.(*gateway.Controller)
	stop := make(chan struct{})
	defer close(stop)
	if controller != nil {
		manager := status.NewManager(store)
		manager.Start(stop)
		controller.SetStatusWrite(true, manager)
	}
	// The queue of statuses has no end that one could wait for: quiet for a while is the end.
	for last, quiet := -1, 0; quiet < 6; time.Sleep(50 * time.Millisecond) {
		store.lock.Lock()
		count := len(store.found)
		store.lock.Unlock()
		if count == last {
			quiet++
		} else {
			last, quiet = count, 0
		}
	}
	server.Discovery.ConfigUpdate(&model.PushRequest{Forced: true, ConfigsUpdated: sets.New[model.ConfigKey]()})
	server.EnsureSynced(server.T())
	result := &output{Proxies: map[string]map[string][]json.RawMessage{}, Derived: map[string][]any{}}
	if controller != nil {
		for _, kind := range []config.GroupVersionKind{gvk.Gateway, gvk.VirtualService, gvk.DestinationRule} {
			for _, one := range controller.List(kind, "") {
				spec, err := config.ToJSON(one.Spec)
				if err != nil {
					return nil, err
				}
				result.Derived[kind.Kind] = append(result.Derived[kind.Kind], map[string]any{
					"name": one.Name, "namespace": one.Namespace, "annotations": one.Annotations,
					"spec": json.RawMessage(spec),
				})
			}
		}
	}
	store.lock.Lock()
	result.Statuses = store.found
	store.lock.Unlock()
	if proxiesFile == "" {
		return result, nil
	}
	text, err := os.ReadFile(proxiesFile)
	if err != nil {
		return nil, err
	}
	specs := []proxySpec{}
	if err := json.Unmarshal(text, &specs); err != nil {
		return nil, err
	}
	for _, spec := range specs {
		configuration, err := configurationOf(server, spec)
		if err != nil {
			return nil, err
		}
		result.Proxies[spec.ID] = configuration
	}
	return result, nil
}

func configurationOf(server *xds.FakeDiscoveryServer, spec proxySpec) (map[string][]json.RawMessage, error) {
	proxy := &model.Proxy{
		ID:              spec.ID + "." + spec.Namespace,
		Type:            model.NodeType(spec.Type),
		ConfigNamespace: spec.Namespace,
		IPAddresses:     []string{spec.Address},
		Labels:          spec.Labels,
		Metadata: &model.NodeMetadata{
			Namespace:        spec.Namespace,
			Labels:           spec.Labels,
			ServiceAccount:   spec.ServiceAccount,
			InterceptionMode: model.TrafficInterceptionMode(spec.Interception),
			IstioVersion:     "1.31.0",
			ClusterID:        "Kubernetes",
		},
		XdsResourceGenerator: nil,
	}
	proxy = server.SetupProxy(proxy)
	listeners := server.Listeners(proxy)
	result := map[string][]json.RawMessage{}
	add := func(name string, message proto.Message) error {
		text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(message)
		if err != nil {
			return err
		}
		result[name] = append(result[name], text)
		return nil
	}
	for _, one := range listeners {
		if err := add("listeners", one); err != nil {
			return nil, err
		}
	}
	for _, one := range server.RoutesFromListeners(proxy, listeners) {
		if err := add("routes", one); err != nil {
			return nil, err
		}
	}
	for _, one := range server.Clusters(proxy) {
		if err := add("clusters", one); err != nil {
			return nil, err
		}
	}
	for _, one := range server.Endpoints(proxy) {
		if err := add("endpoints", one); err != nil {
			return nil, err
		}
	}
	return result, nil
}
