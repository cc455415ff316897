// Command runc-unconfined is runc for containers whose system calls are not filtered. kubelet asks for a filter for
// every pod's sandbox, and a runc that was built without libseccomp, which is C and no Go module, refuses such a
// container. So the request is taken out of the bundle's configuration, and the runc beside this program does the rest.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "runc-unconfined: %v\n", err)
		os.Exit(1)
	}
}

func run() error {
	if bundle := option("bundle"); bundle != "" {
		if err := withoutFilter(filepath.Join(bundle, "config.json")); err != nil {
			return err
		}
	}
	own, err := os.Executable()
	if err != nil {
		return err
	}
	runc := filepath.Join(filepath.Dir(own), "runc")
	return fmt.Errorf("%s: %w", runc, syscall.Exec(runc, append([]string{"runc"}, os.Args[1:]...), os.Environ()))
}

// option returns the value of --name, however it is written.
func option(name string) string {
	for i, word := range os.Args {
		if value, found := strings.CutPrefix(word, "--"+name+"="); found {
			return value
		}
		if word == "--"+name && i+1 < len(os.Args) {
			return os.Args[i+1]
		}
	}
	return ""
}

// withoutFilter rewrites a configuration in place, and keeps everything else as it stands.
func withoutFilter(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var config, linux map[string]json.RawMessage
	if err := json.Unmarshal(text, &config); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := json.Unmarshal(config["linux"], &linux); err != nil {
		return fmt.Errorf("%s: linux: %w", path, err)
	}
	delete(linux, "seccomp")
	if config["linux"], err = json.Marshal(linux); err != nil {
		return err
	}
	if text, err = json.Marshal(config); err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o600)
}
