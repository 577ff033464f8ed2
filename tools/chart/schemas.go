//go:build schemas

package chart

// The module is wanted for the schemas of Kubernetes that lie in it, and for none of its code, which would bring the whole API server.
import _ "sigs.k8s.io/kubectl-validate/pkg/openapiclient/groupversion"
