// Package chart checks the Helm chart as Helm and a cluster read it: lint, what comes out for several values, Kubernetes' own schemas,
// and whether the hub understands the configuration that a pod gets. It is a module of its own, because Helm brings half of Kubernetes.
//
// It must not know the hub but as a program.
package chart
