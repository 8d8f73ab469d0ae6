package etcdstore

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// snippet is what stands around a code block of the README that is no program by itself: what an application has there.
const snippet = `package block

import (
	"context"
	"errors"
	"expvar"
	"net/http"
	"os"
	"time"

	"github.com/alexedwards/scs/v2"
	"github.com/seed210be38d/etcdstore"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

var (
	_ = errors.Join
	_ = expvar.NewMap
	_ = os.Getenv
	_ = time.Now
	_ = context.Background
	_ = http.Serve
	_ = transport.TLSInfo{}
	_ = clientv3.New
	_ = grpc.NewClient
	_ = status.Code
	_ = scs.New
	_ = etcdstore.New
)
`

// Every Go block of the README compiles: programs as they are (and only they are linked, which takes the time), declarations with the imports above, and statements in a
// function that has what they use.
func TestReadme_CodeCompiles(t *testing.T) {
	root, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(string(readme), -1)
	if fences := strings.Count(string(readme), "```go"); len(blocks) < 5 || len(blocks) != fences {
		t.Fatalf("found %d Go blocks in the README, which opens %d", len(blocks), fences)
	}
	// The module that the blocks are built in has this one's requirements, so that nothing is fetched.
	dir := t.TempDir()
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	sum, err := os.ReadFile("go.sum")
	if err != nil {
		t.Fatal(err)
	}
	const path = "github.com/seed210be38d/etcdstore"
	own := strings.Replace(string(mod), "module "+path, "module readme", 1) +
		fmt.Sprintf("\nrequire %s v0.0.0\nreplace %s => %s\n", path, path, root)
	write(t, filepath.Join(dir, "go.mod"), own)
	write(t, filepath.Join(dir, "go.sum"), string(sum))
	var dirs []string
	for i, block := range blocks {
		dirs = append(dirs, fmt.Sprintf("./block%d", i))
		if err := os.Mkdir(filepath.Join(dir, dirs[i]), 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, dirs[i], "main.go"), program(block[1]))
	}
	cmd := exec.Command("go", slices.Concat([]string{"build", "-mod=mod", "-o", os.DevNull}, dirs)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOFLAGS=-buildvcs=false", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// program makes a program of a code block.
func program(block string) string {
	switch {
	case strings.HasPrefix(block, "package "):
		return block
	case regexp.MustCompile(`^(type|var|func) `).MatchString(block):
		return snippet + block
	}
	// What the block uses is a parameter where it does not define it, and what it defines is used.
	params := map[string]string{
		"cli": "*clientv3.Client", "store": "*etcdstore.EtcdStore", "sessionManager": "*scs.SessionManager",
		"mux": "*http.ServeMux", "ctx": "context.Context", "token": "string", "bannedUser": "int", "endpoints": "[]string",
		"payHandler": "http.Handler", "metrics": "grpc.UnaryClientInterceptor", "conflicts": "*expvar.Int", "old": "scs.Store",
	}
	own := "" // what the README shows before the block that uses it
	if strings.Contains(block, "moving{") {
		own = "\ntype moving struct {\n\t*etcdstore.EtcdStore\n\tmover *etcdstore.EtcdStore\n\told scs.Store\n\tcodec scs.Codec\n}\n"
	}
	defined := regexp.MustCompile(`(?m)^(\w+(?:, \w+)*) :=`).FindAllStringSubmatch(block, -1)
	var uses strings.Builder
	for _, d := range defined {
		for name := range strings.SplitSeq(d[1], ", ") {
			delete(params, name)
			fmt.Fprintf(&uses, "\t_ = %s\n", name)
		}
	}
	var list []string
	for name, typ := range params {
		list = append(list, name+" "+typ)
	}
	return snippet + own + "\nfunc block(" + strings.Join(list, ", ") + ") error {\n" + block + uses.String() + "\treturn nil\n}\n"
}

// The links and pictures of the README lead somewhere, and the tests that it names are in the files that it links.
func TestReadme_Links(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range regexp.MustCompile(`\[([^\[\]]+)\]\(([^)#:]+)\)`).FindAllStringSubmatch(string(readme), -1) {
		text, err := os.ReadFile(link[2])
		if stat, statErr := os.Stat(link[2]); statErr == nil && stat.IsDir() {
			continue
		}
		if err != nil {
			t.Errorf("dead link: %v", err)
		}
		for _, name := range regexp.MustCompile(`\b(?:Test|Fuzz)[A-Z]\w+`).FindAllString(link[1], -1) {
			if !strings.Contains(string(text), "func "+name+"(") {
				t.Errorf("there is no %s in %s", name, link[2])
			}
		}
	}
	for _, picture := range regexp.MustCompile(`(?:src|srcset)="([^"]+)"`).FindAllStringSubmatch(string(readme), -1) {
		if _, err := os.Stat(picture[1]); err != nil {
			t.Errorf("no picture: %v", err)
		}
	}
}

// What the README says about moving over from another store is what the example runs.
func TestReadme_Moving(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	examples, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?s)```go\n(type moving .*?)```").FindSubmatch(readme)
	if block == nil || !strings.Contains(string(examples), string(block[1])) {
		t.Error("example_test.go does not have the README's type moving")
	}
}
