//go:build tools

// Package tools names KWOK, which plays the simulated nodes of the embedded control plane. It has a module of its own
// so that its releases and those of Kubernetes move apart.
package tools

import _ "sigs.k8s.io/kwok/cmd/kwok"
