// Package issuer is a small OpenID provider for tests: RS256, its own key set, discovery, a token endpoint, and switches for
// what goes wrong with providers (keys that rotate, outages, forged tokens).
//
// It must not know the hub: it stands for somebody else's provider, so that the hub's resource server is not only shown to
// agree with the hub's own provider.
package issuer
