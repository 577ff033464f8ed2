//go:build schemas

package chart

// The modules are wanted for the schemas of Kubernetes and of its Gateway API that lie in them, and for none of their code, which would
// bring the whole API server.
import (
	_ "sigs.k8s.io/gateway-api/pkg/consts"
	_ "sigs.k8s.io/kubectl-validate/pkg/openapiclient/groupversion"
)
