//go:build tools

// Package tools names the etcd server that the embedded control plane builds. It has a module of its own because its
// dependencies are older than those of Kubernetes.
package tools

import _ "go.etcd.io/etcd/server/v3"
