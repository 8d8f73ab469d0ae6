package main

import (
	"bufio"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
	"time"
)

// TestMainProgram builds the command, and uses it as one does by hand: open the address that it prints, and press Ctrl-C.
func TestMainProgram(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "cart")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	tmp := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	cmd := exec.CommandContext(ctx, bin, "-members", "1", "-addr", "localhost:0")
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cancel() // which kills the program where the test has failed
		_ = cmd.Wait()
	}()

	url := ""
	lines := bufio.NewScanner(stdout)
	for url == "" && lines.Scan() {
		if m := regexp.MustCompile(`Open (http://\S+)`).FindStringSubmatch(lines.Text()); m != nil {
			url = m[1]
		}
	}
	if url == "" {
		t.Fatalf("the program printed no address: %v", lines.Err())
	}
	wantField(t, newVisitor(t).get(url), "count", "0 items")
	if data, _ := filepath.Glob(tmp + "/*"); len(data) != 1 {
		t.Errorf("etcd's data: %q, want one directory", data)
	}

	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, stdout)
	if err := cmd.Wait(); err != nil {
		t.Errorf("the program ended with %v", err)
	}
	if left, _ := filepath.Glob(tmp + "/*"); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}
