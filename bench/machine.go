package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"go.etcd.io/etcd/api/v3/version"
)

// machine describes what the numbers were measured on.
type machine struct {
	CPU      string `json:"cpu"`
	Cores    int    `json:"cores"`
	MemoryMB int64  `json:"memory_mb"`
	Kernel   string `json:"kernel"`
	Fsync    string `json:"fsync"` // median time to append 4 KiB to a file and make it durable
	Go       string `json:"go"`
	Etcd     string `json:"etcd"`
	Redis    string `json:"redis,omitempty"`
	Postgres string `json:"postgresql,omitempty"`
	Date     string `json:"date"`
}

// describeMachine describes this machine. The data of all servers is under dir.
func describeMachine(dir string) machine {
	m := machine{
		CPU:    procValue("/proc/cpuinfo", "model name"),
		Cores:  runtime.NumCPU(),
		Kernel: runtime.GOOS + "/" + runtime.GOARCH,
		Fsync:  "unknown",
		Go:     runtime.Version(),
		Etcd:   version.Version,
		Date:   time.Now().UTC().Format(time.DateOnly),
	}
	if m.CPU == "" {
		m.CPU = runtime.GOARCH
	}
	kib, _ := strconv.ParseInt(procValue("/proc/meminfo", "MemTotal"), 10, 64) // 0: unknown
	m.MemoryMB = kib >> 10
	if release, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m.Kernel = "Linux " + strings.TrimSpace(string(release))
	}
	if d, err := fsyncTime(dir); err == nil {
		m.Fsync = d.Round(time.Microsecond).String()
	}
	m.Redis = versionOf(find("redis-server"), "--version")
	m.Postgres = versionOf(find("postgres"), "--version")
	return m
}

// procValue returns the value of a "name: value" line, without the unit kB.
func procValue(file, name string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		if strings.TrimSpace(key) == name {
			return strings.TrimSuffix(strings.TrimSpace(value), " kB")
		}
	}
	return ""
}

// fsyncTime returns the median time of an append that is made durable.
func fsyncTime(dir string) (time.Duration, error) {
	f, err := os.CreateTemp(dir, "fsync-")
	if err != nil {
		return 0, err
	}
	defer os.Remove(f.Name()) // the directory goes anyway
	defer f.Close()           // what was written is of no use
	block := make([]byte, 4<<10)
	times := make([]time.Duration, 50)
	for i := range times {
		start := time.Now()
		if _, err := f.Write(block); err != nil {
			return 0, err
		}
		if err := f.Sync(); err != nil {
			return 0, err
		}
		times[i] = time.Since(start)
	}
	slices.Sort(times)
	return times[len(times)/2], nil
}

// find returns the path of a server's program, or "".
func find(program string) string {
	if path, err := exec.LookPath(program); err == nil {
		return path
	}
	// Debian keeps those of PostgreSQL out of the path.
	paths, _ := filepath.Glob("/usr/lib/postgresql/*/bin/" + program) // the pattern is well-formed
	if len(paths) == 0 {
		return ""
	}
	return paths[len(paths)-1]
}

// versionOf returns the first thing that looks like a version in what a program says.
func versionOf(path, argument string) string {
	if path == "" {
		return ""
	}
	out, err := exec.Command(path, argument).Output()
	if err != nil {
		return "unknown"
	}
	for word := range strings.FieldsSeq(string(out)) {
		word = strings.TrimPrefix(word, "v=")
		if word[0] >= '0' && word[0] <= '9' {
			return word
		}
	}
	return "unknown"
}

// clientCPU returns the processor time that this process has used.
func clientCPU() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(fmt.Sprint("getrusage: ", err)) // it cannot fail with these arguments
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// ownGroup puts a process into a group of its own.
func ownGroup() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
