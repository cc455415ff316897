//go:build tools

// Package tools names runc, which starts the containers of a real node. It has a module of its own because it is the
// one program that needs a C compiler.
package tools

import _ "github.com/opencontainers/runc"
